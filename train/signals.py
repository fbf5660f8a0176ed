"""SIGTERM and Ctrl-C as a wish to stop, which the loop grants between two steps."""

import contextlib
import os
import signal

_STDERR = 2


class StopRequest:
    """Remembers the first SIGTERM or SIGINT; a second Ctrl-C ends the process at once.

    A signal that comes while the compiler or another library runs is seen once that returns. Use it as a
    context: the former handlers come back at its end.

    Attributes:
        signum: The signal's number, 0 while there was none.
    """

    def __init__(self):
        self.signum = 0
        self._former = {}

    def __enter__(self):
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._former[signum] = signal.signal(signum, self._remember)
        return self

    def __exit__(self, *_):
        for signum, handler in self._former.items():
            signal.signal(signum, handler)

    def _remember(self, signum, _frame):
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
        # Not print: in the middle of another write to the same buffer that would raise.
        with contextlib.suppress(OSError):
            os.write(_STDERR, f"{signal.Signals(signum).name}: will save and stop after this step\n".encode())
