"""Where results go: a CSV for programs, a table with device and versions for people."""

import csv
import os
import platform
import re
from pathlib import Path

import jax

from res2net_jax.command_line import table
from res2net_jax.files import versions

FOLDER = Path("benchmarks/results")


def write(
    task: str,
    rows: list[tuple[str, ...]],
    remark: str,
    packages: tuple[str, ...],
    folder: Path = FOLDER,
    *,
    on_host: bool = False,
) -> str:
    """Writes ``FOLDER/TASK-DEVICE.csv`` and ``.txt``, and returns the text.

    Args:
        rows: The first is the header.
        on_host: It was measured on the processor, whatever JAX computes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured_on = jax.devices("cpu" if on_host else None)[0]
    stem = folder / f"{task}-{kind(measured_on)}"
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows(rows)
    about = [
        f"{task} on {device(measured_on)}; {remark}",
        ", ".join(f"{name} {version}" for name, version in versions(*packages).items()),
    ]
    if tunables := os.environ.get("GLIBC_TUNABLES"):
        about.append(f"GLIBC_TUNABLES={tunables}")
    text = "\n".join([*about, "", table(rows), ""])
    stem.with_suffix(".txt").write_text(text)
    return text


def read(task: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    """The rows that :func:`write` wrote on this kind of device."""
    with open(folder / f"{task}-{kind()}.csv", newline="") as file:
        return list(csv.DictReader(file))


def kind(device: jax.Device | None = None) -> str:
    """``cpu``, or the accelerator's name as a part of a file name; by default of what JAX computes on."""
    device = device or jax.devices()[0]
    return "cpu" if device.platform == "cpu" else device.device_kind.replace(" ", "-").lower()


def device(first: jax.Device) -> str:
    """The processor's or accelerator's name."""
    if first.platform != "cpu":
        return f"{jax.device_count()} x {first.device_kind}"
    try:
        processors = Path("/proc/cpuinfo").read_text().strip().split("\n\n")
        facts = dict(re.findall(r"^(.+?)\s*: (.*)$", processors[0], re.MULTILINE))
        # A virtual machine may hide the model's name, but EPYCs of families 25 and 26 differ by a factor of two.
        name = f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
        vectors = "AVX-512" if "avx512f" in facts["flags"] else "no AVX-512"
        return f"{len(processors)} cores of {name}, {vectors}"
    except (OSError, KeyError):  # another system or kind of processor
        return platform.processor()
