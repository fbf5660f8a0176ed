"""What all commands share: one line for a user's mistake, a traceback for ours."""

import contextlib
import os
import sys
from collections.abc import Callable

from res2net_jax.files import first_line, out_of_memory

# What bad input, a missing extra, the network or the disk raise. Anything else, but for a lack of memory, is a defect
# and shows its traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError)


def main(command: Callable[[list[str]], int | None]) -> None:
    """Runs ``command`` on the arguments and exits.

    The exit code is 0 when done, 2 for a mistake or a failure that is explained, 130 when interrupted, and otherwise
    what ``command`` returns. ``--debug`` anywhere shows the traceback of the failure as well.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be what the terminal cannot show
    sys.unraisablehook = _unraisable
    try:
        code = command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, e.g. head, has seen enough
        _silence_stdout()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        full = out_of_memory(error)
        if debug or not (full or isinstance(error, EXPECTED)):
            raise
        advice = f"not enough memory ({first_line(error)}); a smaller --batch-size, or fewer pixels, need less"
        print(f"error: {advice if full else error}", file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.exit(2)
        _silence_stdout()  # which was itself what failed, e.g. on a full disk
        sys.exit(2)
    else:
        if code:
            sys.exit(code)


def _unraisable(report):
    """All but what Orbax leaves behind: a read or write that ends after another has failed finds its loop closed."""
    if not (isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(report)


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
