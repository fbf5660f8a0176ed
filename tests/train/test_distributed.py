"""The result does not depend on how many devices and processes share the work."""

import os
import subprocess
import sys

import numpy as np
import pytest

from train.report import read_rows

from .conftest import ROOT, arrays, printed


def test_all_stop_if_one_process_has_no_data(launch, tmp_path):
    together = launch(tmp_path / "run", processes=2, FAIL="0 0 OSError")
    assert [process.wait(300) for process in together] == [2, 2], printed(tmp_path / "run")
    told = [(tmp_path / f"run.{number}.txt").read_text() for number in range(2)]
    assert "error: unplugged" in told[0]
    assert "error: another process has failed and says why; this one has stopped with it" in told[1]


def test_processes_that_do_not_agree_do_not_begin(launch, tmp_path):
    together = launch(tmp_path / "run", processes=2, own={1: ("--lr", "0.7", "--eval-every", "3")})
    assert [process.wait(300) for process in together] == [2, 2], printed(tmp_path / "run")
    told = [(tmp_path / f"run.{number}.txt").read_text() for number in range(2)]
    assert all("the processes of this run do not agree" in text for text in told)
    assert "lr: here 0.4" in told[0] and "lr: here 0.7" in told[1] and "eval_every: here 3" in told[1]
    assert not (tmp_path / "run").exists()


def test_an_output_that_the_hosts_do_not_share(launch, tmp_path):
    own = {1: ("--output", tmp_path / "elsewhere")}
    together = launch(tmp_path / "run", processes=2, own=own, SHARE_ATTEMPTS="2")
    assert [process.wait(300) for process in together] == [2, 2], printed(tmp_path / "run")
    assert printed(tmp_path / "run").count("is not the same folder for all 2 processes") == 2
    assert not (tmp_path / "run" / ".shared").exists()


def test_a_host_that_does_not_see_the_newest_checkpoint_yet_waits_for_it(launch, tmp_path):
    switches = ("--checkpoint-every", 2, "--keep", 10)
    together = launch(tmp_path / "run", *switches, "--steps", 6, processes=2)
    assert [process.wait(300) for process in together] == [0, 0], printed(tmp_path / "run")
    together = launch(tmp_path / "run", *switches, "--steps", 8, processes=2, STALE="1 6 3")
    assert [process.wait(300) for process in together] == [0, 0], printed(tmp_path / "run")
    assert "Resuming at step 6 of 8" in printed(tmp_path / "run") and "damaged" not in printed(tmp_path / "run")
    assert "process 1 looked 3 times" in printed(tmp_path / "run")


def test_a_process_that_fails_alone_ends_and_does_not_wait_for_the_others(launch, tmp_path):
    # A checkpoint is being saved at this step, and whether it was is asked in all processes only later.
    together = launch(tmp_path / "run", "--checkpoint-every", 30, processes=2, FAIL="1 32 MemoryError")
    assert together[1].wait(300) == 2, printed(tmp_path / "run")
    together[0].kill()  # Minutes later JAX would.
    together[0].wait()
    told = (tmp_path / "run.1.txt").read_text()
    assert "error: unplugged" in told and "Traceback" not in told


def test_two_processes_go_back_to_the_checkpoint_before_a_damaged_one(finish, tmp_path):
    switches = ("--checkpoint-every", 2, "--steps", 6)
    finish(tmp_path / "run", *switches, processes=2)
    expected = arrays(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "6" / "_CHECKPOINT_METADATA").unlink()
    finish(tmp_path / "run", *switches, processes=2)
    assert "Going back to checkpoint 4" in printed(tmp_path / "run")
    found = arrays(tmp_path / "run")
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []


def differences(a, b):
    assert a.keys() == b.keys()
    return {name: np.abs(a[name].astype(np.float64) - b[name]).max() for name in a}


@pytest.mark.parametrize(
    "switches",
    [(), ("--batchnorm-group", 4, "--mixup", 0.2, "--random-erasing", 0.3, "--ema", 0.99)],
    ids=["plain", "groups-mixup-erasing-ema"],
)
def test_devices_and_processes_change_nothing(finish, tmp_path, switches):
    switches = ("--dtype", "float64", "--steps", 5, *switches)
    layouts = {"one": {}, "eight-devices": {"devices": 8}, "two-processes": {"devices": 2, "processes": 2}}
    for name, layout in layouts.items():
        finish(tmp_path / name, *switches, **layout, DRAW="1")
    reference = arrays(tmp_path / "one")
    assert all(value.dtype == np.float64 for name, value in reference.items() if name != "training/step")
    assert reference["training/step"] == 5
    (row,) = [row for row in read_rows(tmp_path / "one" / "metrics.csv") if row["val_top1"]]
    for name in list(layouts)[1:]:
        difference = differences(reference, arrays(tmp_path / name))
        assert max(difference.values()) < 1e-12, difference
        (other,) = [row for row in read_rows(tmp_path / name / "metrics.csv") if row["val_top1"]]
        # 355 test digits: the last batch is padded in every layout, and with 8 devices some of them see only padding.
        assert (other["val_count"], other["val_top1"], other["val_top5"]) == ("355", row["val_top1"], row["val_top5"])
        for picture in ("confusion.png", "mistakes.png"):
            assert (tmp_path / name / picture).read_bytes() == (tmp_path / "one" / picture).read_bytes()


def test_a_run_goes_on_with_another_number_of_processes(finish, tmp_path):
    switches = ("--dtype", "float64", "--mixup", 0.2)
    finish(tmp_path / "one", *switches, "--steps", 5)
    finish(tmp_path / "both", *switches, "--steps", 3, processes=2)
    finish(tmp_path / "both", *switches, "--steps", 5)
    difference = differences(arrays(tmp_path / "one"), arrays(tmp_path / "both"))
    assert max(difference.values()) < 1e-12, difference


TRAFFIC = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import res2net_jax
from train.config import Config
from train.devices import data_mesh
from train.step import make_forward, split

mesh = data_mesh()
spread, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
images = jax.ShapeDtypeStruct((32, 32, 32, 3), np.float32, sharding=spread)
for group in (None, 4, 2, 8):
    model = res2net_jax.create("res2net50_26w_4s", layers=(1, 2), channels=(16, 16), num_classes=4)
    forward = make_forward(model, Config(batch_size=32, batchnorm_group=group), training=True)
    weights = jax.device_put(split(model), whole)
    compiled = jax.jit(lambda params, stats, x: forward(params, stats, x)[0], out_shardings=spread)
    text = compiled.lower(*weights, images).compile().as_text()
    names = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
    print(group, sum(text.count(f" {name}(") for name in names))
"""


def test_groups_of_a_device_normalise_without_traffic():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run([sys.executable, "-c", TRAFFIC], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    operations = {line.split()[0]: int(line.split()[1]) for line in result.stdout.splitlines()}
    # Four images a device: groups of four or two lie on one device, groups of eight on two.
    assert operations["None"] > 0 and operations["8"] > 0
    assert operations["4"] == operations["2"] == 0
