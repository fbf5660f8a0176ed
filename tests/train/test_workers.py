"""Workers whose program ends, and programs whose workers do."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batches import take

from train.data import train_batches
from train.datasets import open_dataset

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
