"""However a run is stopped, the same command ends in the same bits and sees the same examples in the same order."""

import dataclasses
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from train import imagenet
from train.config import RECIPES
from train.report import read_rows
from train.signals import StopRequest

from .conftest import arrays, batches, printed, steps

# Between steps and between batches of an evaluation, in seconds; or a run would be over before a signal hits it.
PAUSES = {"STEP_PAUSE": "0.02", "EVALUATION_PAUSE": "0.1"}
SWITCHES = ("--checkpoint-every", 7, "--mixup", 0.2, "--ema", 0.99)


@pytest.fixture(autouse=True)
def with_pictures(monkeypatch):
    """A signal may come while they are drawn."""
    monkeypatch.setenv("DRAW", "1")


@pytest.fixture(scope="module")
def uninterrupted():
    """Number of processes -> the folder of a run that nothing disturbed."""
    return {}


@pytest.fixture
def reference(finish, uninterrupted, tmp_path_factory):
    def reference(processes):
        if processes not in uninterrupted:
            output = tmp_path_factory.mktemp("reference") / "run"
            began = time.monotonic()
            finish(output, *SWITCHES, processes=processes, **PAUSES)
            uninterrupted[processes] = output, time.monotonic() - began
        return uninterrupted[processes]

    return reference


def assert_same(output, reference):
    expected, found = arrays(reference), arrays(output)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []
    # Steps that were lost with a kill are done again; with the same examples, or there were two digests.
    assert batches(output) == batches(reference)
    assert (output / "curves.png").stat().st_size > 10_000
    timed = ("images_per_s", "data_wait", "seconds")
    rows, others = (read_rows(run / "metrics.csv") for run in (output, reference))
    without_times = [[{name: row[name] for name in row if name not in timed} for row in run] for run in (rows, others)]
    assert without_times[0] == without_times[1]


def stopped(together, kind, seconds, randomness):
    """Whether the signal came before the processes ended by themselves; afterwards all have ended."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in together) and time.monotonic() < end:
        time.sleep(0.01)
    if kind == signal.SIGKILL:
        for process in together:
            process.kill()
    else:
        # To one of them only; the others learn of it.
        first = randomness.choice(together)
        first.send_signal(kind)
        if first.wait(300) == -kind:
            # It had yet to import; then no handler was there, and the others wait for it.
            for process in together:
                process.kill()
    codes = {process.wait(300) for process in together}
    assert codes <= ({0, -9} if kind == signal.SIGKILL else {0, 143, -9, -15}), codes
    return codes != {0}


def check_random_moments(launch, reference, folder, kinds, processes):
    """Stops runs by these signals at random moments; whenever a run is through, checks it and begins another."""
    undisturbed, duration = reference(processes)
    randomness = random.Random(f"{kinds}{processes}")
    runs = [folder / f"run{number}" for number in range(10 * len(kinds))]
    output = runs.pop(0)
    while kinds:
        together = launch(output, *SWITCHES, processes=processes, **PAUSES)
        # That of a run that also compiled, which the others find in the cache.
        if stopped(together, kinds[0], randomness.uniform(0.1 * duration, 0.5 * duration), randomness):
            kinds = kinds[1:]
        else:
            assert_same(output, undisturbed)
            output = runs.pop(0)
    for process in launch(output, *SWITCHES, processes=processes):
        assert process.wait(300) == 0, printed(output)
    assert_same(output, undisturbed)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_random_moments(launch, reference, tmp_path, processes):
    # Of two processes the one that they must agree on; the other kinds are soak's.
    check_random_moments(launch, reference, tmp_path, [[signal.SIGKILL, signal.SIGTERM][processes - 1]], processes)


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_twenty_random_moments(launch, reference, tmp_path, kind, processes):
    check_random_moments(launch, reference, tmp_path, [kind] * 20, processes)


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def go_on(log):
    """Ends the wait of a run that was launched with HOLD; a signal that was sent before has arrived by then."""
    Path(f"{log}.go").touch()


def test_sigterm_during_an_evaluation_saves_at_once_and_evaluates_again(launch, reference, tmp_path):
    output = tmp_path / "run"
    log = tmp_path / "run.log"
    (process,) = launch(output, *SWITCHES, HOLD="evaluated")
    wait_for(lambda: log.exists() and "evaluated" in log.read_text(), process)
    process.terminate()
    go_on(log)
    assert process.wait(300) == 143, printed(output)
    # Twelve batches make an evaluation.
    assert log.read_text().count("evaluated") < 6
    assert steps(output)[-1] == 45
    assert not any(row["val_top1"] for row in read_rows(output / "metrics.csv"))
    for process in launch(output, *SWITCHES):
        assert process.wait(300) == 0, printed(output)
    assert log.read_text().count("evaluation") == 3
    assert_same(output, reference(1)[0])


@pytest.mark.parametrize("killed", ["before the new one was there", "after it was"])
def test_a_kill_while_a_step_is_saved_again(launch, tmp_path, killed):
    """With its evaluation, once that is done: the old one must not go before the new one is there."""
    switches = (*SWITCHES, "--steps", 4)
    log, folder = tmp_path / "run.log", tmp_path / "run" / "checkpoints"
    (process,) = launch(tmp_path / "run", *switches, HOLD="evaluated")
    wait_for(lambda: log.exists() and "evaluated" in log.read_text(), process)
    process.terminate()
    go_on(log)
    assert process.wait(300) == 143, printed(tmp_path / "run")
    if killed == "after it was":
        shutil.copytree(folder / "4", folder / "4.old")
    else:
        (folder / "4").rename(folder / "4.old")
        (folder / "4.orbax-checkpoint-tmp").mkdir()
    foreign = [folder / "notes.old" / "text", folder / "notes" / "text"]
    for file in foreign:
        file.parent.mkdir()
        file.touch()
    (process,) = launch(tmp_path / "run", *switches)
    assert process.wait(300) == 0, printed(tmp_path / "run")
    assert "Resuming at step 4 of 4" in printed(tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == ["4", "notes", "notes.old"]
    assert all(file.exists() for file in foreign)


def test_the_old_one_is_there_while_a_step_is_saved_again(tmp_path, monkeypatch):
    config = dataclasses.replace(
        RECIPES["digits"](), layers=(1,), channels=(8,), scale=2, size=16, steps=2, output=str(tmp_path / "run")
    )
    evaluate, seen = imagenet.run_evaluation, []
    monkeypatch.setattr(imagenet, "run_evaluation", lambda *_: (None, {}, signal.SIGTERM))
    with StopRequest() as stop:
        assert imagenet.main(config, stop) == 143
    folder = tmp_path / "run" / "checkpoints"
    first = arrays(tmp_path / "run", 2)
    save = ocp.training.Checkpointer.save_checkpointables_async

    def watched(checkpointer, *arguments, **options):
        seen.extend(path.name for path in folder.iterdir())
        return save(checkpointer, *arguments, **options)

    monkeypatch.setattr(imagenet, "run_evaluation", evaluate)
    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", watched)
    with StopRequest() as stop:
        assert imagenet.main(config, stop) == 0
    assert seen == ["2.old"] and [path.name for path in folder.iterdir()] == ["2"]
    again = arrays(tmp_path / "run", 2)
    assert first.keys() == again.keys() and all(np.array_equal(first[name], again[name]) for name in first)


def test_sigterm_during_the_compilation_saves_after_it(launch, reference, tmp_path):
    output = tmp_path / "run"
    # It compiles between the first step's batch and the second's.
    (process,) = launch(output, *SWITCHES, cache=False, HOLD="step 2 ")
    log = tmp_path / "run.log"
    wait_for(lambda: log.exists() and "step 1 " in log.read_text(), process)
    process.terminate()
    go_on(log)
    assert process.wait(300) == 143, printed(output)
    # The flag goes with step 2, and is read while step 3 runs.
    assert steps(output)[-1] <= 3
    for process in launch(output, *SWITCHES):
        assert process.wait(300) == 0, printed(output)
    assert_same(output, reference(1)[0])


def test_ctrl_c_saves_too(launch, tmp_path):
    output = tmp_path / "run"
    (process,) = launch(output, *SWITCHES, HOLD="step 15 ")
    log = tmp_path / "run.log"
    wait_for(lambda: log.exists() and "step 15 " in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    go_on(log)
    assert process.wait(300) == 130, printed(output)
    # The flag goes with step 15, and is read while step 16 runs.
    assert steps(output)[-1] == 16
    assert "the same command continues from here" in printed(output)


def test_a_run_that_is_done_stays_as_it_is(finish, reference):
    output, _ = reference(1)
    before = arrays(output)
    finish(output, *SWITCHES)
    after = arrays(output)
    assert all(np.array_equal(before[name], after[name]) for name in before)
