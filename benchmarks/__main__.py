"""Speed beside what else one could use, as a ratio in one run: ``python -m benchmarks TASK``.

    inference     forward passes, beside timm (eager and torch.compile), zeromodels (Keras on JAX), ONNX Runtime
    train         training steps, beside timm (eager and torch.compile)
    startup       a fresh process, from its start to the first answer, beside timm
    input         training pictures per second of one worker's core, beside torchvision's DataLoader
    compilation   seconds to compile and memory, of 50 and of 101 layers
    scaling       what the devices tell each other in a training step, read from the compiled program
    kernels       where the time of a call goes on a GPU
    chart         the picture in the README, from the results of inference
    all           one after the other

Each writes a table and a CSV to benchmarks/results/. It needs the extra benchmark: pip install '.[benchmark]'.
"""

import importlib
import os
import subprocess
import sys

if __name__ == "__main__":
    from train.huge_pages import use_huge_pages

    use_huge_pages("benchmarks")  # for all, as the trainer does

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU

from res2net_jax.command_line import main

TASKS = ("inference", "train", "startup", "input", "compilation", "scaling", "chart", "kernels")


def run(arguments: list[str]) -> None:
    task, options = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if task in ("-h", "--help"):
        print(__doc__)
        return
    if task not in (*TASKS, "all"):
        raise ValueError(f"there is no task {task!r}; choose one of {', '.join(TASKS)} and all")
    if task == "all":
        if options:
            raise ValueError(f"all takes no options, got {' '.join(options)}; give them to one of {', '.join(TASKS)}")
        for name in TASKS:  # each in a process of its own, that leaves the memory to the next
            if name == "kernels":  # for GPUs alone
                continue
            print(f"\n=== {name}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "benchmarks", name], check=True)
        return
    importlib.import_module(f"benchmarks.{'timing' if task in ('inference', 'train') else task}").run(task, options)


if __name__ == "__main__":
    main(run)
