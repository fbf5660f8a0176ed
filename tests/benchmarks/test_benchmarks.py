"""The suite's own arithmetic, and that it runs; what it measures is for no test."""

import functools
import multiprocessing
import os
import subprocess
import sys

import pytest

from benchmarks import chart, cores, kernels, results, scaling, timing, turns
from res2net_jax.command_line import table

from .makers import failing, failing_for_two, failing_in_its_turn, killed, killed_in_its_turn, sleeping


def measure(makers, rounds, model="m"):
    with turns.Runners(makers, model, 1, 0.0) as runners:
        return runners.turns(rounds)


def test_turns_and_peers_that_fail(capsys):
    sleepers = {name: functools.partial(sleeping, ms) for name, ms in (("ours", 1), ("slow", 20))}
    others = {"broken": failing, "large": killed, "lost": killed_in_its_turn, "tired": failing_in_its_turn}
    for durations in measure(sleepers | others, rounds=3).values():
        assert durations.keys() == {"ours", "slow"} and min(durations["slow"]) >= 0.02 > min(durations["ours"])
    messages = capsys.readouterr().err.splitlines()
    assert messages[0] == "broken cannot run m at batch 1: no memory"
    assert "large cannot run" in messages[1] and "was killed" in messages[1]
    assert "lost cannot run" in messages[2] and "was killed" in messages[2]
    assert messages[3] == "tired cannot run m at batch 1: no memory left"
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="no memory"):
        measure({"ours": failing}, rounds=1)


def test_rows_that_compile_at_once(capsys):
    sleepers = {name: functools.partial(sleeping, 1) for name in ("ours", "theirs")}
    with (
        turns.Runners(sleepers | {"broken": failing}, "m", 1, 0.0, at_once=True) as first,
        turns.Runners(sleepers, "n", 2, 0.0, at_once=True) as second,
        turns.Runners({"ours": failing}, "o", 1, 0.0, at_once=True) as third,
    ):
        assert all(by.keys() == sleepers.keys() for row in (first, second) for by in row.turns(2).values())
        with pytest.raises(RuntimeError, match="ours cannot run o at batch 1: no memory"):
            third.turns(2)
    assert capsys.readouterr().err == "broken cannot run m at batch 1: no memory\n"
    assert not multiprocessing.active_children()


def test_kernels_by_what_they_do_and_by_name():
    launches = [
        kernels.Kernel("cudnn-conv-bw-filter.3", "sm90_xmma_wgrad", 0, 2e6),
        kernels.Kernel("command_buffer", "sm90_xmma_fprop_implicit_gemm", 1e6, 3e6),
        kernels.Kernel("command_buffer", "nvjet_sm90", 4e6, 5e6),
        kernels.Kernel("command_buffer", "loop_concatenate_fusion_2", 5e6, 6e6),
        kernels.Kernel("command_buffer", "input_reduce_fusion", 8e6, 9e6),
        kernels.Kernel("loop_add_fusion", "loop_add_fusion", 9e6, 10e6),
    ]
    assert kernels.busy_and_span(launches) == (7e6, 10e6)
    rows = kernels.summary(launches, calls=2)
    assert rows[1] == ("convolutions, gradients of kernels", "1.000", "25.0%", "0", "2000.0")
    assert [row[0] for row in rows[1:7]] == [
        "convolutions, gradients of kernels", "convolutions", "matrix products", "concatenations", "reductions",
        "elementwise",
    ]  # fmt: skip
    assert rows[7][0] == "sm90_xmma_wgrad" and len(rows) == 13


def test_turns_on_cores_near_and_far_are_apart(monkeypatch):
    makers = {name: functools.partial(sleeping, 1) for name in ("ours", "theirs")}
    for seen, turns_in in (
        (["near"] * 3 + ["far"] * 4, {"near": 1, "far": 1}),  # the turn in which they moved is neither
        (["near", "near", "far", "near", "near", "near", "near"], {"near": 2}),
        (["near", "far"] * 3 + ["near"], {"mixed": 3}),
        ([""] * 7, {"": 3}),
    ):
        monkeypatch.setattr(turns, "placement", functools.partial(next, iter(seen)))
        found = measure(makers, rounds=3)
        assert {place: min(map(len, by.values())) for place, by in found.items()} == turns_in


@pytest.mark.parametrize(
    ("count", "program", "expected"),
    [
        (1, "print(100.0)", ""),
        (2, "print(100.0)", "near"),
        (2, "print(400.0)", "far"),
        (4, "print(100.0)", ""),
        (2, "raise OSError", ""),
    ],
)
def test_placement_is_of_two_cores(count, program, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)
    monkeypatch.setattr(cores, "__file__", str(tmp_path / "program.py"))
    (tmp_path / "program.py").write_text(program)
    assert cores.placement() == expected


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="there are no two cores to pin to"
)
def test_a_round_trip_takes_time():
    answer = subprocess.run([sys.executable, cores.__file__], capture_output=True, text=True, check=True, timeout=60)
    assert 20 < float(answer.stdout) < 1e6


def test_runners_of_inference_run():
    """In processes of their own; what they compute is for test_runners.py."""
    makers = {name: timing.RUNNERS["inference"][name] for name in ("res2net_jax", "timm eager")}
    for durations in measure(makers, rounds=1, model="res2net50_48w_2s").values():
        assert durations.keys() == makers.keys()


def test_a_row_that_fails_costs_no_other_and_a_part_of_the_rows_no_table(tmp_path, monkeypatch, capsys):
    runners = {"res2net_jax": failing_for_two, "slow": functools.partial(sleeping, 9)}
    monkeypatch.setitem(timing.RUNNERS, "inference", runners)
    options = ["--models", "resnet50", "--rounds", "1", "--seconds", "0.01", "--results", str(tmp_path)]
    with pytest.raises(ValueError, match="res2net_jax did not run resnet50 at 2; the other rows are kept"):
        timing.run("inference", [*options, "--batches", "2", "1"])
    assert "res2net_jax cannot run resnet50 at batch 2: no memory" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"inference-part-cpu.csv", "inference-part-cpu.txt"}
    rows = results.read("inference-part", tmp_path)
    assert {(row["model"], row["batch"]) for row in rows} == {("resnet50", "1")} and float(rows[0]["slow / ours"]) > 2


@pytest.mark.parametrize(
    "options", [{"models": ()}, {"models": ("res2net",)}, {"batches": (0,)}, {"rounds": 0}, {"seconds": 0.0}]
)
def test_options_that_measure_nothing(options):
    with pytest.raises(ValueError, match="--models"):
        timing.Options(**options)


def test_tables_and_the_chart(tmp_path):
    figures = [("a", "1", "near", "1.10"), ("a", "1", "far", "0.80"), ("a", "8", "", "0.90"), ("b", "1", "far", "")]
    rows = [("model", "batch", "cores", "timm eager / ours"), *figures]
    text = results.write("inference", rows, "a remark", ("jax",), tmp_path)
    assert "a remark" in text and table(rows) in text and (tmp_path / "inference-cpu.txt").read_text() == text
    read = results.read("inference", tmp_path)
    assert [tuple(row.values()) for row in read] == rows[1:]
    panels = chart.draw(read).axes
    bars = [[bar.get_width() for bar in panel.patches] for panel in panels]
    assert bars[0][0] == 1.1 and bars[1][0] == 0.9 and str(bars[0][1]) == str(bars[1][1]) == "nan"
    assert panels[0].collections[0].get_offsets()[0][0] == 0.8 and panels[1].collections[0].get_offsets().mask[0].any()


def test_bytes_of_a_collective():
    found = scaling.collectives_in(
        "  %a = (f32[2,3]{1,0}, bf16[8]{0}) all-reduce(%x, %y), channel_id=1\n"
        "  %b = u8[4]{0} all-gather-start(%z)\n  %c = f32[] add(%a, %b)\n  %d = f32[] all-reduce(%c)\n"
    )
    assert found == [("all-reduce", 40), ("all-gather", 4), ("all-reduce", 4)]
