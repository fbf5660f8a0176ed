"""A process that waits for the others of its job: in vain, or until a signal comes."""

import signal
import subprocess
import sys

import pytest

from .conftest import ROOT, free_port

JOIN = """
import signal, sys
from res2net_jax import command_line
from train import devices

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a shell ignores
address, process, seconds = sys.argv[1:]
devices.PATIENCE = int(seconds)
print("joining", flush=True)
command_line.main(lambda _: devices.connect(address, 2, int(process)))
"""


def join(process, seconds):
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-c", JOIN, address, str(process), str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes), address


@pytest.mark.parametrize("process", [0, 1])
def test_the_others_do_not_come(process):
    alone, address = join(process, 2)
    _, told = alone.communicate(timeout=120)
    assert alone.returncode == 2, told
    assert f"error: could not join the other processes at {address} (" in told
    assert "not all were there after 2 seconds" in told and "Traceback" not in told


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait(kind):
    alone, _ = join(1, 100)
    assert alone.stdout.readline() == "joining\n"
    with pytest.raises(subprocess.TimeoutExpired):
        alone.wait(2)
    alone.send_signal(kind)
    assert alone.wait(20) == -kind, alone.stderr.read()
