import os
import re
import signal
import subprocess
import sys

from .conftest import ROOT


def test_demo_learns_the_digits_and_shows_it(tmp_path, optimized):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    # Without torch: an import of it fails.
    (tmp_path / "torch.py").write_text("raise ImportError('the demo needs no torch')")
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "train.demo"]
    (tmp_path / "demo").mkdir()
    for argument, code in (("--help", 0), ("--epochs", 2)):
        assert (
            subprocess.run([*command, argument], cwd=tmp_path, env=environment, capture_output=True).returncode == code
        )
    assert not list((tmp_path / "demo").iterdir())
    interrupted = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert any("epoch 1.00: top-1" in line for line in interrupted.stdout)
    interrupted.send_signal(signal.SIGTERM)
    assert interrupted.wait() == 128 + signal.SIGTERM
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert "Resuming at step" in result.stdout
    trained = float(re.search(r"^Done: top-1 ([\d.]+) %", result.stdout, re.MULTILINE)[1])
    loaded = float(re.search(r"res2net_jax.load: .* right, ([\d.]+) %", result.stdout)[1])
    assert loaded == trained >= 98
    for picture in ("curves.png", "predictions.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 10_000
