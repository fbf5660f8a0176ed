"""A signal is a wish, and nothing that can fail is done in its handler."""

import os
import signal
import sys

import pytest

from train.signals import StopRequest


def test_the_first_signal_is_remembered_and_the_handlers_come_back(capfd):
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGTERM
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before
    assert "SIGTERM: will save and stop after this step" in capfd.readouterr().err


class InTheMiddleOfAWrite:
    def write(self, text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    flush = write


def test_a_signal_in_the_middle_of_a_write_is_no_failure(monkeypatch, capfd):
    with StopRequest() as stop:
        monkeypatch.setattr(sys, "stderr", InTheMiddleOfAWrite())
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
    monkeypatch.undo()
    assert "SIGTERM" in capfd.readouterr().err
