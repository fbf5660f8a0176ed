import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from train.config import Config
from train.report import Report, read_rows

METRICS = {"loss": 2.0, "top1": 0.25, "grad_norm": 1.5, "lr": 0.1}
RESULT = {"loss": 1.0, "top1": 50.0, "top5": 90.0, "count": 10}


def report(folder, start=0, **options):
    config = Config(batch_size=64, log_every=2)
    return Report(folder, config, start=start, total=8, steps_per_epoch=4, **options)


def fill(report, steps):
    for step in steps:
        report.step(step, {**METRICS, "loss": float(step)})
        if step % 4 == 0:
            report.evaluation(step, RESULT)


def events(folder):
    """(step, tag, value) of all scalars: a record is its length, a checksum, the data, a checksum."""
    (file,) = (folder / "tensorboard").iterdir()
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_rows_events_and_curves(tmp_path, capsys):
    with_rows = report(tmp_path)
    fill(with_rows, range(1, 9))
    with_rows.summary(tmp_path / "checkpoints", replaced=3)
    with_rows.close()
    rows = read_rows(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"], row["val_top1"]) for row in rows] == [
        ("2", "1.5", ""),
        ("4", "3.5", ""),
        ("4", "", "50"),
        ("6", "5.5", ""),
        ("8", "7.5", ""),
        ("8", "", "50"),
    ]
    assert rows[0]["top1"] == "25" and rows[0]["epoch"] == "0.500" and float(rows[1]["images_per_s"]) > 0
    scalars = events(tmp_path)
    assert [(step, value) for step, tag, value in scalars if tag == "train/loss"] == [
        (2, 1.5),
        (4, 3.5),
        (6, 5.5),
        (8, 7.5),
    ]
    assert [(step, value) for step, tag, value in scalars if tag == "validation/top5"] == [(4, 90), (8, 90)]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "step 4, epoch 1.00: top-1 50.00 %, top-5 90.00 %, loss 1.0000 on 10 examples" in out
    assert "3 pictures could not be read" in out and "best top-1 50.00 % at step 8" in out, "the last of equals"


def test_rates_count_waits_but_neither_pauses_nor_the_first_step(tmp_path, monkeypatch):
    now = 0
    monkeypatch.setattr("train.report.time", SimpleNamespace(perf_counter=lambda: now, time=lambda: now))
    timed = report(tmp_path)
    for step, (waited, computed) in enumerate([(9, 99), (1, 3), (0.5, 1.5), (1.5, 0.5)], start=1):
        with timed.waiting():
            now += waited
        now += computed
        with timed.paused():
            now += 50
        timed.step(step, METRICS)
    timed.close()
    rows = read_rows(tmp_path / "metrics.csv")
    # Of batches of 64.
    assert [(row["images_per_s"], row["data_wait"]) for row in rows] == [("16", "0.25"), ("32", "0.5")]


def test_the_best_is_named_if_it_is_not_the_newest(tmp_path, capsys):
    running = report(tmp_path)
    for step, top1 in ((4, 60.0), (8, 50.0)):
        running.evaluation(step, RESULT | {"top1": top1})
    running.summary(tmp_path / "checkpoints", replaced=0)
    running.close()
    out = capsys.readouterr().out
    assert "Done: top-1 50.00 %" in out and "best top-1 60.00 % at step 4" in out
    assert f'load("{tmp_path}/checkpoints"), the best: load("{tmp_path}/checkpoints/4"). Curves' in out


def test_a_resume_drops_what_comes_again(tmp_path):
    fill(report(tmp_path), range(1, 7))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,2.0,0.1")  # cut short by a kill
    resumed = report(tmp_path, start=4)
    fill(resumed, range(5, 9))
    resumed.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["2", "4", "4", "6", "8", "8"]
    assert [step for step, tag, _ in events(tmp_path) if tag == "train/loss"] == [2, 4, 6, 8]


def test_the_last_steps_before_an_evaluation_have_a_row(tmp_path):
    short = report(tmp_path)
    short.step(1, {**METRICS, "loss": 2.5})
    for _ in range(2):
        short.flush(1)
    short.evaluation(1, RESULT)
    short.close()
    rows = read_rows(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"], row["val_top1"]) for row in rows] == [("1", "2.5", ""), ("1", "", "50")]


def test_an_invisible_report_writes_nothing(tmp_path):
    silent = report(tmp_path / "run", visible=False)
    fill(silent, range(1, 5))
    silent.close()
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_written_is_written_later(tmp_path, capsys):
    kept = report(tmp_path)
    fill(kept, range(1, 3))
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "metrics.csv").mkdir()
    fill(kept, range(3, 7))
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "metrics.csv").rmdir()
    fill(kept, range(7, 9))
    kept.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["2", "4", "4", "6", "8", "8"]
    assert len([step for step, tag, _ in events(tmp_path) if tag == "train/loss"]) == 4


@pytest.mark.parametrize("content", ["", "step,loss\n"])
def test_an_empty_file_has_no_rows(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    assert read_rows(tmp_path / "metrics.csv") == []


def test_the_program_starts_without_torch():
    # tensorboardX would import it, which takes longer than the rest; whoever needs torch later still gets it.
    code = "import sys, train.imagenet; assert 'torch' not in sys.modules; import torch; torch.zeros(1)"
    subprocess.run([sys.executable, "-c", code], check=True)
