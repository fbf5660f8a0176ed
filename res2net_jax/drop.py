"""Regularisation that drops parts of a network in training; nothing in eval mode or at rate 0.

The random key comes with the call, ``model(x, key=key)``, so that a training step stays a pure function.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class _Drop(nnx.Module):
    def __init__(self, rate: float):
        self.rate = float(rate)
        self.deterministic = False

    def set_view(self, deterministic: bool | None = None) -> None:
        """What ``flax.nnx.view`` calls.

        Args:
            deterministic: if True, drops nothing.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(self, x: Array, key: jax.Array | None) -> Array:
        if self.deterministic or not self.rate:
            return x
        if key is None:
            raise ValueError(
                f"a model in train mode with {type(self).__name__} at rate {self.rate} needs a random key: "
                "model(x, key=jax.random.key(seed)), another one each step; or call model.eval()"
            )
        return self.drop(x, key)


class Dropout(_Drop):
    """torch.nn.Dropout: zeroes single values and divides the others by ``1 - rate``."""

    def drop(self, x, key):
        keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0)


class DropPath(_Drop):
    """timm's DropPath: zeroes a residual branch for whole images (Huang et al. 2016, "Stochastic depth")."""

    def drop(self, x, key):
        keep = jax.random.bernoulli(key, 1 - self.rate, (len(x), 1, 1, 1))
        return jnp.where(keep, x / (1 - self.rate), 0)


class DropBlock(_Drop):
    """timm's DropBlock2d: zeroes squares of all channels (Ghiasi et al. 2018, "DropBlock", algorithm 1).

    What is kept is divided by the share that was kept, over the whole batch.
    """

    def __init__(self, rate: float, *, block_size: int, gamma_scale: float):
        super().__init__(rate)
        self.block_size = block_size
        self.gamma_scale = gamma_scale

    def drop(self, x: Float[Array, "b h w c"], key):
        batch, height, width, _ = x.shape
        rows, columns = min(self.block_size, height), min(self.block_size, width)
        centres = (height - rows + 1) * (width - columns + 1)
        gamma = self.gamma_scale * self.rate * height * width / (rows * columns) / centres
        seeds = jax.random.bernoulli(key, gamma, (batch, height, width, 1)).astype(x.dtype)
        # An even window reaches one further down and right.
        pads = [(0, 0), ((rows - 1) // 2, rows // 2), ((columns - 1) // 2, columns // 2), (0, 0)]
        dropped = jax.lax.reduce_window(seeds, -jnp.inf, jax.lax.max, (1, rows, columns, 1), (1, 1, 1, 1), pads)
        keep = 1 - dropped
        return x * keep * (keep.size / (keep.sum(dtype=jnp.float32) + 1e-7)).astype(x.dtype)
