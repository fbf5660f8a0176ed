"""timm's runners, as :mod:`benchmarks.ours`."""

import timm
import torch
import torch._inductor.config

from benchmarks.ours import LR, MOMENTUM, WEIGHT_DECAY, Run, images_and_labels
from res2net_jax.backend import cores

ON_GPU = torch.cuda.is_available()
THREADS = cores()  # as many as XLA takes
torch.set_num_threads(THREADS)
torch.backends.cudnn.benchmark = True  # XLA tries the algorithms too


def inference(name: str, batch: int, mode: str) -> Run:
    model, images, _ = _timm(name, batch)
    model.eval()
    if ON_GPU:  # not by autocast, which would cast the weights in every call
        model, images = model.bfloat16(), images.bfloat16()
    forward = _compile(model, mode)

    @torch.inference_mode()
    def run():
        forward(images)
        _synchronise()

    return run


def train(name: str, batch: int, mode: str) -> Run:
    model, images, labels = _timm(name, batch)
    model.train()
    forward = _compile(model, mode)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def run():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU):
            loss = torch.nn.functional.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        _synchronise()

    return run


def _compile(model, mode):
    """``mode`` of torch.compile; ``eager``; or ``freezing``, its default with the weights as constants.

    Freezing (``TORCHINDUCTOR_FREEZING=1``) is for inference alone: it folds the norms, as we do, and lays the weights
    out for its kernels.
    """
    if mode == "eager":
        return model
    if mode == "freezing":
        torch._inductor.config.freezing = True
        mode = "default"
    # What torch compiled for another row would make it compile this one for any batch size, then not at all.
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False, mode=mode)


def _timm(name, batch):
    device = "cuda" if ON_GPU else "cpu"
    images, labels = images_and_labels(batch)
    model = timm.create_model(name, zero_init_last=False).to(device, memory_format=torch.channels_last)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device, memory_format=torch.channels_last)
    return model, tensor, torch.from_numpy(labels).to(device)


def _synchronise():
    if ON_GPU:
        torch.cuda.synchronize()
