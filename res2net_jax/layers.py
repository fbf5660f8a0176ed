"""The layers with weights that a Res2Net is made of, each equal to its torch.nn namesake; images are NHWC.

A layer declares its weights as ``jax.ShapeDtypeStruct``; :func:`res2net_jax.create` and
:func:`res2net_jax.load` put the arrays in. Padding is always explicit: XLA's ``"SAME"`` pads the
other side than torch at stride 2 on even sizes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from res2net_jax import alignment, convolution


def common_type(*dtypes: jnp.dtype) -> jnp.dtype:
    """JAX's usual common type, also where its user has set ``jax_numpy_dtype_promotion="strict"``."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(*dtypes)


class Conv(nnx.Module):
    """A square convolution (torch.nn.Conv2d), by default without bias; ``kernel`` in HWIO.

    Padding is ``dilation * (kernel_size - 1) // 2`` on every side, which keeps the size at stride 1.
    Computes in ``dtype``, by default the common type of images and kernel.
    """

    def __init__(
        self,
        in_features,
        out_features,
        kernel_size,
        *,
        stride=1,
        dilation=1,
        groups=1,
        bias=False,
        splits=(None, None),
        dtype=None,
        param_dtype,
    ):
        shape = (kernel_size, kernel_size, in_features // groups, out_features)
        self.kernel = nnx.Param(jax.ShapeDtypeStruct(shape, param_dtype))
        self.bias = nnx.Param(jax.ShapeDtypeStruct((out_features,), param_dtype)) if bias else None
        self.stride = stride
        self.dilation = dilation
        self.groups = groups
        self.splits = splits
        self.dtype = dtype
        self.deterministic = False  # as a module is told that it is not in training
        self.convolve = None  # set by res2net_jax.compile
        self.columns = None  # set by res2net_jax.compile where they are taken together
        self.more_kernels = None  # the further pieces, where res2net_jax.compile has cut the kernel
        self.folded_from = None  # the kernel's type, where res2net_jax.fuse has made it a wider one

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        dtype = self.dtype or common_type(x.dtype, self.folded_from or self.kernel.dtype)
        if self.columns:
            return convolution.in_columns(x.astype(dtype), *self.weights(dtype), self.columns)
        kernel, bias = self.weights(dtype)
        x = x.astype(dtype)
        if self.more_kernels:
            more = [piece.get_value().astype(dtype) for piece in self.more_kernels]
            out = convolution.in_pieces(x, [kernel, *more], stride=self.stride)
        else:
            convolve = self.convolve or (convolution.direct if self.deterministic else convolution.for_training)
            out = convolve(x, kernel, stride=self.stride, dilation=self.dilation, groups=self.groups)
        return out if bias is None else out + bias

    def set_view(self, deterministic: bool | None = None) -> None:
        """What ``flax.nnx.view`` calls.

        Args:
            deterministic: if True, convolves as is fastest without gradients.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def weights(self, dtype: jnp.dtype) -> tuple[Float[Array, "k k i2 o2"], Float[Array, " o2"] | None]:
        """Kernel and bias as it computes with them: in ``dtype``, their splits padded (``res2net_jax.alignment``)."""
        to, (before, after) = alignment.multiple(dtype), self.splits
        kernel = alignment.pad(alignment.pad(self.kernel[...].astype(dtype), before, to, axis=-2), after, to)
        return kernel, None if self.bias is None else alignment.pad(self.bias[...].astype(dtype), after, to)


class BatchNorm(nnx.Module):
    """Batch normalisation as torch.nn.BatchNorm2d: eps 1e-5, momentum 0.1.

    In training it normalises by the batch's biased variance and moves the running variance towards
    the unbiased one. Statistics are float32 (float64 in a float64 model) whatever the compute
    ``dtype``, and the variance is taken about the mean, on one GPU about the first pixel:
    E[x^2] - E[x]^2 cancels on inputs with a large mean.

    With ``group_size`` n each n consecutive images of a training batch are normalised by themselves,
    and the first group moves the running statistics: what torch.nn.DataParallel does with n images
    a device. ``model.set_attributes(group_size=n)`` sets it throughout a model.
    """

    eps = 1e-5
    momentum = 0.1

    def __init__(self, features, *, splits=None, dtype=None, param_dtype):
        weights = jax.ShapeDtypeStruct((features,), param_dtype)
        statistics = jax.ShapeDtypeStruct((features,), common_type(param_dtype, jnp.float32))
        self.scale = nnx.Param(weights)
        self.bias = nnx.Param(weights)
        self.mean = nnx.BatchStat(statistics)
        self.var = nnx.BatchStat(statistics)
        self.dtype = dtype
        self.use_running_average = False
        self.group_size = None
        self.splits = splits
        self.folded = False  # into the convolution before it, by res2net_jax.fuse

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        if self.folded:
            return x
        out_dtype = self.dtype or common_type(x.dtype, self.scale.dtype)
        shape = x.shape
        x = x.astype(common_type(x.dtype, self.mean.dtype))
        scale, bias = self._padded(self.scale, x), self._padded(self.bias, x)
        if self.use_running_average:
            mean, var = self._padded(self.mean, x), self._padded(self.var, x)
            y = (x - mean) * (scale * lax.rsqrt(var + self.eps)) + bias
        else:
            x = self._in_groups(x)
            y = _normalize(x, *self._batch_statistics(lax.stop_gradient(x)), scale, bias, self.eps)
        return y.astype(out_dtype).reshape(shape)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What ``flax.nnx.view`` calls.

        Args:
            use_running_average: if True, normalises by the running statistics, not by the batch's.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _padded(self, weights, x):
        """``weights`` in the type of ``x``, with as many zeros in each split (``res2net_jax.alignment``)."""
        return alignment.pad(weights[...].astype(x.dtype), self.splits, x.shape[-1] // (self.splits or 1))

    def _in_groups(self, x):
        if not len(x):
            raise ValueError("training-mode batch normalisation needs images; got a batch of none")
        size = self.group_size or len(x)
        if len(x) % size:
            raise ValueError(f"a batch of {len(x)} images cannot be cut into groups of {size} (BatchNorm's group_size)")
        return x.reshape(-1, size, *x.shape[1:])

    def _batch_statistics(self, x: Float[Array, "g n h w c"]):
        """Mean and biased variance of each group, of shape [g, 1, 1, 1, c]; updates the running ones."""
        count = x[0].size // x.shape[-1]
        if count == 1:
            raise ValueError(
                f"training-mode batch normalisation needs more than one value per channel; got {x.shape[1:]}. "
                "Use a larger batch or image, or model.eval()"
            )
        mean, var = _moments(x)
        for running, batch in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            before = running.get_value()
            batch = alignment.cut(batch[0, 0, 0, 0], self.splits, before.shape[-1])
            # Not running[...] = : Flax then asks for the array's sharding, for which JAX searches all that was traced
            # so far. To trace a training step of 50 layers takes 2.8 s instead of 5.4, of 101 layers 4.5 instead of 20.
            running.set_value(before + self.momentum * (batch.astype(running.dtype) - before))
        return mean, var


def _moments(x):
    """Mean and biased variance of each group of ``x`` [g, n, h, w, c], of shape [g, 1, 1, 1, c]."""
    if _on_one_gpu():
        return _moments_in_one_pass(x)
    # XLA:CPU takes what is done to each value into its sums, unless others use that too: then it is written to memory
    # first. Hence x in another shape for each: a training step of res2net50_48w_2s in 655 ms instead of 683.
    pixels = x.reshape(len(x), -1, x.shape[-1])
    mean = pixels.mean(1)
    var = jnp.square(pixels - mean[:, None]).mean(1)
    return mean[:, None, None, None], var[:, None, None, None]


def _moments_in_one_pass(x):
    """:func:`_moments`, reading ``x`` once where that reads it twice.

    About the first pixel, for E[x^2] - E[x]^2 cancels on inputs with a large mean (Chan, Golub & LeVeque 1983); of a
    first pixel 10 standard deviations off the mean float32 loses 2e-6 of the variance, of one 100 off 1e-3.
    """
    first = x[:, :1, :1, :1]
    pixels = (x - first).reshape(*x.shape[:2], -1, x.shape[-1])
    axis = 2 if _is_short(x) else (1, 2)
    mean, square = pixels.mean(axis, keepdims=True), jnp.square(pixels).mean(axis, keepdims=True)
    if _is_short(x):
        mean, square = (values.mean(1, keepdims=True) for values in lax.optimization_barrier((mean, square)))
    var = jnp.maximum(square - jnp.square(mean), 0)  # of ten million pixels and more, rounding could exceed it
    return first + mean[..., None, :], var[..., None, :]


def _on_one_gpu():
    """With many, the first pixel would be sent to all before anything is summed."""
    return jax.default_backend() == "gpu" and jax.device_count() == 1


def _is_short(x):
    """Whether a GPU should sum each image of ``x`` [g, n, h, w, c] first, since XLA has few cores sum 4096 rows."""
    return _on_one_gpu() and x[0, ..., 0].size <= 4096


def _of_each_image(values, x):
    """``values`` [g, 1, 1, 1, c] for each image of ``x``, whose gradient sums each image first; see _is_short."""
    if not _is_short(x):
        return values
    return lax.optimization_barrier(jnp.broadcast_to(values, (*x.shape[:2], 1, 1, x.shape[-1])))


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _normalize(x, mean, var, scale, bias, eps):
    """``x`` [g, n, h, w, c] normalised by its own ``mean`` and ``var`` [g, 1, 1, 1, c], then scaled and shifted."""
    return (x - mean) * (scale * lax.rsqrt(var + eps)) + bias


@_normalize.defjvp
def _normalize_jvp(eps, primals, tangents):
    # Differentiated by hand through mean and var, which are functions of x: transposed, this is two
    # reductions and one elementwise pass (Ioffe & Szegedy 2015, section 3), where automatic
    # differentiation of the statistics makes twice as many: 13 ms instead of 63, forward and backward,
    # of [8, 56, 56, 256] on two cores.
    x, *statistics, scale, bias = primals
    x_dot, _, _, scale_dot, bias_dot = tangents
    # Computed from x again (XLA merges both): what was given went through stop_gradient, so that second derivatives
    # would lack a part.
    mean, var = _moments(x)
    inverse = lax.rsqrt(var + eps)
    # Scaled before the means, not after: transposed, these are then the sums that are the gradients of scale and bias.
    x_dot = x_dot * (inverse * scale)
    shift, slope = (-values.mean((1, 2, 3), keepdims=True) for values in (x_dot, (x - mean) * x_dot))
    slope, shift = _of_each_image(inverse**2 * slope + inverse * scale_dot, x), _of_each_image(shift + bias_dot, x)
    along = (_rows(x) - _rows(mean)) * _rows(slope)  # see _moments
    return _normalize(x, *statistics, scale, bias, eps), x_dot + shift + along.reshape(x.shape)


def _rows(x):
    """[g, n, h, w, c] as [g, n, h * w, c]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def is_in_train_mode(module: nnx.Module) -> bool:
    """Whether any of its norms goes by the batch."""
    norms = [part for _, part in nnx.iter_modules(module) if isinstance(part, BatchNorm)]
    return not all(norm.folded or norm.use_running_average for norm in norms)


class Linear(nnx.Module):
    """A fully-connected layer (torch.nn.Linear), ``kernel`` of shape [in, out]."""

    def __init__(self, in_features, out_features, *, dtype=None, param_dtype):
        self.kernel = nnx.Param(jax.ShapeDtypeStruct((in_features, out_features), param_dtype))
        self.bias = nnx.Param(jax.ShapeDtypeStruct((out_features,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        dtype = self.dtype or common_type(x.dtype, self.kernel.dtype)
        return x.astype(dtype) @ self.kernel[...].astype(dtype) + self.bias[...].astype(dtype)
