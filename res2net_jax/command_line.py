"""What all commands share: one line for a user's mistake, a traceback for ours."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable

from res2net_jax.files import first_line, out_of_memory

# What bad input, a missing extra, the network or the disk raise. Anything else, but for a lack of memory, is a defect
# and shows its traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError)


def main(command: Callable[[list[str]], int | None]) -> None:
    """Runs ``command`` on the arguments and exits.

    The exit code is 0 when done, 2 for a mistake or a failure that is explained, and otherwise what ``command``
    returns. Interrupted, the process ends by the signal, which a shell reports as 130. ``--debug`` anywhere shows the
    traceback of the failure as well.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    code = None
    _abandoned.clear()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be what the terminal cannot show
    sys.unraisablehook = _unraisable
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # a panorama is no attack
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")  # which Orbax leaves of a damaged checkpoint
    try:
        code = command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, e.g. head, has seen enough
        _silence_stdout()
    except KeyboardInterrupt:
        sys.excepthook = lambda *_: None
        raise  # so that Python ends by the signal, and with it a shell's loop around this command
    except Exception as error:
        full = out_of_memory(error)
        if debug or not (full or isinstance(error, EXPECTED)):
            raise
        advice = f"not enough memory ({first_line(error)}); a smaller --batch-size, or fewer pixels, need less"
        print(f"error: {advice if full else error}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _silence_stdout()  # which was itself what failed, e.g. on a full disk
        code = 2
    if _abandoned.is_set():
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code or 0)
    if code:
        sys.exit(code)


def abandon_threads() -> None:
    """The command under way ends without waiting for the threads it leaves behind."""
    _abandoned.set()


_abandoned = threading.Event()


def _unraisable(report):
    """What Python cannot raise, in a destructor or a callback.

    A Ctrl-C is sent again, or it would be lost. Not shown is what Orbax leaves behind: a read or write that ends
    after another has failed finds its loop closed.
    """
    if issubclass(report.exc_type, KeyboardInterrupt):
        threading.Thread(target=_interrupt_again, daemon=True).start()
    elif not (isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(report)


def _interrupt_again():
    while _reports():  # where it would be lost once more
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def _reports():
    """Whether the main thread is still within :func:`_unraisable`."""
    stack = traceback.walk_stack(sys._current_frames().get(threading.main_thread().ident))
    return any(frame.f_code is _unraisable.__code__ for frame, _ in stack)


def _silence_stdout():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned columns: the first to the left, the others to the right; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
