import pytest

import res2net_jax
from res2net_jax.variants import Preprocessing

NAMES = ["tabby, tabby cat", "crane", "crane", "Ünï", "7", "e", "f", "g", "h", "i"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a tiny model with ten classes."""
    model = res2net_jax.create(
        "res2net50_26w_4s", layers=(1, 1), channels=(8, 16), scale=2, num_classes=10, zero_init_last=False
    )
    model.class_names, model.preprocessing = tuple(NAMES), Preprocessing(size=32)
    return res2net_jax.save(model, tmp_path_factory.mktemp("commands") / "tiny")
