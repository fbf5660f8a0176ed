"""One step of training and of evaluation, as pure functions of flat dicts of arrays.

A state is ``{"step", "params", "stats", "momentum", "ema"}``: the next step's number (int32), the
parameters and running statistics under their paths, the optimiser's state, and the averaged weights
(params and stats in one dict; empty without EMA). Under jax.jit with the state replicated and the
batch sharded, the compiler adds what traffic between devices the mathematics needs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, UInt32

from res2net_jax.init import variables
from res2net_jax.model import Res2Net
from train import augment, metrics
from train.config import Config
from train.optimizer import learning_rate, make_optimizer

State = dict[str, dict]


def init_state(model: Res2Net, config: Config) -> State:
    """The state before the first step, from the weights that ``model`` holds."""
    params, stats = split(model)
    trained, _ = partition(params, config)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "stats": stats,
        "momentum": make_optimizer(config, model).init(trained),
        # A copy: the state is donated, and one buffer must not be donated twice.
        "ema": jax.tree.map(jnp.copy, {**params, **stats}) if config.ema is not None else {},
    }


def split(model: Res2Net) -> tuple[dict[str, Array], dict[str, Array]]:
    """The parameters and the running statistics of ``model``, each under its path."""
    leaves = variables(model)
    params = {path: leaf.get_value() for path, leaf in leaves.items() if isinstance(leaf, nnx.Param)}
    stats = {path: leaf.get_value() for path, leaf in leaves.items() if isinstance(leaf, nnx.BatchStat)}
    return params, stats


def partition(params: dict[str, Array], config: Config) -> tuple[dict[str, Array], dict[str, Array]]:
    """The parameters that are trained and the frozen ones (``config.freeze``); only the first have momentum."""
    trained = {path: p for path, p in params.items() if config.freeze is None or path.startswith("fc.")}
    return trained, {path: p for path, p in params.items() if path not in trained}


def make_train_step(
    model: Res2Net, config: Config, steps_per_epoch: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[State, dict], tuple[State, dict]]:
    """``(state, batch) -> (state, metrics)``.

    A batch is ``{"image": uint8 [b, h, w, c], "label": int32 [b], "stop": int32 [devices]}``; metrics are
    scalars: ``loss``, ``top1`` (share of the batch; of the heavier label under mixup), ``grad_norm``, ``lr``,
    ``finite``, whether the loss, the gradient and the new weights hold no NaN or infinity, and ``stop``, the largest of
    the flags, by which all processes agree to end at the same step.
    """
    forward = make_forward(model, config, training=True)
    optimizer = make_optimizer(config, model)

    def part_loss(trained, frozen, stats, images, targets, key):
        logits, stats = forward({**trained, **frozen}, stats, images, key)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        correct = (logits.argmax(-1) == targets.argmax(-1)).mean(dtype=loss.dtype)
        return loss, (stats, correct)

    def gradient(trained, frozen, stats, images, targets, key):
        """Mean over ``config.accumulate`` parts; the statistics pass through them in turn."""
        grad = jax.value_and_grad(part_loss, has_aux=True)
        if config.accumulate == 1:
            (loss, (stats, correct)), grads = grad(trained, frozen, stats, images, targets, key)
            return grads, stats, loss, correct

        def add(carry, part):
            (grads, stats), (images, targets, key) = carry, part
            (loss, (stats, correct)), new = grad(trained, frozen, stats, images, targets, key)
            return (jax.tree.map(jnp.add, grads, new), stats), (loss, correct)

        start = jax.tree.map(jnp.zeros_like, trained), stats
        parts = _parts(images), _parts(targets), jax.random.split(key, config.accumulate)
        (grads, stats), (losses, correct) = jax.lax.scan(add, start, parts)
        return jax.tree.map(lambda g: g / config.accumulate, grads), stats, losses.mean(), correct.mean()

    def _parts(x):
        # Every n-th image, so that each part is spread over the devices as the batch is.
        return jnp.moveaxis(x.reshape(-1, config.accumulate, *x.shape[1:]), 1, 0)

    def train_step(state: State, batch: dict) -> tuple[State, dict]:
        step = state["step"]
        trained, frozen = partition(state["params"], config)
        augment_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
        images, targets = _augmented(augment_key, batch["image"], batch["label"], model.num_classes, config, mean, std)
        grads, stats, loss, correct = gradient(trained, frozen, state["stats"], images, targets, model_key)
        directions, momentum = optimizer.update(grads, state["momentum"], trained)
        lr = learning_rate(config, step, steps_per_epoch)
        trained = {path: p - lr.astype(p.dtype) * directions[path] for path, p in trained.items()}
        params = {path: trained.get(path, p) for path, p in state["params"].items()}
        ema = state["ema"]
        if config.ema is not None:
            ema = _average(ema, {**params, **stats}, config.ema, step)
        scalars = {"loss": loss, "top1": correct, "grad_norm": optax.global_norm(grads), "lr": lr}
        scalars["finite"] = _all_finite({"loss": loss, "grad_norm": scalars["grad_norm"], **params, **stats})
        scalars["stop"] = batch["stop"].max()
        return {"step": step + 1, "params": params, "stats": stats, "momentum": momentum, "ema": ema}, scalars

    return train_step


def make_eval_step(
    model: Res2Net,
    config: Config,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    class_subset: tuple[int, ...] | None = None,
) -> Callable[[dict, dict, dict], tuple[dict, dict]]:
    """``(weights, batch, sums) -> (sums, answers)``: adds ``loss``, ``top1``, ``top5`` and ``count`` of a batch.

    ``weights`` are parameters and statistics in one dict. A batch is ``{"image", "label", "mask": bool [b], "stop"}``;
    masked images, which only fill the last batch up, count nowhere. Start from :func:`zero_sums`. The answers are the
    batch's ``label``, the likeliest class as ``prediction``, and its ``probability``, each of shape [b].
    """
    forward = make_forward(model, config, training=False)

    def eval_step(weights: dict, batch: dict, sums: dict) -> tuple[dict, dict]:
        dtype = _dtype(config)
        # Whole products, as train.evaluate's: of float32 GPUs and TPUs would round the factors.
        with jax.default_matmul_precision("highest"):
            logits, _ = forward(weights, {}, augment.normalise(batch["image"], mean, std, dtype))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        counts = metrics.count(logits, batch["label"], batch["mask"], class_subset)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["label"], 0))
        counts = {**counts, "loss": jnp.sum(losses * batch["mask"])}
        sums = {name: sums[name] + counts[name] for name in counts} | {
            "stop": jnp.maximum(sums["stop"], batch["stop"].max())
        }
        if class_subset is not None:
            others = np.setdiff1d(np.arange(model.num_classes), class_subset)
            logits = logits.at[:, others].set(-jnp.inf)
        probabilities = jax.nn.softmax(logits)
        answers = {"label": batch["label"], "prediction": logits.argmax(-1), "probability": probabilities.max(-1)}
        return sums, answers

    return eval_step


def zero_sums(config: Config) -> dict:
    """What an evaluation starts from."""
    zero = jnp.zeros((), jnp.int32)
    loss = jnp.zeros((), jnp.promote_types(_dtype(config), jnp.float32))
    return {"top1": zero, "top5": zero, "count": zero, "stop": zero, "loss": loss}


def make_forward(
    model: Res2Net, config: Config, *, training: bool
) -> Callable[[dict, dict, Array], tuple[Array, dict]]:
    """``(params, stats, normalised images, key) -> (logits, new stats)``; each array is in one of the two dicts.

    The key is for dropout and its kin, if the model has any.
    """
    model = nnx.clone(model).train(training)
    if training:
        model.set_attributes(group_size=config.batchnorm_group, use_running_average=config.freeze == "backbone")
        model.set_grad_checkpointing(config.remat)
    graphdef, leaves = nnx.split(model)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaves)

    def forward(params, stats, images, key=None):
        bound = nnx.merge(graphdef, abstract, copy=True)
        leaves = variables(bound)
        for path, leaf in leaves.items():
            leaf.set_value(params[path] if path in params else stats[path])
        logits = bound(images, key)
        return logits, {path: leaf.get_value() for path, leaf in leaves.items() if isinstance(leaf, nnx.BatchStat)}

    return forward


def evaluated(state: State) -> dict[str, Array]:
    """The weights that are evaluated and that a checkpoint's ``model`` holds: the average if there is one."""
    return state["ema"] or {**state["params"], **state["stats"]}


def to_items(state: State) -> dict[str, dict]:
    """The state as flat dicts with string keys, each array once."""
    momentum, _ = jax.tree.flatten_with_path(state["momentum"])
    training = {"step": state["step"]}
    training |= {f"momentum{jax.tree_util.keystr(path)}": leaf for path, leaf in momentum}
    if state["ema"]:
        training |= {f"raw.{path}": leaf for path, leaf in {**state["params"], **state["stats"]}.items()}
    return {"model": evaluated(state), "training": training}


def from_items(items: dict[str, dict], like: State) -> State:
    """The inverse of :func:`to_items`."""
    model, training = items["model"], items["training"]
    momentum, structure = jax.tree.flatten_with_path(like["momentum"])
    momentum = [training[f"momentum{jax.tree_util.keystr(path)}"] for path, _ in momentum]
    raw = {path.removeprefix("raw."): leaf for path, leaf in training.items() if path.startswith("raw.")}
    weights = raw or model
    return {
        "step": training["step"],
        "params": {path: weights[path] for path in like["params"]},
        "stats": {path: weights[path] for path in like["stats"]},
        "momentum": jax.tree.unflatten(structure, momentum),
        "ema": dict(model) if like["ema"] else {},
    }


def fingerprint(tree) -> UInt32[Array, ""]:
    """A 32-bit checksum of the bits and the places of all numbers in ``tree``; any single flipped bit changes it."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()
        # An odd factor is invertible modulo 2**32, so no change of one number can vanish.
        odd = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
        total = total * jnp.uint32(16777619) + jnp.sum(bits * odd, dtype=jnp.uint32)
    return total


def _augmented(key, images, labels, classes, config: Config, mean, std):
    keys = jax.random.split(key)
    dtype = _dtype(config)
    images = augment.normalise(images, mean, std, dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    # (1 - s) * onehot + s / classes, as torch.nn.CrossEntropyLoss(label_smoothing=s).
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes, dtype=wide), config.label_smoothing)
    if config.random_erasing:
        images = augment.random_erasing(keys[0], images, config.random_erasing)
    if config.mixup or config.cutmix:
        images, targets = augment.mix(keys[1], images, targets, mixup=config.mixup, cutmix=config.cutmix)
    return images, targets


def _all_finite(arrays):
    return jnp.stack([jnp.isfinite(array).all() for array in arrays.values()]).all()


def _average(ema, weights, decay, step):
    # Short of history it follows faster: TensorFlow's ExponentialMovingAverage with num_updates, whose decay is at most
    # (1 + step) / (10 + step).
    share = jnp.maximum(1 - decay, 9 / (10 + step.astype(float)))
    return {path: old + share.astype(old.dtype) * (weights[path] - old) for path, old in ema.items()}


def _dtype(config):
    return jnp.dtype(config.dtype)
