"""What the tests of all packages share: timm's models as the reference, and photographs."""

import functools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whose float32 products are of float32; GPUs and TPUs round the factors
os.environ |= {  # also for what the tests start
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # LLVM takes half as long; most programs run once, for a moment
    "OMP_NUM_THREADS": "1",  # torch's, whose idle threads would keep the other worker's core busy
}

from hub_server import hub_server  # noqa: E402, F401
from server import server  # noqa: E402, F401


def pytest_configure(config):
    """A cache folder of their own for all tests and what they start; nothing goes to the developer's."""
    if not hasattr(config, "workerinput"):  # xdist's workers inherit it
        home = tempfile.TemporaryDirectory(prefix="res2net_jax-")
        config.add_cleanup(home.cleanup)
        os.environ |= {
            "RES2NET_JAX_HOME": home.name,
            "JAX_COMPILATION_CACHE_DIR": f"{home.name}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }


def pytest_collection_modifyitems(items):
    """The trainer's long tests first, or one of two workers would end with them alone."""
    items.sort(key=lambda item: "tests/train/" not in item.nodeid)


@functools.lru_cache(maxsize=2)
def _timm_model(name, **kwargs):
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    # Fresh norms are the identity, and the last of each block zero: a port could swap or skip them unnoticed.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, 0.0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture
def timm_model():
    """``timm_model(name, **kwargs)``: a fresh copy of timm's model with every array random, float32, in eval mode."""
    import copy

    return lambda name, **kwargs: copy.deepcopy(_timm_model(name, **kwargs)).float().eval()


@pytest.fixture(scope="module")
def optimized():
    """What is compiled from here to the module's end, also in processes of their own, is what users have."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def x64():
    """Everything in float64: a proof of the arithmetic, on small pictures."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Two real photographs, 640x427."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [folder / "china.jpg", folder / "flower.jpg"]


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    """The state dict of a random res2net50_48w_2s under torch keys, with ``num_batches_tracked``."""
    model = _timm_model("res2net50_48w_2s")
    return {key: value.numpy().copy() for key, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def safetensors_file(weights, tmp_path_factory) -> Path:
    from safetensors.numpy import save_file

    file = tmp_path_factory.mktemp("release") / "model.safetensors"
    save_file(weights, file)
    return file


@pytest.fixture(scope="session")
def checkpoint_folder(safetensors_file, tmp_path_factory) -> Path:
    """``weights`` as an uncertified checkpoint."""
    import porting

    return porting.port("res2net50_48w_2s", safetensors_file, tmp_path_factory.mktemp("checkpoint") / "m", verify=False)
