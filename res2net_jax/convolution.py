"""Ways to compute a convolution that are equal but for rounding; which is the fastest depends on the backend.

All take images [b, h, w, i] and a square kernel [k, k, i, o] of the same dtype, and pad
``dilation * (k - 1) // 2`` zeros on every side.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float

from res2net_jax import alignment
from res2net_jax.winograd import tiles, winograd, winograd_in_training


def direct(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i2 o"], *, stride: int, dilation: int, groups: int
) -> Float[Array, "b h2 w2 o"]:
    """XLA's own convolution; of one pixel, a matrix product."""
    if alignment.multiple(x.dtype) > 1 and _is_stem(x, kernel, stride, dilation, groups):
        return by_depth(x, kernel)
    if (columns := _columns(x, kernel, stride, dilation, groups)) > 1:
        return by_columns(x, kernel, columns)
    size = kernel.shape[0]
    if size == 1 and groups == 1:
        # A matrix product says all there is to a 1x1 convolution, and XLA:CPU runs it faster (by default options,
        # inference at batch 8 in 0.57 s instead of 0.75, a training step in 2.9 s instead of 3.5). Of matrices, not of
        # [b, h, w, i]: the kernel's gradient would contract three axes, before which XLA:CPU transposes them.
        return _multiply(x[:, ::stride, ::stride], kernel[0, 0])
    return _padded(x, kernel, size, "HWIO", stride, dilation, groups)


def out_first(
    x: Float[Array, "b h w i"], kernel: Float[Array, "o k k i2"], *, stride: int, dilation: int, groups: int
) -> Float[Array, "b h2 w2 o"]:
    """:func:`direct`, of a kernel in OHWI: as cuDNN takes it, where every call would transpose one in HWIO."""
    return _padded(x, kernel, kernel.shape[1], "OHWI", stride, dilation, groups)


def by_depth(x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"]) -> Float[Array, "b h2 w2 o"]:
    """A convolution at stride 2 as one at stride 1 over squares of 2x2 pixels, side by side in the channels.

    Of 3 channels, 12 that zeros fill up to 16: a GPU's tensor cores take no fewer than 8 at a time.
    """
    b, h, w, features = x.shape
    taps, out_features = (kernel.shape[0] + 1) // 2, kernel.shape[-1]
    squares = x.reshape(b, h // 2, 2, w // 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    squares = squares.reshape(b, h // 2, w // 2, 4 * features)
    # The kernel's centre is the upper left pixel of a square, so its first row and column lack their first halves.
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(taps, 2, taps, 2, features, out_features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(taps, taps, 4 * features, out_features)
    pad = (taps // 2, taps - 1 - taps // 2)
    return lax.conv_general_dilated(
        alignment.pad(squares, 1, 8),
        alignment.pad(kernel, 1, 8, axis=2),
        window_strides=(1, 1),
        padding=(pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def by_columns(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], columns: int) -> Float[Array, "b h w o"]:
    """A 3x3 convolution of few channels as one of ``columns`` times as many, on a map that is narrower by as much.

    Columns side by side are channels without a copy. Of the kernel two thirds and more are then zeros, but a GPU's
    tensor cores compute a tile of 64 channels whatever is in it.
    """
    b, h, w, features = x.shape
    out = _padded(x.reshape(b, h, w // columns, columns * features), widen(kernel, columns), 3, "HWIO", 1, 1, 1)
    return out.reshape(b, h, w, kernel.shape[-1])


def widen(kernel: Float[Array, "3 3 i o"], columns: int) -> Float[Array, "3 3 i2 o2"]:
    """The kernel of :func:`by_columns`."""
    group, before, after = np.ogrid[:3, :columns, :columns]
    tap = (group - 1) * columns + before - after + 1  # that leads from one column to the other
    parts = [
        jnp.where((tap == i)[None, :, :, None, :, None], kernel[:, i, None, None, :, None, :], 0) for i in range(3)
    ]
    return sum(parts).reshape(3, 3, columns * kernel.shape[2], columns * kernel.shape[3])


def in_columns(
    x: Float[Array, "b h w i"], kernel: Float[Array, "o2 3 3 i2"], bias: Float[Array, " o2"], columns: int
) -> Float[Array, "b h w o"]:
    """:func:`by_columns` with a bias, of a kernel that is widened and turned (:func:`out_first`) already."""
    b, h, w, features = x.shape
    if w % columns:
        taps = [divmod(i - 1, columns) for i in range(3)]  # into the first of the columns
        starts = [(group + 1, column * features) for group, column in taps]
        out_features = len(bias) // columns
        kernel = jnp.stack([kernel[:out_features, :, i, j : j + features] for i, j in starts], axis=2)
        return out_first(x, kernel, stride=1, dilation=1, groups=1) + bias[:out_features]
    wide = out_first(x.reshape(b, h, w // columns, -1), kernel, stride=1, dilation=1, groups=1) + bias
    return wide.reshape(b, h, w, -1)


def in_pieces(
    x: Float[Array, "b h w i"], kernels: list[Float[Array, "1 k i _"]], *, stride: int
) -> Float[Array, "b h2 w2 o"]:
    """A 1x1 or 3x3 convolution whose kernel is cut into pieces: its rows, and of each some output channels, in order.

    XLA:CPU's products copy a matrix that several threads use into blocks first; not one that a single block spans.
    A 3x3 one is at stride 1.
    """
    if kernels[0].shape[1] == 1:
        return _multiply(x[:, ::stride, ::stride], *(kernel[0, 0] for kernel in kernels))
    count = len(kernels) // 3
    rows = [kernels[i * count : (i + 1) * count] for i in range(3)]
    if _is_worth_winograd(x):
        parts = [[_once_there_is(x, kernel)[0] for kernel in part] for part in zip(*rows)]
        return lax.concatenate([winograd(x, part) for part in parts], 3)
    neighbours = _neighbours(x)
    return _sum_of_rows(*(_multiply(neighbours, *(k.reshape(-1, k.shape[-1]) for k in row)) for row in rows))


def for_inference(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i2 o"], *, stride: int, dilation: int, groups: int
) -> Float[Array, "b h2 w2 o"]:
    """The fastest for a forward pass; on a CPU :func:`direct` wastes half of the peak on narrow splits."""
    if jax.default_backend() == "cpu" and _is_plain_3x3(x, kernel, stride, dilation, groups):
        if kernel.shape[2] <= 64:  # that the compiled model could not turn beforehand
            return columns_first(x, kernel.transpose(1, 2, 0, 3), stride=stride, dilation=dilation, groups=groups)
        if _is_worth_winograd(x):
            return winograd(x, _once_there_is(x, kernel))
    return direct(x, kernel, stride=stride, dilation=dilation, groups=groups)


def columns_first(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 i 3 o"], *, stride: int, dilation: int, groups: int
) -> Float[Array, "b h w o"]:
    """:func:`for_inference` on a CPU, of a plain narrow kernel in WIHO: as :func:`by_rows` multiplies by it."""
    if _is_worth_winograd(x):
        return winograd(x, _once_there_is(x, kernel.transpose(2, 0, 1, 3)))
    return by_rows(x, kernel)


def for_training(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i2 o"], *, stride: int, dilation: int, groups: int
) -> Float[Array, "b h2 w2 o"]:
    """The fastest with its gradients, in reverse mode: on a CPU large 3x3 ones have none in forward mode."""
    if jax.default_backend() == "cpu":
        # On many devices the 16 products of a kernel's gradient would each be summed over them. Within jax.shard_map
        # a gradient by hand would have to do that itself.
        one_device = jax.device_count() == 1 and _axis_types(x) <= {AxisType.Auto}
        if one_device and _is_plain_3x3(x, kernel, stride, dilation, groups) and _is_worth_winograd(x):
            return winograd_in_training(x, kernel)
        if _is_narrowing_1x1(x, kernel, stride, groups):
            # Its gradient as a matrix of fewer rows than columns, which XLA:CPU computes faster (over [8, 56, 56] of
            # 256 x 96 at 160 GFLOP/s, of 96 x 256 at 316): 1 % of a training step. Without the barrier, through which
            # the gradient goes too, XLA would turn it back.
            return _multiply(x, lax.optimization_barrier(kernel[0, 0].T).T)
    return direct(x, kernel, stride=stride, dilation=dilation, groups=groups)


def by_rows(x: Float[Array, "b h w i"], kernel: Float[Array, "3 i 3 o"]) -> Float[Array, "b h w o"]:
    """A 3x3 convolution, of a kernel in WIHO, as one matrix product that is three times as wide, then a sum.

    Three neighbours of a row side by side, times the kernel's three rows side by side, are what each row of
    images adds to the rows above, at and below it. Of 14 channels the product is of 42 x 42 weights, which
    fill the processor's vectors better than the 126 x 14 of a product over all nine neighbours.
    """
    features, width = kernel.shape[-1], x.shape[2]
    # Of large maps one column too many: of as many as x has, XLA:CPU would take the middle neighbours for x itself and
    # compute that, the sum of a split and the output before it, once more. Together with the sum by cases, a cascade of
    # 7 splits [2, 56, 56, 14] in 1.40 ms instead of 1.73; of smaller maps it gains nothing ([8, 14, 14, 56]: 3.3
    # instead of 3.2).
    large = min(x.shape[1:3]) > 32
    neighbours = _neighbours(x, more=large)
    rows = kernel.reshape(-1, 3 * features)
    below, at, above = jnp.split(_multiply(neighbours, rows)[:, :, :width], 3, axis=-1)
    if large:
        first, last = at[:, :1] + above[:, 1:2], below[:, -2:-1] + at[:, -1:]
        return jnp.concatenate([first, below[:, :-2] + at[:, 1:-1] + above[:, 2:], last], axis=1)
    return _sum_of_rows(below, at, above)


def _neighbours(x, more=0):
    """Each pixel of ``x`` between its left and its right one, side by side in the channels; of ``more`` columns."""
    columns = x.shape[2] + more
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1 + more), (0, 0)))
    return jnp.concatenate([padded[:, :, i : i + columns] for i in range(3)], axis=-1)


def _sum_of_rows(below, at, above):
    """Of what a row adds to the one below it, to itself, and to the one above."""
    below = jnp.pad(below[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    above = jnp.pad(above[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    return below + at + above


def _padded(x, kernel, size, order, stride, dilation, groups):
    pad = dilation * (size - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", order, "NHWC"),
        feature_group_count=groups,
    )


def _once_there_is(x, kernel):
    """``kernel``, but for the sign of its zeros, in a way that its transforms wait for ``x``.

    XLA:CPU begins with whatever is ready: it would transform the kernels of all layers first and write them to memory,
    60 MB of res2net50_26w_8s, from where they would come back one by one.
    """
    some = x[0, 0, 0, 0]
    never = (some == jnp.inf) & (some == -jnp.inf)
    return kernel + jnp.where(never, jnp.ones((), kernel.dtype), jnp.zeros((), kernel.dtype))


def _is_plain_3x3(x, kernel, stride, dilation, groups):
    """Of bfloat16 none is: what is summed before and after its products would multiply the rounding."""
    return kernel.shape[0] == 3 and stride == dilation == groups == 1 and x.dtype.itemsize >= 4


def _columns(x, kernel, stride, dilation, groups):
    """How many columns :func:`by_columns` should take together; as measured on an H200, forward and backward."""
    plain = kernel.shape[0] == 3 and stride == dilation == groups == 1
    width = x.shape[2]  # may be symbolic, in jax.export
    if alignment.multiple(x.dtype) == 1 or not plain or not _is_free(x) or not isinstance(width, int) or width < 28:
        return 1
    columns = 4 if x.shape[-1] <= 16 else 2
    return columns if x.shape[-1] <= 56 and width % columns == 0 else 1


def _is_stem(x, kernel, stride, dilation, groups):
    """On few channels, at stride 2, and with a centre that :func:`by_depth` is for (3x3, 7x7)."""
    plain = dilation == groups == 1 and stride == 2 and kernel.shape[0] % 4 == 3 and kernel.shape[2] <= 4
    return plain and _is_free(x) and all(isinstance(size, int) and size % 2 == 0 for size in x.shape[1:3])


def _is_free(x):
    """Whether the compiler places ``x``: under a mesh of explicit axes JAX refuses to reshape what is sharded."""
    return AxisType.Explicit not in _axis_types(x)


def _axis_types(x):
    return set(jax.typeof(x).sharding.mesh.axis_types)


def _is_narrowing_1x1(x, kernel, stride, groups):
    """Of enough pixels that turning its gradient costs little beside it."""
    size, _, features, out_features = kernel.shape
    return size == stride == groups == 1 and features > out_features and x.size >= 8 * features**2


def _is_worth_winograd(x):
    """Whether its products are large enough to be worth their transforms; as measured on two cores with AVX-512."""
    features, batch = x.shape[-1], x.shape[0]
    if not isinstance(batch, int):  # symbolic, in jax.export
        return False
    count = batch * math.prod(tiles(x))
    return features > 32 and count >= 64 and count * features**2 >= 1.5e6


def _multiply(x, *matrices):
    """``x`` times the matrices, side by side."""
    rows = x.reshape(-1, x.shape[-1])
    out = lax.concatenate([rows @ matrix for matrix in matrices], 1)
    return out.reshape(*x.shape[:-1], out.shape[-1])
