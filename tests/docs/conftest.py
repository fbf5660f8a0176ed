"""A machine as the documentation takes it for granted: releases in the cache, pictures and files in the folder."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

import porting
import res2net_jax

ROOT = Path(__file__).parents[2]
# Release -> what is smaller in its stand-in. One has all stages, for the pages that say how large their maps are.
RELEASES = {
    "res2net50_14w_8s": {"layers": (1, 1), "channels": (64, 128), "scale": 2},
    "res2net50_26w_4s": {"layers": (1, 1), "channels": (64, 128), "scale": 2},
    "res2net50d": {"layers": (1, 1, 1, 1), "scale": 2},
}


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A cache folder with the models that the pages name: random, and smaller than the releases."""
    folder = tmp_path_factory.mktemp("home")
    for name, smaller in RELEASES.items():
        model = res2net_jax.create(name, **smaller, zero_init_last=False)
        res2net_jax.save(model.eval(), folder / "models" / name)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory, photos) -> Path:
    """What a reader has: photographs, two classes of them to learn, and a file of weights."""
    import torch

    folder = tmp_path_factory.mktemp("files")
    china, flower = map(Image.open, photos)
    china.save(folder / "photo.jpg")
    flower.save(folder / "other.png")
    for file in ("photos/beach.jpg", "holidays/2.jpg", "holidays/10.jpg", "scans/old/1.png"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        flower.save(folder / file)
    for split, tops in (("train", range(0, 120, 40)), ("val", range(20, 100, 40))):
        for name, photo in (("Löwenzahn", flower), ("ox-eye daisy", china)):
            (folder / "flowers" / split / name).mkdir(parents=True)
            for top in tops:
                photo.crop((top, top, top + 300, top + 200)).resize((60, 40)).save(
                    folder / "flowers" / split / name / f"{top}.jpg"
                )
    state = porting.state_dict(res2net_jax.create("res2net50_14w_8s"))
    torch.save({key: torch.from_numpy(value.copy()) for key, value in state.items()}, folder / "mine.pth")
    return folder


@pytest.fixture
def reader(home, files, tmp_path, monkeypatch) -> Path:
    """The reader's folder, which is the current one; ``load`` finds the releases in the cache."""
    folder = tmp_path / "reader"
    shutil.copytree(files, folder, copy_function=lambda source, target: Path(target).hardlink_to(source))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RES2NET_JAX_HOME", str(home))
    monkeypatch.syspath_prepend(ROOT)
    return folder
