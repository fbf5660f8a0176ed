"""SGD as torch.optim.SGD does it, and the learning rate over the steps."""

import math

import jax
import jax.numpy as jnp
import optax

from res2net_jax.groups import layer_scales
from res2net_jax.model import Res2Net
from train.config import Config


def make_optimizer(config: Config, model: Res2Net) -> optax.GradientTransformation:
    """Gradients -> update directions, before the learning rate: ``params -= lr * direction``.

    In torch's order (torch.optim.SGD): clip, add ``weight_decay * parameter``, momentum. A dampening
    or a decoupled decay it has not. Layer-wise decay scales a direction as a smaller learning rate
    of that layer would.

    Args:
        config: The run's config.
        model: Whose parameters, or some of them, are optimised, in flat dicts under their paths.
    """
    chain = []
    if config.clip_norm is not None:
        chain.append(_clip(config.clip_norm))
    if config.weight_decay:
        mask = None if config.decay_all else lambda params: {path: p.ndim > 1 for path, p in params.items()}
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    if config.momentum:
        chain.append(optax.trace(config.momentum, nesterov=config.nesterov))
    if config.layer_decay is not None:
        chain.append(_scale_by(layer_scales(model, config.layer_decay)))
    return optax.chain(*chain) if chain else optax.identity()


def learning_rate(config: Config, step: jax.Array | int, steps_per_epoch: int) -> jax.Array:
    """The learning rate of ``step`` (from 0).

    ``"steps"`` is the official ``lr * 0.1 ** (epoch // decay_epochs)``. ``"cosine"`` falls over the steps that
    warm-up leaves (Loshchilov & Hutter 2017, no restarts), to 0 after the last one.
    """
    step, dtype = jnp.asarray(step), jnp.promote_types(config.dtype, jnp.float32)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch
    if config.schedule == "steps":
        lr = config.peak_lr * jnp.asarray(0.1, dtype) ** (step // steps_per_epoch // config.decay_epochs)
    else:
        done = jnp.minimum((step - warmup).astype(dtype) / (total - warmup), 1)
        lr = config.peak_lr * 0.5 * (1 + jnp.cos(done * math.pi))
    return jnp.where(step < warmup, config.peak_lr * (step + 1).astype(dtype) / max(warmup, 1), lr)


def _clip(most):
    def clip(updates, params):
        # As torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm; optax.clip_by_global_norm does not.
        factor = jnp.minimum(1, most / (optax.global_norm(updates) + 1e-6))
        return jax.tree.map(lambda u: u * factor, updates)

    return optax.stateless(clip)


def _scale_by(factors):
    return optax.stateless(lambda updates, params: {path: u * factors[path] for path, u in updates.items()})
