"""A trained model for other images or other classes: what of its weights can be kept, and how (timm's rules)."""

import jax
import jax.numpy as jnp

from res2net_jax.arch import Arch
from res2net_jax.checks import natural
from res2net_jax.init import initialize, variables
from res2net_jax.model import Res2Net


def adapt(trained: Res2Net, wanted: Res2Net, *, sharding: jax.sharding.Sharding | None, seed: int = 0) -> Res2Net:
    """Fills the abstract ``wanted`` with the weights of ``trained`` and returns it.

    The first convolution is fitted to ``in_chans`` by :func:`fit_first_conv`. With another number of
    classes the classifier is fresh, of ``seed``, and put on ``sharding``. Anything else must match.

    Raises:
        ValueError: The architectures differ in the shape of some array; all are listed.
    """
    have, want = variables(trained), variables(wanted)
    first = "conv1.0.kernel" if trained.arch.stem_type else "conv1.kernel"
    fresh_head = trained.num_classes != wanted.num_classes
    misfits = []
    for path, leaf in want.items():
        if path.startswith("fc.") and fresh_head:
            continue
        value = have[path].get_value() if path in have else None
        if path == first and value is not None and trained.in_chans == 3 != wanted.in_chans:
            value = fit_first_conv(value, wanted.in_chans)
        if value is None or value.shape != leaf.shape:
            misfits.append(f"{path}: wanted {leaf.shape}, have {'none' if value is None else value.shape}")
            continue
        leaf.set_value(value.astype(leaf.dtype))
    unused = [path for path in have if path not in want and not (path.startswith("fc.") and fresh_head)]
    if misfits or unused:
        lines = misfits + [f"{path}: not in the model asked for" for path in unused]
        raise ValueError(
            f"the weights of {trained.name} do not fit the model asked for (create() makes a fresh one):\n  "
            + "\n  ".join(lines)
        )
    if fresh_head and wanted.fc is not None:
        initialize(wanted, seed, only="fc.")
        for leaf in variables(wanted.fc).values():
            leaf.set_value(jax.device_put(leaf.get_value(), sharding))
    return wanted


def asked_for(
    saved: Res2Net, num_classes: int | None, in_chans: int | None, param_dtype: jnp.dtype | None, arch: Arch
) -> Res2Net:
    """The abstract model that is asked for, None being as in ``saved``.

    ``saved`` itself where nothing differs: to make another one takes a tenth of a load.

    Raises:
        ValueError: A number or a type that no model has.
        TypeError: No type at all.
    """
    num_classes = saved.num_classes if num_classes is None else natural("num_classes", num_classes)
    in_chans = saved.in_chans if in_chans is None else natural("in_chans", in_chans, least=1)
    param_dtype = saved.param_dtype if param_dtype is None else jnp.dtype(param_dtype)
    stored = saved.num_classes, saved.in_chans, saved.param_dtype, saved.arch
    if (num_classes, in_chans, param_dtype, arch) == stored:
        return saved
    wanted = Res2Net(
        arch,
        num_classes=num_classes,
        in_chans=in_chans,
        dtype=saved.dtype,
        param_dtype=param_dtype,
        name=saved.name,
        class_names=saved.class_names if num_classes == saved.num_classes else None,
        preprocessing=saved.preprocessing,
    )
    wanted.derived_from = saved.derived_from
    return wanted


def fit_first_conv(kernel: jax.Array, in_chans: int) -> jax.Array:
    """An RGB kernel [h, w, 3, o] for images of ``in_chans`` channels.

    One channel gets the sum over RGB, so that a grey image gives what its RGB copy gave. Other numbers
    repeat R, G, B and scale by ``3 / in_chans``, which keeps the size of the output.
    """
    if in_chans == 1:
        return kernel.sum(2, keepdims=True)
    repeats = -(-in_chans // 3)
    return jnp.tile(kernel, (1, 1, repeats, 1))[:, :, :in_chans] * (3 / in_chans)
