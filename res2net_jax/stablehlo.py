"""A model as StableHLO (jax.export): JAX runs it without this library, on a CPU, a GPU or a TPU, at any batch size.

The file holds the fused model. What ``jax.default_matmul_precision`` says when it is written travels with it; compiler
options do not: whoever runs it says what to tell XLA.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from res2net_jax.backend import jit
from res2net_jax.features import FeaturePyramid, backbone_of
from res2net_jax.fusion import cast_weights, fuse
from res2net_jax.init import variables
from res2net_jax.model import Res2Net
from res2net_jax.variants import Preprocessing

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".stablehlo"

Images = Float[Array, "b h w c"] | UInt8[Array, "b h w c"]


def load(
    file: str | os.PathLike,
) -> Callable[[Images], Float[Array, "b k"] | list[Float[Array, "b h2 w2 f"]]]:
    """What a ``.stablehlo`` file computes, compiled once for every batch size.

    Weights beside the file are read from there. Without this library it is
    ``jax.jit(jax.export.deserialize(data).call)(images)``, with ``safetensors.flax.load_file(...)`` as the first
    argument if the weights are beside.

    Raises:
        FileNotFoundError: There is no such file, or the weights beside it are not there.
        ValueError: It is no such file, damaged, or written by a JAX newer than this one.
    """
    exported = read(file)
    run = jit(exported.call)
    if len(exported.in_avals) == 1:
        return run
    import safetensors.flax

    beside = weights_file(Path(file).expanduser())
    if not beside.is_file():
        raise FileNotFoundError(f"{file} takes its weights from {beside}, which is not there")
    weights = safetensors.flax.load_file(beside)
    return lambda images: run(weights, images)


def read(file: str | os.PathLike) -> jax.export.Exported:
    """The artefact in ``file``. Errors as of :func:`load`."""
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    newest = jax.export.maximum_supported_calling_convention_version
    try:
        exported = jax.export.deserialize(file.read_bytes())
        convention = exported.calling_convention_version
        if convention <= newest:
            exported.mlir_module()  # parses the program, which JAX would put off until the first call
    except ImportError:  # of flatbuffers, which JAX does not ask for
        raise
    except Exception as error:  # flatbuffers, MLIR and JAX each raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file} is damaged, no StableHLO artefact, or one of a JAX newer than {jax.__version__}, which is "
            f"installed here; upgrade JAX, or export the model again: {reason:.200}"
        ) from error
    if convention > newest:
        raise ValueError(
            f"{file} was written by a newer JAX (calling convention {convention}; JAX {jax.__version__} reads up to "
            f"{newest}); upgrade JAX, or export the model again with this one"
        )
    return exported


def write(
    model: Res2Net | FeaturePyramid,
    file: Path,
    *,
    dtype: jnp.dtype,
    size: tuple[int, int],
    scaling: Preprocessing | None,
    beside: bool,
) -> None:
    """Writes ``model`` to ``file``.

    Args:
        model: In eval mode.
        file: The artefact; weights that are kept beside go to :func:`weights_file`.
        dtype: Computation type. The outputs are float32 whatever it is.
        size: Height and width of the images.
        scaling: Mean and standard deviation to normalise uint8 pictures by; None for images that are normalised.
        beside: Keep the weights out of the artefact, which then takes them as its first argument.
    """
    fused = fuse(model)
    fused.set_attributes(dtype=dtype)
    cast_weights(fused)
    weights = {path: leaf.get_value() for path, leaf in variables(fused).items()}
    graphdef, state = nnx.split(fused)

    def infer(weights, images):
        fused = nnx.merge(graphdef, state, copy=True)
        for path, leaf in variables(fused).items():
            leaf.set_value(weights[path])
        if scaling is not None:
            images = (images.astype(jnp.float32) / 255 - np.float32(scaling.mean)) / np.float32(scaling.std)
        return jax.tree.map(lambda output: output.astype(jnp.float32), fused(images.astype(dtype)))

    (batch,) = jax.export.symbolic_shape("b")
    shape = (batch, *size, backbone_of(model).in_chans)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if scaling else jnp.float32)
    with _without_paths():
        if beside:
            import safetensors.flax

            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
            exported = jax.export.export(jax.jit(infer), platforms=PLATFORMS)(shapes, images)
            weights_file(file).write_bytes(safetensors.flax.save(weights))
        else:
            exported = jax.export.export(jax.jit(lambda images: infer(weights, images)), platforms=PLATFORMS)(images)
    file.write_bytes(exported.serialize())


def weights_file(file: Path) -> Path:
    """Where the weights of an artefact are that holds none."""
    return file.with_suffix(".weights.safetensors")


@contextlib.contextmanager
def _without_paths():
    """An artefact says of every operation where in the source it comes from; this leaves the file names alone."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)
