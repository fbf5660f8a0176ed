"""A trained model for inference alone: BatchNorm folded into the convolutions, compiled for its backend."""

import functools
import weakref
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from res2net_jax import alignment, backend, convolution, microbatch, per_core
from res2net_jax.checks import require_array
from res2net_jax.features import FeaturePyramid
from res2net_jax.folding import fold
from res2net_jax.init import require_model, variables
from res2net_jax.layers import BatchNorm, Conv, Linear, is_in_train_mode
from res2net_jax.model import Res2Net


def fuse(model: Res2Net | FeaturePyramid) -> Res2Net | FeaturePyramid:
    """``model`` with each BatchNorm folded into the convolution before it; the same function, to rounding.

    Args:
        model: In eval mode; also one of ``features_only=True``. It is not changed, and shares what is not folded.

    Returns:
        A model for inference alone, which cannot be trained, saved or exported; for speed
        :func:`compile` the one it was made from.

    Raises:
        ValueError: ``model`` is in train mode.
    """
    if isinstance(model, FeaturePyramid):
        pyramid = nnx.clone(model)
        pyramid.backbone = fuse(model.backbone)
        return pyramid
    return _fused(model, layout=lambda conv: "HWIO")


def _fused(model, layout):
    """:func:`fuse`, with each kernel in the ``layout`` of its convolution."""
    require_model(model)
    _require_eval(model)
    fused = nnx.clone(model)
    pairs = _foldable(fused)
    layouts = [layout(conv) for conv, _ in pairs]
    folded = fold([_weights(conv, bn) for conv, bn in pairs], layouts)
    for (conv, bn), layout, ((kernel, *more), bias) in zip(pairs, layouts, folded):
        conv.folded_from = conv.kernel.dtype
        conv.kernel = nnx.Param(kernel)
        if layout == "WIHO":
            conv.convolve = convolution.columns_first
        if more:
            conv.more_kernels = nnx.data(nnx.List([nnx.Param(kernel) for kernel in more]))
        conv.bias = nnx.data(nnx.Param(bias))
        bn.folded = True  # it then passes its input on
        for name in ("scale", "bias", "mean", "var"):
            delattr(bn, name)
    return fused


def compile(
    model: Res2Net | FeaturePyramid,
) -> Callable[[Float[Array, "b h w c"]], Float[Array, "b k"] | list[Float[Array, "b h2 w2 f"]]]:
    """The fast way to run a model: fused, compiled with its backend's options, called without looking at the module.

    Compiled once for every shape of images. On a CPU its 3x3 convolutions are computed in other ways than the plain one
    and its large kernels in pieces (``res2net_jax.convolution``), equal but for rounding, and its stages take a few
    images at a time (``res2net_jax.microbatch``). Of two cores each takes half of an even batch of large pictures, and
    such a call returns when the answer is there (``res2net_jax.per_core``). On a GPU, in 16-bit numbers, its splits are
    padded with zeros to what the tensor cores take (``res2net_jax.alignment``). The weights stay where they are: for
    several devices load the model with a ``sharding`` and pass images that are sharded over the batch, on a mesh of
    automatic or explicit axes.

    Args:
        model: In eval mode; also one of ``features_only=True``, or of a class of your own whose stages treat each
            image by itself. Later changes of its weights have no effect.

    Returns:
        Images [b, h, w, c], as the model takes them, -> what ``model(images)`` gives. Also within ``jax.jit``,
        ``jax.grad`` and the like, where it is compiled without the options.

    Raises:
        ValueError: ``model`` is in train mode. What is returned raises what a call of the model does.
        TypeError: ``model`` is neither; or a pyramid of a class of your own with another ``__call__``.
    """
    if isinstance(model, FeaturePyramid):
        if type(model).__call__ is not FeaturePyramid.__call__:
            kind = type(model).__name__
            raise TypeError(f"{kind} has a __call__ of its own, which compile would not run; use jax.jit(fuse(model))")
        return compile_function(_maps_at(model.out_indices), model.backbone)
    return compile_function(type(model).__call__, model)


def compile_function(function: Callable, model: Res2Net) -> Callable:
    """As :func:`compile`, for what ``function(model, images)`` gives."""
    graphdef, structure, leaves = _prepare(model)
    run, channels = _program(function, graphdef, structure, microbatch.in_turns), model.in_chans
    halves = per_core.Halves(_program(function, graphdef, structure, microbatch.on_one_core), leaves)
    is_ours = type(model) is Res2Net  # another class may look at the whole batch
    weights_are_traced = backend.is_traced(leaves)

    def call(images):
        require_array(images)
        if is_ours and halves.take(images) and images.shape[-1] == channels:
            return halves(images)
        # Not the weights anew: to look at hundreds of leaves takes 0.03 ms.
        alone = not weights_are_traced and not backend.is_traced(images)
        try:
            return (run.alone if alone else run)(leaves, images)
        except ValueError as error:
            if "incompatible devices" not in str(error):
                raise
            raise ValueError(
                "the images are on other devices than the weights; give load a sharding=, or compile "
                "jax.device_put(model, sharding), so that both are on one mesh"
            ) from error

    return call


def program(function: Callable, model: Res2Net) -> tuple[Callable, list[Array]]:
    """The jitted ``(weights, images) -> function(model, images)`` for a whole batch, and the weights."""
    graphdef, structure, leaves = _prepare(model)
    return _program(function, graphdef, structure, microbatch.in_turns), leaves


def _prepare(model):
    """``model`` for inference alone: how it is made of flat arrays, and those."""
    fused = _fused(model, _layout)
    cast_weights(fused)
    for _, module in nnx.iter_modules(fused):
        if isinstance(module, Conv) and module.convolve is not convolution.columns_first:
            module.convolve = convolution.for_inference
    if jax.default_backend() == "gpu":
        _turn_kernels(fused)
    graphdef, state = nnx.split(fused)
    leaves, structure = jax.tree.flatten(state)
    shared = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))}  # and gone, should a training step donate them
    leaves = [_copy(leaf) if id(leaf) in shared else leaf for leaf in leaves]
    return graphdef, structure, leaves


def compiled(model: Res2Net) -> Callable[[Float[Array, "b h w c"]], Float[Array, "b k"]]:
    """:func:`compile`, once for ``model`` as it is; for other weights anew, but with the same program."""
    graphdef, state = nnx.split(model)
    leaves = jax.tree.leaves(state)
    seen, references, run = _COMPILED.get(model, (None, (), None))
    same = zip(references, leaves, strict=True)  # numpy's arrays may change in place
    if seen != graphdef or any(reference() is not leaf or not isinstance(leaf, jax.Array) for reference, leaf in same):
        run = compile(model)
        _COMPILED[model] = graphdef, [weakref.ref(leaf) for leaf in leaves], run
    return run


def cast_weights(model: Res2Net) -> None:
    """Casts the weights of convolutions and the classifier to what they compute in, and pads them, as calls would."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Conv):
            # On a GPU those of 16 bits are for images of 16 bits, whose tiles they are padded to.
            narrow = module.folded_from if jax.default_backend() == "gpu" else None
            kernel, bias = module.weights(module.dtype or narrow or module.kernel.dtype)
            module.kernel.set_value(kernel)
            if bias is not None:
                module.bias.set_value(bias)
        if isinstance(module, Linear) and module.dtype is not None:
            for leaf in variables(module).values():
                leaf.set_value(leaf.get_value().astype(module.dtype))


def _turn_kernels(model):
    """Puts kernels into the order and the width that cuDNN is fastest with."""
    for _, module in nnx.iter_modules(model):
        if type(module) is not Conv or module.kernel.shape[0] == 1 or module.kernel.shape[2] <= 4:
            continue  # a matrix, the stem's, or of a class that has ways of its own
        kernel = module.kernel.get_value()
        plain = len(kernel) == 3 and module.stride == module.dilation == module.groups == 1
        if plain and kernel.shape[2] <= 16 and module.bias is not None and alignment.multiple(kernel.dtype) > 1:
            module.columns = 4
            kernel = convolution.widen(kernel, module.columns)
            module.bias.set_value(jnp.tile(module.bias.get_value(), module.columns))
        module.kernel.set_value(kernel.transpose(3, 0, 1, 2))
        module.convolve = convolution.out_first
        module.splits = (None, None)  # padded already


def _layout(conv):
    """How :mod:`res2net_jax.convolution` takes its kernel fastest on a CPU; as measured on two cores with AVX-512.

    In pieces (``in_pieces``) a 1x1 one of a MB or more (stages 3 and 4) and a 3x3 one of 200 channels (stage 4): at
    batch 1 the products of res2net50_14w_8s take 18 % less time in the last stage (49 pixels) and 8 % in the one
    before, 3x3 convolutions of 208 channels there 20 %. A narrow one with its columns first (``by_rows``), or every
    call would transpose it. That of another class, which may have a way of its own, as it is.
    """
    kernel = conv.kernel.get_value()
    size, features = kernel.shape[1:3]
    dtype = jnp.dtype(kernel.dtype if conv.dtype is None else conv.dtype)
    if jax.default_backend() != "cpu" or type(conv) is not Conv or conv.groups > 1 or dtype.itemsize < 4:
        return "HWIO"
    is_plain_3x3 = size == 3 and conv.stride == conv.dilation == 1
    is_large = kernel.size >= 2**18 if size == 1 else is_plain_3x3 and features >= 200
    several_threads = jax.device_count() == 1 and backend.cores() > 1
    if is_large and several_threads and dtype == kernel.dtype:
        return "pieces"
    return "WIHO" if is_plain_3x3 and features <= 64 else "HWIO"


@functools.cache  # for the programs of one function are kept, not those of equal ones
def _maps_at(indices):
    return lambda backbone, images: backbone.forward_intermediates(images, indices, stop_early=True)[1]


_COMPILED = weakref.WeakKeyDictionary()


@functools.lru_cache(maxsize=16)
def _program(function, graphdef, structure, over_batch):
    # Blocks that differ in their weights alone are traced and lowered once.
    @functools.partial(jax.jit, static_argnums=0)
    def call_block(graphdef, state, x, key):
        return nnx.merge(graphdef, state)(x, key)

    # Of the flat arrays: a call of 300 of them costs 0.13 ms, of jax.jit with the module as its argument 4.6 ms.
    def run(leaves, images):
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        model.over_batch = over_batch
        model.call_block = lambda block, x, key: call_block(*nnx.split(block), x, key)
        return function(model, images)

    # The cache of compiled programs tells them apart by their names too, but not by how many threads they are for.
    run.__name__ = "run" if over_batch is microbatch.in_turns else "run_on_one_core"
    return backend.jit(_under_automatic_axes(run))


def _under_automatic_axes(run):
    """``run`` also for a mesh of explicit axes, ``jax.make_mesh``'s own: its outputs are sharded as the batch is.

    JAX refuses there much of what is fast: to slice, reshape or loop over what is sharded.
    """

    @functools.wraps(run)
    def call(leaves, images):
        explicit, images = jax.sharding.AxisType.Explicit, jnp.asarray(images)
        meshes = [jax.typeof(array).sharding.mesh for array in (images, *leaves)]
        mesh = next((mesh for mesh in meshes if explicit in mesh.axis_types), None)
        if mesh is None:
            return run(leaves, images)
        axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == explicit)
        batch = jax.P(*jax.typeof(images).sharding.spec[:1])
        automatic = jax.sharding.auto_axes(run, axes=axes, out_sharding=jax.NamedSharding(mesh, batch))
        return automatic(leaves, images)

    return call


def _copy(leaf):
    """Without a program, for one would have to be compiled; but what numpy holds, device_put takes as it is."""
    return jax.device_put(leaf, may_alias=False) if isinstance(leaf, jax.Array) else jnp.array(leaf)


def _foldable(model):
    """Each convolution of ``model`` with the BatchNorm right after it."""
    pairs = []
    for module in (model, *(block for stage in model.stages for block in stage)):
        for row in (layers for layers in vars(module).values() if isinstance(layers, nnx.List)):
            pairs += zip(row, list(row)[1:])
        for conv, bn in (("conv1", "bn1"), ("conv3", "bn3")):
            if hasattr(module, conv):
                last = getattr(module, conv)
                pairs.append((last[-1] if isinstance(last, nnx.List) else last, getattr(module, bn)))
        if hasattr(module, "convs"):
            pairs += zip(module.convs, module.bns)
    return [(conv, bn) for conv, bn in pairs if isinstance(conv, Conv) and isinstance(bn, BatchNorm) and not bn.folded]


def _weights(conv, bn):
    bias = None if conv.bias is None else conv.bias[...]
    return conv.kernel[...], bias, bn.scale[...], bn.bias[...], bn.mean[...], bn.var[...]


def _require_eval(model):
    if is_in_train_mode(model):
        raise ValueError("this model is in train mode, whose norms depend on the batch; call model.eval()")
