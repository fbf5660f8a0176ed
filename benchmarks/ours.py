"""Our runners: one callable per task, compiled and warm, that returns when its result is there."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import res2net_jax
from res2net_jax.backend import compiler_options

Run = Callable[[], object]
LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4


def images_and_labels(batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, 224, 224, 3), np.float32), rng.integers(0, 1000, batch)


def inference(name: str, batch: int) -> Run:
    compiled = res2net_jax.compile(create(name).eval())
    images = jax.device_put(images_and_labels(batch)[0])
    return lambda: compiled(images).block_until_ready()


def train(name: str, batch: int) -> Run:
    """Forward, backward, and SGD with momentum and weight decay."""
    step, state, images_and_labels = train_step(name, batch)

    def run():
        *state[:], loss = step(*state, *images_and_labels)
        loss.block_until_ready()

    return run


def create(name: str) -> res2net_jax.Res2Net:
    """bfloat16 on a GPU. No weights are zero: a device computes zeros with less power, hence faster.

    ``resnet50`` is a Res2Net of one split.
    """
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else None
    arch = {}
    if name == "resnet50":
        name, arch = "res2net50_26w_4s", {"scale": 1, "base_width": 64}
    return res2net_jax.create(name, dtype=dtype, zero_init_last=False, **arch)


def train_step(name: str, batch: int) -> tuple[jax.stages.Wrapped, list, tuple[jax.Array, jax.Array]]:
    """``step(*state, *batch) -> (*state, loss)``, jitted, the state donated; with a first state and a batch."""
    model = create(name)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    (params, shape), (stats, stats_shape) = jax.tree.flatten(params), jax.tree.flatten(stats)
    optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LR, MOMENTUM))

    @jax.jit(donate_argnums=(0, 1, 2), compiler_options=compiler_options())
    def step(params, stats, moments, images, labels):
        def loss_fn(params):
            merged = nnx.merge(graphdef, shape.unflatten(params), stats_shape.unflatten(stats), copy=True)
            logits = merged(images).astype(jnp.float32)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, jax.tree.leaves(nnx.state(merged, nnx.BatchStat))

        (loss, stats_), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), stats_, moments, loss

    state = [params, stats, optimizer.init(params)]
    return step, state, tuple(map(jax.device_put, images_and_labels(batch)))
