"""What one of two processes does, has or suffers alone."""

import shutil

import pytest
from PIL import Image

from .conftest import printed, steps

EPOCH = 45  # steps


@pytest.mark.parametrize("batch", [33, EPOCH + 3], ids=["training", "evaluation"])
def test_a_process_whose_devices_fail_ends_and_asks_nothing_of_the_others(launch, tmp_path, batch):
    together = launch(tmp_path / "run", "--checkpoint-every", 30, processes=2, BREAK=f"1 {batch}")
    assert together[1].wait(300) == 2, printed(tmp_path / "run")
    together[0].kill()  # Minutes later JAX would.
    together[0].wait()
    told = (tmp_path / "run.1.txt").read_text()
    assert "RESOURCE_EXHAUSTED: broken" in told and "Traceback" not in told
    assert ("--eval-batch-size" in told) == (batch > EPOCH)
    assert steps(tmp_path / "run") == [30]


def test_pictures_in_another_place_on_each_host(finish, tmp_path, pictures):
    """A mended one makes another checksum of the folder, but process 0 has the path of the run; all count as one."""
    for picture in ("a/1", "a/3", "b/5"):
        (pictures / f"train/{picture}.png").write_text("broken")
    shutil.copytree(pictures, tmp_path / "elsewhere")
    switches = ("--dataset", f"folder:{pictures}", "--batch-size", 4)
    both = {"processes": 2, "own": {1: ("--dataset", f"folder:{tmp_path / 'elsewhere'}")}}
    finish(tmp_path / "run", *switches, "--steps", 4, **both)
    assert "3 pictures could not be read and were replaced" in printed(tmp_path / "run")
    for folder in (pictures, tmp_path / "elsewhere"):
        Image.new("RGB", (99, 99)).save(folder / "train/a/1.png")
    finish(tmp_path / "run", *switches, "--steps", 5, **both)
    assert "Resuming at step 4 of 5" in printed(tmp_path / "run")
