import subprocess
import sys

import pytest

PROGRAM = """
import os, pathlib, sys
from train import huge_pages
huge_pages.ENABLED = pathlib.Path(sys.argv[1])
print("started", end=" ", flush=True)
huge_pages.use_huge_pages()
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
    arguments = [sys.executable, "-c", PROGRAM, enabled, "a", "b"]
    assert subprocess.check_output(arguments, text=True).split() == expected.split()
