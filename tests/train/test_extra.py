"""Without the extra ``train`` a program of it says so, before it imports what is missing."""

import runpy

import pytest

from train import extra


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", ["train.imagenet", "train.evaluate", "train.demo"])
def test_a_missing_package_is_named(module, monkeypatch, capsys):
    monkeypatch.setattr(extra, "PACKAGES", ("optax", "no_such_package"))
    with pytest.raises(SystemExit) as error:
        runpy.run_module(module, run_name="__main__")
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: {module} needs no_such_package: pip install 'res2net_jax[train]'\n"
