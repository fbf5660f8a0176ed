"""PyTorch on one side, Orbax on the other: reads the released weights, converts and certifies them."""

from porting.convert import load_state_dict, state_dict
from porting.release import port
from porting.sources import read

__all__ = ["load_state_dict", "port", "read", "state_dict"]
