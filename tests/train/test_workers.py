"""Workers whose program ends, and programs whose workers do."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from batches import take

from train import pipeline
from train.data import train_batches
from train.datasets import open_dataset
from train.pipeline import Batches

ROOT = str(Path(__file__).parents[2])


PROGRAM = """
import sys
from train.data import train_batches
from train.datasets import open_dataset
if __name__ == "__main__":
    batches = train_batches(open_dataset("digits", "train"), size=16, batch_size=16, seed=0, workers=2)
    next(batches)
    print("ready", flush=True)
    sys.stdin.readline()
    next(batches)
    print("done", flush=True)
"""


def start(tmp_path):
    """Goes on once a line comes in."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": ROOT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def alive(group):
    """Processes of the group that are not zombies."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, group_id = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group_id) == group and state != "Z":
            found.append(int(entry))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    process = start(tmp_path)
    assert len(alive(process.pid)) >= 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid)


def test_the_death_of_a_worker_is_an_error_and_not_a_wait():
    others = multiprocessing.active_children()
    batches = train_batches(open_dataset("digits", "train"), size=16, batch_size=16, seed=0, workers=1)
    try:
        next(batches)
        (worker,) = [process for process in multiprocessing.active_children() if process not in others]
        worker.kill()
        with pytest.raises(OSError, match="a process that decodes pictures ended.*exit code -9"):
            take(batches, 50)
    finally:
        batches.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signals_meant_for_the_program_leave_its_workers_at_work(tmp_path):
    process = start(tmp_path)
    for pid in alive(process.pid):
        if pid != process.pid and b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
    out, err = process.communicate("\n", timeout=300)
    assert process.returncode == 0 and out == "done\n", err
    assert err == ""


@pytest.fixture
def little_shared_memory(monkeypatch):
    """As in a container."""
    usage = namedtuple("usage", "free")(2**26)
    monkeypatch.setattr("train.pipeline.shutil.disk_usage", lambda path: usage)


def batches_of(example):
    return Batches(example, 1000, 2, step=0, workers=2, process_index=0, process_count=1)


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is taken to be there elsewhere")
def test_workers_end_by_themselves_with_more_to_send_than_a_pipe_takes(little_shared_memory):
    others = multiprocessing.active_children()
    batches = batches_of(lambda number: {"image": np.full(2**22, number % 256, np.uint8)})
    try:
        for first in range(0, 8, 2):
            assert next(batches)["image"][:, 0].tolist() == [first, first + 1]
        workers = [process for process in multiprocessing.active_children() if process not in others]
    finally:
        batches.close()
    assert [worker.exitcode for worker in workers] == [0, 0], "killed, after a wait"


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is taken to be there elsewhere")
def test_pipes_in_place_of_shared_memory_are_told_once(little_shared_memory, capsys):
    pipeline._warned_of_pipes.clear()
    for _ in range(2):
        batches = batches_of(lambda number: {"image": np.zeros(9, np.uint8)})
        next(batches)
        batches.close()
    assert capsys.readouterr().err.count("WARNING: /dev/shm has 0.1 GB free, and the workers' batches want 2.1 GB") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is taken to be there elsewhere")
def test_why_a_worker_cannot_start_passes_through_its_pipe(little_shared_memory):
    def only_here():
        raise FileNotFoundError("the pictures are not here")

    class Example:
        def __reduce__(self):
            return only_here, ()

    batches = batches_of(Example())
    try:
        with pytest.raises(FileNotFoundError, match="the pictures are not here"):
            next(batches)
    finally:
        batches.close()
