"""What people see of a run: progress bar, TensorBoard, metrics.csv, curves.png, and a summary."""

import contextlib
import csv
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from res2net_jax.command_line import say
from res2net_jax.files import first_line
from train.config import Config

# tensorboardX imports torch if it is installed, for what is not used here: half of the program's start.
_torch = sys.modules.setdefault("torch", None)
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
finally:
    if _torch is None:
        del sys.modules["torch"]

COLUMNS = (
    *("step", "epoch", "lr", "loss", "top1", "grad_norm", "images_per_s", "data_wait"),
    *("val_loss", "val_top1", "val_top5", "val_count", "seconds"),
)


class Report:
    """Takes each step's metrics and each evaluation's result; process 0 shows and stores them.

    ``metrics.csv`` has a row every ``log_every`` steps and before an evaluation (means over the steps since;
    ``data_wait`` is the share of the time in which the step waited for pictures) and one for each evaluation
    (``val_*``). Accuracies are per cent. After a resume the rows beyond ``start`` are dropped: they will come again.

    Args:
        folder: Where the files go.
        config: The run's config.
        start: Steps already done.
        total: Steps of the whole run.
        steps_per_epoch: Steps in an epoch.
        window: That of the checkpoint that the run continues from.
        visible: Whether this process reports at all.

    Attributes:
        window: The metrics of the steps since the last row, for a checkpoint to keep.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        start: int,
        total: int,
        steps_per_epoch: int,
        window: Sequence[dict[str, float]] = (),
        visible: bool = True,
    ):
        self._file = folder / "metrics.csv"
        self._folder = folder
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = config.batch_size
        self._log_every = config.log_every
        self._visible = visible
        self._total = total
        self.window = list(window)
        self._warm = False
        self._began = time.perf_counter()
        self._restart_clock()
        self._board = None
        self.rows = []
        self._stored = False
        if visible:
            folder.mkdir(parents=True, exist_ok=True)
            self.rows = [row for row in read_rows(self._file) if int(row["step"]) <= start]
            self._rewrite()
        # On a terminal there is a bar; in a log file, a line for each row.
        self._bar = tqdm(total=total, initial=start, unit="step", disable=None if visible else True, smoothing=0.05)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as spent waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the rates."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of ``step``, the number of steps done."""
        self.window.append({name: metrics[name] for name in ("loss", "top1", "grad_norm", "lr")})
        self._bar.update()
        self._timed += 1
        if not self._warm:
            self._warm = True  # The first step compiled; its time says nothing about the others.
            self._restart_clock()
        if step % self._log_every == 0:
            self._log(step)

    def flush(self, step: int) -> None:
        """Adds a row for the steps since the last one, if there are any; or short runs would have none."""
        if self.window:
            self._log(step)

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        """Adds an evaluation's ``loss``, ``top1``, ``top5`` and ``count``, and draws the curves anew."""
        self._add(step, {f"val_{name}": result[name] for name in ("loss", "top1", "top5", "count")})
        if self._visible:
            self.say(
                f"step {step}, epoch {step / self._steps_per_epoch:.2f}: top-1 {result['top1']:.2f} %, top-5 "
                f"{result['top5']:.2f} %, loss {result['loss']:.4f} on {result['count']} examples"
            )
            self._draw()

    def say(self, message: str) -> None:
        """Prints above the bar."""
        if self._visible:
            say(message)

    def summary(self, checkpoints: Path, replaced: int) -> None:
        """Says how the run went: accuracy, time, pictures that could not be read, and where everything is."""
        last = [row for row in self.rows if row["val_top1"]]
        if not last:
            return
        # The last of equals, as Orbax keeps it.
        best = max(reversed(last), key=lambda row: float(row["val_top1"]))
        self.say(
            f"Done: top-1 {float(last[-1]['val_top1']):.2f} %, top-5 {float(last[-1]['val_top5']):.2f} %; best top-1 "
            f"{float(best['val_top1']):.2f} % at step {best['step']}; {time.perf_counter() - self._began:.0f} s here"
        )
        if replaced:
            self.say(f"{replaced} pictures could not be read and were replaced; they are named above")
        of_the_best = "" if best is last[-1] else f', the best: load("{checkpoints / str(best["step"])}")'
        self.say(f'Weights: res2net_jax.load("{checkpoints}"){of_the_best}. Curves: {self._folder / "curves.png"}')

    def close(self) -> None:
        """Puts the files in their final state."""
        self._bar.close()
        if self._visible and self.rows:
            self._store()
            self._draw()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def _log(self, step):
        seconds = time.perf_counter() - self._clock
        row = {name: sum(m[name] for m in self.window) / len(self.window) for name in ("loss", "top1", "grad_norm")}
        row["top1"] *= 100
        row["lr"] = self.window[-1]["lr"]
        told = f"loss {row['loss']:.4f}"
        if self._timed:
            row["images_per_s"] = self._timed * self._batch_size / seconds
            row["data_wait"] = self._waited / seconds
            told += f", {row['images_per_s']:.0f} img/s, waiting for data {row['data_wait']:.0%}"
        self.window = []
        self._restart_clock()
        self._add(step, row)
        self._bar.set_postfix_str(told)
        if self._visible and self._bar.disable:
            left = ""
            if "images_per_s" in row:
                remaining = (self._total - step) * self._batch_size / row["images_per_s"]
                left = f", {tqdm.format_interval(remaining)} left"
            epoch = step / self._steps_per_epoch
            say(f"step {step}/{self._total}, epoch {epoch:.2f}: {told}, lr {row['lr']:.2e}{left}")

    def _restart_clock(self):
        self._clock, self._waited, self._timed = time.perf_counter(), 0.0, 0

    def _add(self, step, values):
        if not self._visible:
            return
        row = {name: "" for name in COLUMNS}
        row |= {"step": step, "epoch": f"{step / self._steps_per_epoch:.3f}"}
        row |= {name: _short(value) for name, value in values.items()}
        row["seconds"] = f"{time.perf_counter() - self._began:.1f}"
        self.rows.append(row)
        self._store(row)

    def _store(self, row=None):
        """Appends ``row`` to the files. A full disk does not stop a run: once there is room, all rows are written."""
        try:
            if not self._stored:
                self._rewrite()
            elif row:
                with self._file.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS).writerow(row)
                self._board.write_event(_event(row))
                self._board.flush()
        except OSError as error:
            if self._stored:
                self._warn(error)
            self._stored = False

    def _rewrite(self):
        temporary = self._file.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self._file)
        # Written from here, not from a thread as SummaryWriter does: when that dies of a full disk, the run hangs.
        folder = self._folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._board = EventsWriter(str(folder / "events"))
        for row in self.rows:
            self._board.write_event(_event(row))
        self._board.flush()
        self._stored = True

    def _draw(self):
        try:
            draw_curves(self.rows, self._folder / "curves.png")
        except Exception as error:  # a font that is not there is no reason to end a run either
            self._warn(first_line(error))

    def _warn(self, error):
        say(f"WARNING: metrics and curves cannot be written ({error}); the run continues", sys.stderr)


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, but for one that a kill cut short; none if there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row.get("seconds") not in (None, "")]


def draw_curves(rows: list[dict[str, str]], file: Path) -> None:
    """Loss, top-1 error and learning rate over the epochs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, error, rate = figure.subplots(1, 3)
    for axes, title, train, validation in (
        (loss, "Loss", "loss", "val_loss"),
        (error, "Top-1 error (%)", "top1", "val_top1"),
    ):
        for column, label, style in ((train, "training", "-"), (validation, "validation", "o-")):
            epochs, values = _column(rows, column)
            if column.endswith("top1"):
                values = [100 - value for value in values]
            axes.plot(epochs, values, style, label=label, linewidth=1.5, markersize=3)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    rate.plot(*_column(rows, "lr"), color="tab:gray")
    rate.set_title("Learning rate")
    rate.set_ylim(bottom=0)
    for axes in (loss, error, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    temporary = file.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, file)


def _event(row):
    """The row for TensorBoard: one scalar for each filled column."""
    scalars = []
    for name in COLUMNS[2:-1]:
        if row[name] not in ("", None):
            tag = f"validation/{name[4:]}" if name.startswith("val_") else f"train/{name}"
            scalars.append(Summary.Value(tag=tag, simple_value=float(row[name])))
    return Event(wall_time=time.time(), step=int(row["step"]), summary=Summary(value=scalars))


def _column(rows, name):
    found = [row for row in rows if row[name] not in ("", None)]
    return [float(row["epoch"]) for row in found], [float(row[name]) for row in found]


def _short(value):
    return value if isinstance(value, int) else f"{value:.6g}"
