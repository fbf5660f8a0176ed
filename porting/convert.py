"""torch keys and layouts <-> model state, both ways, in numpy.

The model's modules bear torch's names, so a key is translated by its last word alone::

    torch                 model            layout
    conv*.weight          .kernel          OIHW -> HWIO
    fc.weight             .kernel          transposed
    bn*.weight            .scale
    *.bias                .bias
    *.running_mean, _var  .mean, .var
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from res2net_jax.arch import Arch
from res2net_jax.init import require_model, variables
from res2net_jax.model import Res2Net
from res2net_jax.variants import VARIANTS

_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def load_state_dict(model: Res2Net, state_dict: Mapping[str, np.ndarray]) -> Res2Net:
    """Fills ``model`` in place with a torch state dict, and returns it.

    Every key but ``*.num_batches_tracked`` is used and every array filled, or nothing is changed.
    Values are cast to the model's dtypes and keep its sharding.

    Args:
        model: Its leaves may be abstract.
        state_dict: Arrays (or CPU tensors) under torch's keys.

    Raises:
        ValueError: One message with every key that is missing, unexpected or misshapen, or whose values are no
            weights, and the variants that the state dict would fit.
    """
    require_model(model)
    given = {key: to_numpy(value) for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}
    leaves = {torch_key(path): leaf for path, leaf in variables(model).items()}
    fitting = [key for key in leaves if key in given and given[key].shape == to_torch_shape(leaves[key].shape)]
    real = [key for key in fitting if np.issubdtype(given[key].dtype, np.floating)]
    with np.errstate(over="ignore"):  # what overflows is reported below
        values = {key: to_model(given[key]).astype(leaves[key].dtype) for key in real}
    problems = {
        "missing": [key for key in leaves if key not in given],
        "unexpected": [key for key in given if key not in leaves],
        "wrong shape": [
            f"{key}: {given[key].shape}, expected {to_torch_shape(leaves[key].shape)}"
            for key in leaves
            if key in given and key not in fitting
        ],
        "not floating point": [f"{key}: {given[key].dtype}" for key in fitting if key not in values],
        "NaN or infinite": [key for key, value in values.items() if not np.isfinite(value).all()],
        "negative variance": [
            key for key, value in values.items() if key.endswith("running_var") and (value < 0).any()
        ],
    }
    if any(problems.values()):
        raise ValueError(_explain(model, problems, given))
    for key, leaf in leaves.items():
        old = leaf.get_value()
        place = old.sharding if isinstance(old, jax.Array) else None
        leaf.set_value(jax.device_put(values[key], place))
    model.derived_from = None  # for nothing says whence these are
    return model


def state_dict(model: Res2Net) -> dict[str, np.ndarray]:
    """The model's arrays under torch's keys and in its layouts; the inverse of :func:`load_state_dict`, bit for bit.

    ``num_batches_tracked`` is absent: torch's batch normalisation loads strictly without it.
    """
    require_model(model)
    return {torch_key(path): to_torch(np.asarray(leaf.get_value())) for path, leaf in variables(model).items()}


def fitting_variants(state_dict: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the variants that have just these keys and shapes, with the options needed for it."""
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if "num_batches_tracked" not in key}
    num_classes = shapes.get("fc.weight", (0,))[0]
    fits = []
    for name, variant in VARIANTS.items():
        first = shapes.get("conv1.0.weight" if variant.arch.stem_type else "conv1.weight", ())
        in_chans = first[1] if len(first) == 4 else 3
        if torch_shapes(variant.arch, num_classes, in_chans) == shapes:
            options = [f"num_classes={num_classes}"] * (num_classes != 1000) + [f"in_chans={in_chans}"] * (
                in_chans != 3
            )
            fits.append(f"{name} ({', '.join(options)})" if options else name)
    return fits


def torch_shapes(arch: Arch, num_classes: int = 1000, in_chans: int = 3) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a model's torch state dict, without ``num_batches_tracked``."""
    model = Res2Net(arch, num_classes=num_classes, in_chans=in_chans)
    return {torch_key(path): to_torch_shape(leaf.shape) for path, leaf in variables(model).items()}


def torch_key(path: str) -> str:
    """``"layer1.0.bn1.scale"`` -> ``"layer1.0.bn1.weight"``."""
    module, leaf = path.rsplit(".", 1)
    return f"{module}.{_TORCH_NAMES[leaf]}"


def to_model(value: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO, [out, in] -> [in, out]; vectors stay."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_torch(value: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW, [in, out] -> [out, in]; vectors stay. C-contiguous."""
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)


def to_numpy(value) -> np.ndarray:
    """An array or CPU tensor as numpy; bfloat16, which numpy does not have, as float32."""
    if hasattr(value, "detach"):  # a tensor
        value = value.detach()
        value = value.float().numpy() if "bfloat16" in str(value.dtype) else value.numpy()
    value = np.asarray(value)
    return value.astype(np.float32) if value.dtype == jnp.bfloat16 else value


def to_torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _explain(model, problems, given):
    lines = [f"these weights do not fit {model.name} ({model.num_classes} classes, {model.in_chans} input channels)"]
    for problem, keys in problems.items():
        if keys:
            lines.append(f"{len(keys)} {problem}:")
            lines += [f"  {key}" for key in keys]
    if not given.keys() & {torch_key(path) for path in variables(model)}:
        lines.append('Keys that are wrapped ("state_dict", "module.") porting.read(file) takes out')
    others = [fit for fit in fitting_variants(given) if fit != model.name]
    if others:
        lines.append(f"They fit: {', '.join(others)}")
    elif problems["missing"] or problems["unexpected"] or problems["wrong shape"]:
        lines.append('A model made with options needs them here too: create, load and port take attn_layer="se", say')
    return "\n".join(lines)
