"""timm's model of any architecture."""

import dataclasses

from porting.convert import state_dict, to_numpy
from res2net_jax.arch import Arch
from res2net_jax.model import Res2Net


def timm_model(model: Res2Net):
    """timm's model (a torch.nn.Module) of the architecture and with the weights of ``model``, in float32."""
    import torch

    module, stages = with_weights(model)
    if len(stages) != 4:  # timm's forward runs four, however many there are
        for i in range(4):
            stage = stages[i : i + 1] if i < 3 else stages[i:]
            setattr(module, f"layer{i + 1}", torch.nn.Sequential(*stage))
    return module


def with_weights(model: Res2Net) -> tuple:
    """As :func:`timm_model`, but as timm makes it; and its stages, as many as ``model`` has, which may be cut short."""
    import torch

    module = twin(model.arch, num_classes=model.num_classes, in_chans=model.in_chans)
    names = [f"layer{i + 1}" for i in range(len(model.arch.layers))]
    count = len(model.stages)
    for name in names[count:]:
        setattr(module, name, torch.nn.Identity())
    weights = {key: torch.tensor(to_numpy(value), dtype=torch.float32) for key, value in state_dict(model).items()}
    module.load_state_dict(weights, strict=True)
    return module, [getattr(module, name) for name in names[:count]]


def twin(arch: Arch, *, num_classes: int, in_chans: int):
    """A fresh model of timm's (a torch.nn.Module) of this architecture, with torch's keys."""
    import timm
    import torch
    from timm.layers import BlurPool2d, get_attn

    if sum(arch.layers) == 1:  # it divides by the number of blocks less one
        raise ValueError("timm, which writes .onnx files and certifies ports, makes no model of a single block")

    class BlurPoolConstant(BlurPool2d):
        def __init__(self, **options):
            super().__init__(pad_mode="constant", **options)

    anti_aliasing = {"": None, "avg": torch.nn.AvgPool2d, "blur": BlurPool2d, "blurpc": BlurPoolConstant}
    options = dataclasses.asdict(arch)
    options["aa_layer"] = anti_aliasing[options["aa_layer"]]
    block_args = {"scale": options.pop("scale"), "attn_layer": get_attn(options.pop("attn_layer") or None)}
    counts = {"num_classes": num_classes, "in_chans": in_chans}
    return timm.create_model("res2net50_26w_4s", block_args=block_args, **counts, **options)
