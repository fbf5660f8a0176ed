"""What the devices of a pod tell each other in one training step, read from the compiled program.

The trainer's own step is compiled for 1, 8 and 64 devices of a CPU, with BatchNorm over the global batch and over
groups of each device's own images. Images are small, since what is sent does not depend on their size. What is sent is
the partitioner's choice, the same on every backend; how many messages it takes is not, since GPUs and TPUs combine
all-reduces. The prediction for a pod assumes 100 GB/s a device and 10 microseconds to start a message, both our guess
of such a machine, and that nothing overlaps: a ring all-reduce sends (n - 1) / n of the bytes twice, in one message
(all combined) or in as many as are listed. The last column is what that leaves of the speed of a step of 100 ms.
"""

import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import results
from res2net_jax.backend import compiler_options
from train import devices
from train.config import parse
from train.imagenet import build_model
from train.rehearsal import fake_dataset
from train.step import init_state, make_train_step

DEVICES = (1, 8, 64)
MODEL = "res2net50_26w_4s"
IMAGES = 2  # of each device
BANDWIDTH, LATENCY = 100e9, 10e-6
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
STEP = 0.1  # seconds


def run(task: str, arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"scaling takes no options; got {' '.join(arguments)}")
    rows = [("devices", "BatchNorm over", "all-reduces", "MB all-reduced", "other collectives",
             "combined (ms)", "one by one (ms)", "efficiency")]  # fmt: skip
    for count in DEVICES:
        for scope in ("global batch", "own images"):
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
            environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-m", "benchmarks.scaling", scope]
            output = subprocess.check_output(command, text=True, env=environment)
            collectives = json.loads(output.splitlines()[-1])
            reduced = [size for name, size in collectives if name == "all-reduce"]
            sending = 2 * (count - 1) / count * sum(reduced) / BANDWIDTH
            least, most = sending + LATENCY * (count > 1), sending + LATENCY * len(reduced) * (count > 1)
            figures = str(len(reduced)), f"{sum(reduced) / 1e6:.1f}", str(len(collectives) - len(reduced))
            efficiency = f"{STEP / (STEP + most):.1%} to {STEP / (STEP + least):.1%}"
            rows.append((str(count), scope, *figures, f"{1e3 * least:.2f}", f"{1e3 * most:.2f}", efficiency))
    print(results.write(task, rows, f"{MODEL}, {IMAGES} images a device", ("jax", "flax"), on_host=True))


def collectives(scope: str) -> list[tuple[str, int]]:
    """Name and bytes of each collective in the step on all devices of this process."""
    mesh = devices.data_mesh()
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    size = str(IMAGES * jax.device_count())
    groups = ["--batchnorm-group", str(IMAGES)] if scope == "own images" else []
    config = parse(["cosine", "--model", MODEL, "--batch-size", size, "--size", "64", *groups], "scaling")
    model = build_model(config, fake_dataset())
    step = make_train_step(model, config, 1, (0.5,) * 3, (0.5,) * 3)
    batch = {
        "image": np.zeros((int(size), 64, 64, 3), np.uint8),
        "label": np.zeros(int(size), np.int32),
        "stop": np.zeros(jax.device_count(), np.int32),
    }

    def described(tree, sharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    arguments = described(init_state(model, config), replicated), described(batch, sharded)
    jitted = jax.jit(
        step, donate_argnums=0, out_shardings=(replicated, replicated), compiler_options=compiler_options()
    )
    program = jitted.lower(*arguments).compile()
    return collectives_in(program.as_text())


def collectives_in(program: str) -> list[tuple[str, int]]:
    """Name and bytes of each collective in a compiled program's text."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program)
    return [(name, sum(map(_bytes, re.findall(r"(\w+)\[([\d,]*)\]", shapes)))) for shapes, name in found]


def _bytes(array):
    dtype, shape = array
    return BYTES[dtype] * math.prod(map(int, filter(None, shape.split(","))))


if __name__ == "__main__":
    print(json.dumps(collectives(sys.argv[1])))
