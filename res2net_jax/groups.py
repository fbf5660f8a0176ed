"""Parameters by depth, for learning rates that fall from the classifier down to the stem (timm's layer decay)."""

import math
import re
from collections.abc import Iterable

from flax import nnx

from res2net_jax.init import require_model, variables
from res2net_jax.model import Res2Net


def layer_depths(model: Res2Net, *, coarse: bool = False) -> dict[str, int]:
    """The depth of each parameter: the stem 0, then block by block (``coarse``: stage by stage) to the classifier."""
    require_model(model)
    parameters = [path for path, leaf in variables(model).items() if isinstance(leaf, nnx.Param)]
    return depths(parameters, model.group_matcher(coarse))


def layer_scales(model: Res2Net, decay: float, *, coarse: bool = False) -> dict[str, float]:
    """The factor of each parameter's learning rate: ``decay`` to the power of its distance from the classifier."""
    return scales(layer_depths(model, coarse=coarse), decay)


def depths(paths: Iterable[str], matcher: dict[str, str]) -> dict[str, int]:
    """Depths of parameter ``paths`` under a ``group_matcher``; a path that nothing matches belongs to the head."""
    keys = {path: _key(path, matcher) for path in paths}
    order = sorted(set(keys.values()))
    return {path: order.index(key) for path, key in keys.items()}


def scales(depths: dict[str, int], decay: float) -> dict[str, float]:
    """``decay ** (deepest - depth)`` for each path."""
    deepest = max(depths.values())
    return {path: decay ** (deepest - depth) for path, depth in depths.items()}


def _key(path, matcher):
    for order, pattern in enumerate(matcher.values()):
        if match := re.match(pattern, path):
            return (order, *map(int, match.groups()))
    return (math.inf,)
