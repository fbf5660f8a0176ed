"""The suite's own arithmetic, and that it runs; what it measures is for no test."""

import functools
import itertools
import multiprocessing
import os
import time

import pytest

from benchmarks import chart, results, scaling, timing
from res2net_jax.command_line import table


def sleeping(milliseconds, model, batch):
    return functools.partial(time.sleep, milliseconds / 1e3)


def failing(model, batch):
    raise RuntimeError("no memory")


def killed(model, batch):
    os._exit(9)


def test_medians_and_peers_that_fail(capsys):
    sleepers = {name: functools.partial(sleeping, ms) for name, ms in (("ours", 1), ("slow", 20))}
    others = {"broken": failing, "large": killed, "lost": killed_in_its_turn}
    medians = timing.measure(sleepers | others, "m", 1, rounds=3, seconds=0.0)
    assert medians.keys() == {"ours", "slow"} and medians["slow"] >= 0.02 > medians["ours"]
    messages = capsys.readouterr().err.splitlines()
    assert messages[0] == "broken cannot run m at batch 1: no memory"
    assert "large cannot run" in messages[1] and "was killed" in messages[1]
    assert "lost cannot run" in messages[2] and "was killed" in messages[2]
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="no memory"):
        timing.measure({"ours": failing}, "m", 1, rounds=1, seconds=0.0)


def killed_in_its_turn(model, batch):
    calls = itertools.count()
    return lambda: next(calls) < 2 or os._exit(9)  # after the one that compiles and the one that is looked at


def test_runners_of_inference_run():
    makers = {name: timing.RUNNERS["inference"][name] for name in ("res2net_jax", "timm eager")}
    medians = timing.measure(makers, "res2net50_48w_2s", 1, rounds=1, seconds=0.0)
    assert medians.keys() == makers.keys() and min(medians.values()) > 0


def test_tables_and_the_chart(tmp_path):
    rows = [("model", "batch", "timm eager / ours"), ("a", "1", "1.10"), ("a", "8", "0.90"), ("b", "1", "")]
    text = results.write("inference", rows, "a remark", ("jax",), tmp_path)
    assert "a remark" in text and table(rows) in text and (tmp_path / "inference-cpu.txt").read_text() == text
    read = results.read("inference", tmp_path)
    assert [tuple(row.values()) for row in read] == rows[1:]
    bars = [[bar.get_width() for bar in panel.patches] for panel in chart.draw(read).axes]
    assert bars[0][0] == 1.1 and bars[1][0] == 0.9 and str(bars[0][1]) == str(bars[1][1]) == "nan"


def test_bytes_of_a_collective():
    found = scaling.collectives_in(
        "  %a = (f32[2,3]{1,0}, bf16[8]{0}) all-reduce(%x, %y), channel_id=1\n"
        "  %b = u8[4]{0} all-gather-start(%z)\n  %c = f32[] add(%a, %b)\n  %d = f32[] all-reduce(%c)\n"
    )
    assert found == [("all-reduce", 40), ("all-gather", 4), ("all-reduce", 4)]
