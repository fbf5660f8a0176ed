import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from res2net_jax import backend
from train import huge_pages

PROGRAM = """
import os, pathlib, sys
from train import huge_pages
huge_pages.ENABLED = pathlib.Path(sys.argv[1])
print("started", end=" ", flush=True)
huge_pages.use_huge_pages("program")
print(*sys.argv[2:], os.environ.get("GLIBC_TUNABLES"))
"""
ONE = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("kernel", "tunables", "expected"),
    [
        ("always [madvise] never", None, f"started started a b {ONE}"),
        ("always [madvise] never", "glibc.malloc.check=0", f"started started a b glibc.malloc.check=0:{ONE}"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "started a b glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "started a b None"),
        (None, None, "started a b None"),
    ],
)
def test_starts_once_more_where_it_helps(tmp_path, monkeypatch, kernel, tunables, expected):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    enabled = tmp_path / "enabled"
    if kernel:
        enabled.write_text(kernel)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)]))
    arguments = [sys.executable, "-m", "program", enabled, "a", "b"]
    assert subprocess.check_output(arguments, text=True).split() == expected.split()


def test_a_program_that_runs_the_module_lives_on(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "enabled")
    huge_pages.ENABLED.write_text("always [madvise] never")
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("the process was replaced"))
    monkeypatch.setattr(backend, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["train.imagenet", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("train.imagenet", run_name="__main__")
    assert not ended.value.code
