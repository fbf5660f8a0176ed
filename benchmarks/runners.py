"""One callable per library and task, compiled and warm, that returns when its result is there."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timm
import torch
from flax import nnx

import res2net_jax
from res2net_jax.backend import compiler_options

Run = Callable[[], object]
ON_GPU = torch.cuda.is_available()
THREADS = torch.get_num_threads()
LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-4


def images_and_labels(batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, 224, 224, 3), np.float32), rng.integers(0, 1000, batch)


def ours_inference(name: str, batch: int) -> Run:
    dtype = jnp.bfloat16 if ON_GPU else None
    compiled = res2net_jax.compile(res2net_jax.create(name, dtype=dtype).eval())
    images = jax.device_put(images_and_labels(batch)[0])
    return lambda: compiled(images).block_until_ready()


def timm_inference(name: str, batch: int, *, compiled: bool) -> Run:
    model, images, _ = _timm(name, batch)
    model.eval()
    forward = _compile(model) if compiled else model

    @torch.inference_mode()
    def run():
        with _autocast():
            forward(images)
        _synchronise()

    return run


def ours_train(name: str, batch: int) -> Run:
    """Forward, backward, and SGD with momentum and weight decay."""
    step, state, images_and_labels = train_step(name, batch)

    def run():
        *state[:], loss = step(*state, *images_and_labels)
        loss.block_until_ready()

    return run


def train_step(name: str, batch: int) -> tuple[jax.stages.Wrapped, list, tuple[jax.Array, jax.Array]]:
    """``step(*state, *batch) -> (*state, loss)``, jitted, the state donated; with a first state and a batch."""
    model = res2net_jax.create(name, dtype=jnp.bfloat16 if ON_GPU else None)
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


def timm_train(name: str, batch: int, *, compiled: bool) -> Run:
    model, images, labels = _timm(name, batch)
    model.train()
    forward = _compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def run():
        optimizer.zero_grad()
        with _autocast():
            loss = torch.nn.functional.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        loss.item()
        _synchronise()

    return run


def _compile(model):
    # What torch compiled for another row would make it compile this one for any batch size, then not at all.
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


def _timm(name, batch):
    device = "cuda" if ON_GPU else "cpu"
    images, labels = images_and_labels(batch)
    model = timm.create_model(name).to(device, memory_format=torch.channels_last)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device, memory_format=torch.channels_last)
    return model, tensor, torch.from_numpy(labels).to(device)


def _autocast():
    return torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU)


def _synchronise():
    if ON_GPU:
        torch.cuda.synchronize()
