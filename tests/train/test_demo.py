import os
import re
import subprocess
import sys

from .conftest import ROOT


def test_demo_learns_the_digits_and_shows_it(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # Without torch: an import of it fails.
    (tmp_path / "torch.py").write_text("raise ImportError('the demo needs no torch')")
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "train.demo"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    trained = float(re.search(r"^Done: top-1 ([\d.]+) %", result.stdout, re.MULTILINE)[1])
    loaded = float(re.search(r"res2net_jax.load: .* right, ([\d.]+) %", result.stdout)[1])
    assert loaded == trained >= 98
    for picture in ("curves.png", "predictions.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 10_000
