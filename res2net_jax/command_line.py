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
from typing import TextIO

from tqdm import tqdm

from res2net_jax.files import first_line, out_of_memory

# What bad input, a missing extra, the network or the disk raise. Anything else, but for a lack of memory, is a defect
# and shows its traceback.
EXPECTED = (ValueError, OSError, ImportError)


def main(command: Callable[[list[str]], int | None]) -> None:
    """Runs ``command`` on the arguments and exits.

    The exit code is 0 when done, 2 for a mistake or a failure that is explained, and otherwise what ``command``
    returns. Interrupted or terminated, the process clears up and ends by the signal, which a shell reports as 130 or
    143. ``--debug`` anywhere shows the traceback of the failure as well.
    """
    with _clearing_up_at_sigterm():
        _run(command)


def _run(command):
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
        silence_stdout()
    except KeyboardInterrupt:
        sys.excepthook = lambda *_: None
        raise  # so that Python ends by the signal, and with it a shell's loop around this command
    except Exception as error:
        full = out_of_memory(error)
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's
            error = ValueError(
                "a path begins with ~, and that home folder is not known; give the whole path, or set HOME"
            )
        if debug or not (full or isinstance(error, EXPECTED)):
            raise
        advice = f"not enough memory ({first_line(error)}); a smaller --batch-size, or fewer pixels, need less"
        say(f"error: {advice if full else error}", sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            silence_stdout()  # which was itself what failed, e.g. on a full disk
        code = 2
    try:
        sys.stderr.flush()
    except OSError:  # nobody reads it; Python would end with code 120
        _silence(sys.stderr)
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


class _Terminated(KeyboardInterrupt):
    """A SIGTERM. Libraries let it pass as they do a Ctrl-C."""


_terminated = False


@contextlib.contextmanager
def _clearing_up_at_sigterm():
    """SIGTERM unwinds the stack, so that no half-written file is left, and then ends the process as it always does."""
    global _terminated
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    _terminated = False
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if _terminated:  # and nothing else waited for: a thread of JAX may be in the middle of a batch
            os.kill(os.getpid(), signal.SIGTERM)


def _terminate(*_):
    global _terminated
    if not _terminated:  # a second one, as timeout sends it, would stop the clearing up
        _terminated = True
        raise _Terminated


def _unraisable(report):
    """What Python cannot raise, in a destructor or a callback.

    A Ctrl-C or SIGTERM is sent again, or it would be lost. Not shown is what Orbax leaves behind: a read or write that
    ends after another has failed finds its loop closed.
    """
    global _terminated
    if issubclass(report.exc_type, _Terminated):
        _terminated = False
        threading.Thread(target=_send_again, args=[signal.SIGTERM], daemon=True).start()
    elif issubclass(report.exc_type, KeyboardInterrupt):
        threading.Thread(target=_send_again, args=[signal.SIGINT], daemon=True).start()
    elif not (isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(report)


def _send_again(signum):
    while _reports():  # where it would be lost once more
        time.sleep(0.01)
    os.kill(os.getpid(), signum)


def _reports():
    """Whether the main thread is still within :func:`_unraisable`."""
    stack = traceback.walk_stack(sys._current_frames().get(threading.main_thread().ident))
    return any(frame.f_code is _unraisable.__code__ for frame, _ in stack)


def say(message: str, file: TextIO | None = None) -> None:
    """Prints a line above any progress bar. A log file on a full disk is no reason to fail."""
    file = file or sys.stdout
    with contextlib.suppress(OSError):
        tqdm.write(message, file=file)
        file.flush()


def silence_stdout() -> None:
    """What is still written to standard output is lost, without an error."""
    _silence(sys.stdout)


def _silence(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned columns: the first to the left, the others to the right; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
