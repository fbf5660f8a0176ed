"""The result does not depend on how many devices and processes share the work."""

import numpy as np
import pytest

from train.report import read_rows

from .conftest import arrays


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
        finish(tmp_path / name, *switches, **layout)
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


def test_a_run_goes_on_with_another_number_of_processes(finish, tmp_path):
    switches = ("--dtype", "float64", "--mixup", 0.2)
    finish(tmp_path / "one", *switches, "--steps", 5)
    finish(tmp_path / "both", *switches, "--steps", 3, processes=2)
    finish(tmp_path / "both", *switches, "--steps", 5)
    difference = differences(arrays(tmp_path / "one"), arrays(tmp_path / "both"))
    assert max(difference.values()) < 1e-12, difference
