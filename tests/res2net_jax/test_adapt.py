"""A checkpoint that is loaded with other options than it was saved with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import res2net_jax
from res2net_jax.variants import Preprocessing

TINY = {"layers": (1,), "channels": (8,), "num_classes": 5, "zero_init_last": False}


@pytest.fixture
def folder(tmp_path):
    """A model of pictures of its own."""
    model = res2net_jax.create("res2net50_26w_4s", **TINY)
    model.preprocessing = Preprocessing(size=40, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    return res2net_jax.save(model, tmp_path / "m")


@pytest.mark.parametrize("option", [{"num_classes": 7}, {"param_dtype": "bfloat16"}, {"act_layer": "silu"}], ids=str)
def test_another_model_takes_the_same_pictures_and_computes_as_asked(folder, option):
    model = res2net_jax.load(folder, dtype=jnp.bfloat16, **option)
    assert model.preprocessing == res2net_jax.load(folder).preprocessing
    logits = jax.eval_shape(lambda model, x: model(x), model, jnp.zeros((1, 40, 40, 3), jnp.float32))
    assert logits.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "res2net50d"])
def test_grey_images_give_what_their_copies_in_rgb_gave(name, tmp_path):
    model = res2net_jax.create(name, **TINY).eval()
    grey = res2net_jax.load(res2net_jax.save(model, tmp_path / "m"), in_chans=1)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 1)).astype("float32")
    run = jax.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(grey, x), run(model, x.repeat(3, axis=-1)), rtol=1e-4, atol=1e-5)
