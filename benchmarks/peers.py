"""The peers beside timm, for inference: zeromodels (Keras on JAX) and ONNX Runtime."""

import functools
import os
import tempfile

import jax
import numpy as np
import torch

from benchmarks.ours import Run, images_and_labels
from benchmarks.torch_peer import ON_GPU, THREADS
from res2net_jax.variants import get_variant


def keras_inference(name: str, batch: int) -> Run:
    """zeromodels' model in one ``jax.jit``, its weights passed in: the fastest of Keras's ways to call one."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    from zeromodels.models.res2net import Res2NetConfig, Res2NetImageClassify

    if ON_GPU:
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    arch = get_variant(name).arch
    config = Res2NetConfig(
        depth=arch.layers, base_width=arch.base_width, scale=arch.scale, cardinality=arch.cardinality
    )
    model = Res2NetImageClassify(config)
    weights = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    images = jax.device_put(images_and_labels(batch)[0])

    @jax.jit
    def forward(trainable, fixed, images):
        return model.stateless_call(trainable, fixed, images, training=False)[0]

    return lambda: forward(*weights, images).block_until_ready()


def onnx_inference(name: str, batch: int) -> Run:
    """timm's model by torch's own exporter, in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(_onnx_model(name, batch), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.ascontiguousarray(images_and_labels(batch)[0].transpose(0, 3, 1, 2))}
    return functools.partial(session.run, None, feed)


def _onnx_model(name, batch):
    import timm

    model = timm.create_model(name, zero_init_last=False).eval()
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        example = torch.zeros(batch, 3, 224, 224)
        torch.onnx.export(model, (example,), file.name, dynamo=True, external_data=False, verbose=False)
        return file.read()
