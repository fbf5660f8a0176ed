"""The program: python -m train.imagenet [RECIPE] [--switch value ...]

It trains until the last epoch, saving as it goes. The same command resumes a run that was stopped in any way. On
the same devices it ends with the same parameters, bit for bit, as a run that never was (on GPUs with deterministic
operations).

Exit codes: 0 done. 2 a mistake in the command, the data or the checkpoints. 3 the loss became NaN or
infinite. 4 the last state could not be saved. 130 Ctrl-C and 143 SIGTERM: saved; the same command resumes.
"""

if __name__ == "__main__":  # which starts anew, so before the imports
    from train.extra import require_extra
    from train.huge_pages import use_huge_pages

    require_extra("train.imagenet")
    use_huge_pages("train.imagenet")

import contextlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from res2net_jax import command_line
from res2net_jax.backend import compiler_options, use_compilation_cache
from res2net_jax.files import require_checkpoint_path
from train import devices, rehearsal
from train.checkpoints import Checkpoints, NotSaved
from train.claim import claim
from train.config import Config, parse, to_json, write_json
from train.data import eval_batches, steps_per_epoch, train_batches
from train.duplicates import warn_of_duplicates
from train.mistakes import draw_mistakes
from train.report import Report
from train.signals import StopRequest
from train.start import (
    build_model,
    checksums,
    introduction,
    open_splits,
    preprocessing,
    require_agreement,
    require_countable,
    require_divisible,
    require_same_weights,
)
from train.step import evaluated, init_state, make_eval_step, make_train_step, zero_sums

DIVERGED, NOT_SAVED = 3, 4


class Diverged(ArithmeticError):
    """The loss, the gradient or the weights are no longer finite."""


def main(config: Config, stop: StopRequest) -> int:
    """Trains as ``config`` says, in each process of the run, and returns the exit code.

    Raises:
        ValueError: A config that does not fit the data, the devices, or the run found in ``config.output``.
        FileNotFoundError: There is no such data.
    """
    require_checkpoint_path(config.output)
    with contextlib.ExitStack() as opened:
        return _run(config, stop, opened)


def _run(config, stop, opened):
    # ---- Mesh: one axis, along which a batch is spread; the state is on every device.
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = devices.data_mesh()
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    require_divisible(config)

    def place(batch: dict) -> dict:
        # The flag travels with the batch, so that all processes learn of a signal to one of them at the same step.
        flags = np.full(jax.local_device_count(), stop.signum, np.int32)
        return devices.global_arrays({**batch, "stop": flags}, sharded)

    # ---- Data
    if config.fake_data:
        train_set = eval_set = rehearsal.fake_dataset()
    else:
        train_set, eval_set = devices.together(lambda: open_splits(config))
    require_agreement(to_json(config), {"pictures to learn from": train_set, "pictures to evaluate on": eval_set})
    epoch = steps_per_epoch(train_set, config.batch_size)
    require_countable(config, epoch)
    total = min(config.epochs * epoch, config.steps or math.inf)

    # ---- Model
    model = devices.together(lambda: build_model(config, train_set))
    setting = model.preprocessing = preprocessing(config, model)
    train_step = jax.jit(
        make_train_step(model, config, epoch, setting.mean, setting.std),
        donate_argnums=0,
        out_shardings=(replicated, replicated),
        compiler_options=compiler_options(),
    )
    eval_step = jax.jit(
        make_eval_step(model, config, setting.mean, setting.std, eval_set.class_subset),
        out_shardings=replicated,
        compiler_options=compiler_options(),
    )

    # ---- State: fresh, or as the run in config.output left it.
    require_same_weights(model)
    state = devices.global_arrays(init_state(model, config), replicated)
    if config.dry_run:
        rehearsal.dry_run(config, model, state, train_step, eval_step, place, train_set, epoch)
        return 0
    if config.fake_data:
        rehearsal.time_steps(config, state, train_step, place)
        return 0
    output = Path(config.output).expanduser()
    if signum := opened.enter_context(claim(output, stop)):
        return 128 + signum
    checkpoints = Checkpoints(
        output / "checkpoints",
        config,
        model,
        examples=len(train_set),
        checksums=checksums(config, model, train_set, eval_set),
    )
    opened.callback(checkpoints.close)
    restored = checkpoints.restore(state)
    state, saved = restored or (state, {})
    evaluation = saved.get("evaluation")
    done = int(state["step"])
    first = jax.process_index() == 0

    # ---- Loop
    devices.together(lambda: write_json(config, output / "config.json") if first else None)
    report = devices.together(
        lambda: Report(
            output,
            config,
            start=done,
            total=total,
            steps_per_epoch=epoch,
            window=saved.get("window", ()),  # which earlier versions did not save
            visible=first,
        )
    )
    opened.callback(report.close)
    report.say(introduction(config, model, train_set, eval_set, epoch, done, total))
    if first:
        warn_of_duplicates(train_set, eval_set)
    # It decodes the first batches while the step compiles.
    batches = train_batches(
        train_set,
        size=config.size,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        augment=config.augment,
        start=done,
        workers=config.workers,
        **share,
    )
    opened.callback(batches.close)
    batches.start_prefetch()

    def evaluate() -> tuple[dict | None, dict, int]:
        held_out = eval_batches(
            eval_set,
            preprocessing=setting,
            batch_size=config.eval_images // jax.process_count(),
            workers=config.workers,
            **share,
        )
        zeros = devices.global_arrays(zero_sums(config), replicated)
        with report.paused(), contextlib.closing(held_out), devices.room_to_evaluate(config.eval_images):
            return run_evaluation(eval_step, evaluated(state), map(place, devices.in_step(held_out)), zeros)

    # Stopped in the middle of an evaluation, a run begins with it.
    evaluation_due = evaluation is None and _is_evaluated(done, total, epoch, config)
    save_due, signum, pending, answers = False, 0, None, {}
    try:
        while True:
            if evaluation_due or save_due or signum:
                # Nothing is saved before its step is known to have gone well.
                signum, pending = _settle(pending, report) or signum, None
                evaluation = None
                if evaluation_due:
                    report.flush(done)
                if evaluation_due and not signum:
                    try:
                        evaluation, answers, signum = evaluate()
                    except Exception as error:  # a picture that cannot be read, say
                        if not devices.alone(error):
                            checkpoints.finish(done, state, report.window)
                        raise
                if signum:
                    checkpoints.finish(done, state, report.window)
                    report.say(f"Saved at step {done} of {total}; the same command continues from here.")
                    return 128 + signum
                if evaluation:
                    report.evaluation(done, evaluation)
                    if done >= total and first:
                        draw_mistakes(output, eval_set, model, answers)
                checkpoints.save(done, state, report.window, evaluation)
            if done >= total:
                break
            try:
                with report.waiting():
                    batch = next(batches)
            except Exception as error:  # many pictures in a row that cannot be read, say, or no memory to decode them
                if not devices.alone(error):
                    _settle(pending, report)
                    checkpoints.finish(done, state, report.window)
                raise
            state, metrics = train_step(state, place(batch))
            done += 1
            # The metrics of the step before are read while this one runs: the devices never wait for the host.
            signum, pending = _settle(pending, report), (done, metrics)
            evaluation_due = _is_evaluated(done, total, epoch, config)
            save_due = checkpoints.due(done)
        if not checkpoints.wait():
            checkpoints.finish(done, state, report.window, evaluation)
        report.summary(checkpoints.folder, devices.total(batches.replaced))
        return 0
    except Diverged as error:
        hint = "A smaller --lr, a longer --warmup-epochs or --clip-norm may help"
        return _fail(f"{error}. {checkpoints.folder} keeps what was good. {hint}", DIVERGED)
    except NotSaved as error:
        return _fail(error, NOT_SAVED)
    except Exception as error:
        if devices.alone(error):
            checkpoints.close()
            devices.leave(error)
        raise


def run_evaluation(
    eval_step: Callable, weights: dict, batches: Iterable[dict], sums: dict
) -> tuple[dict[str, float] | None, dict[str, np.ndarray], int]:
    """The result over all batches, the answers and 0; or None, {} and the signal that came in between.

    A result is ``top1`` and ``top5`` in per cent, the mean ``loss``, and ``count``, the number of examples. The answers
    are those of :func:`train.step.make_eval_step`, of all examples in the order of the data set, in every process.
    """
    answers = []
    for batch in batches:
        before, (sums, batch_answers) = sums, eval_step(weights, batch, sums)
        answers.append(batch_answers)
        if signum := int(before["stop"]):
            return None, {}, signum
    sums, answers = jax.device_get((sums, answers))
    if sums["stop"]:
        return None, {}, int(sums["stop"])
    count = int(sums["count"])
    accuracies = {name: 100 * int(sums[name]) / count for name in ("top1", "top5")}
    # Only the end is padded: process p holds the p-th share of each batch, in the order of the data set.
    answers = {name: np.concatenate([batch[name] for batch in answers])[:count] for name in answers[0]}
    return {**accuracies, "loss": float(sums["loss"]) / count, "count": count}, answers, 0


def command(arguments: list[str]) -> int:
    """Runs the command line and returns the exit code."""
    config = parse(arguments, "python -m train.imagenet")
    jax.config.update("jax_enable_preemption_service", False)  # It would take SIGTERM for itself.
    # Not yet with the request to stop: there is nothing to save while a process waits for the others.
    devices.connect(config.coordinator, config.num_processes, config.process_id)
    stop = StopRequest()
    # A rehearsal has nothing to save: there a signal ends the process as it always does.
    with contextlib.nullcontext() if config.dry_run or config.fake_data else stop:
        return main(config, stop)


def _settle(pending, report):
    """Waits for a step, reports it, and returns the signal that some process got before it (0: none)."""
    if pending is None:
        return 0
    step, metrics = pending
    metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
    if not metrics["finite"]:
        raise Diverged(
            f"step {step}: NaN or infinity; the loss is {metrics['loss']}, the gradient's norm {metrics['grad_norm']}"
        )
    report.step(step, metrics)
    return int(metrics["stop"])


def _is_evaluated(done, total, epoch, config):
    return done > 0 and (done % (epoch * config.eval_every) == 0 or done >= total)


def _fail(error, code):
    command_line.say(f"error: {error}", sys.stderr)
    return code


if __name__ == "__main__":
    use_compilation_cache()
    command_line.main(command)
