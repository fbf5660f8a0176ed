"""Every Res2Net model by name: its architecture and what has been published about it.

Sources: the official model index (``published``), timm's result tables (the ``imagenet*``
accuracies, measured at the evaluation setting of ``Preprocessing``), and a count of each model's
operations (``params``, ``macs``).
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Sequence

from res2net_jax.arch import Arch
from res2net_jax.checks import natural


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in per cent."""

    top1: float
    top5: float


@dataclasses.dataclass(frozen=True)
class Published:
    """A model's row in the official model index.

    ``flops`` follows that index's own convention; see :mod:`res2net_jax.cost`. ``file_size`` is in bytes.
    """

    flops: int
    parameters: int
    file_size: int
    top1: float
    top5: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a release was trained, as far as its authors have said."""

    epochs: int = 100
    lr: float = 0.1
    batch_size: int = 256
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    schedule: str = "lr / 10 every 30 epochs"
    hardware: str = "4x Titan XP"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The evaluation setting of the published accuracies. ``mean`` and ``std`` are of RGB in [0, 1]."""

    size: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # of JSON, a list
        natural("size (in pixels)", self.size, least=1)
        if not self.crop_pct > 0:
            raise ValueError(f"crop_pct, the share of the shorter side that is kept, is above 0; got {self.crop_pct!r}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f'interpolation must be "bilinear" or "bicubic"; got {self.interpolation!r}')
        if not self.mean or len(self.mean) != len(self.std) or not all(std > 0 for std in self.std):
            raise ValueError(f"mean and std, above 0, are one value per channel; got {self.mean} and {self.std}")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One named model: architecture, size, published results, and where its weights are.

    Attributes:
        name: timm's name.
        arch: Architecture.
        params: Number of parameters with 1000 classes.
        macs: Multiply-adds of convolutions and classifier for one 224x224 image.
        published: The official model index, or None for a model that is not in it.
        imagenet: ImageNet-1k validation accuracy (timm's table), and likewise ReaL labels,
            ImageNet-V2, -A, -R and -Sketch.
        recipe: Training recipe, or None where it was never published.
        pth: File name of the PyTorch release; its eight hex digits are the file's SHA-256 prefix.
        url: Address of that file.
        hub_id: Hugging Face repository with the same weights as safetensors.
        preprocessing: Evaluation setting.
    """

    name: str
    arch: Arch
    params: int
    macs: int
    published: Published | None
    imagenet: Accuracy
    imagenet_real: Accuracy
    imagenet_v2: Accuracy
    imagenet_a: Accuracy
    imagenet_r: Accuracy
    imagenet_sketch: Accuracy
    recipe: Recipe | None
    pth: str
    url: str
    hub_id: str
    preprocessing: Preprocessing = Preprocessing()


PAPER = Recipe()
GITHUB = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-res2net/"
AUTHORS = "https://shanghuagao.oss-cn-beijing.aliyuncs.com/res2net/"

_TABLE = (
    Variant(
        name="res2net50_26w_4s",
        arch=Arch(),
        params=25_699_120,
        macs=4_255_166_464,
        published=Published(flops=5_499_974_064, parameters=25_700_000, file_size=103_110_087, top1=77.99, top5=93.85),
        imagenet=Accuracy(77.994, 93.86),
        imagenet_real=Accuracy(84.38, 96.082),
        imagenet_v2=Accuracy(65.98, 86.59),
        imagenet_a=Accuracy(5.067, 29.053),
        imagenet_r=Accuracy(37.897, 53.133),
        imagenet_sketch=Accuracy(25.864, 43.163),
        recipe=PAPER,
        pth="res2net50_26w_4s-06e79181.pth",
        url=GITHUB + "res2net50_26w_4s-06e79181.pth",
        hub_id="timm/res2net50_26w_4s.in1k",
    ),
    Variant(
        name="res2net50_26w_6s",
        arch=Arch(scale=6),
        params=37_051_448,
        macs=6_295_523_328,
        published=Published(flops=8_130_156_528, parameters=37_050_000, file_size=148_603_239, top1=78.57, top5=94.12),
        imagenet=Accuracy(78.586, 94.12),
        imagenet_real=Accuracy(84.747, 96.285),
        imagenet_v2=Accuracy(67.03, 86.86),
        imagenet_a=Accuracy(6.533, 31.453),
        imagenet_r=Accuracy(38.7, 53.78),
        imagenet_sketch=Accuracy(26.601, 43.996),
        recipe=PAPER,
        pth="res2net50_26w_6s-19041792.pth",
        url=GITHUB + "res2net50_26w_6s-19041792.pth",
        hub_id="timm/res2net50_26w_6s.in1k",
    ),
    Variant(
        name="res2net50_26w_8s",
        arch=Arch(scale=8),
        params=48_403_776,
        macs=8_335_880_192,
        published=Published(flops=10_760_338_992, parameters=48_400_000, file_size=194_085_165, top1=79.19, top5=94.37),
        imagenet=Accuracy(78.95, 94.28),
        imagenet_real=Accuracy(84.828, 96.349),
        imagenet_v2=Accuracy(67.38, 87.17),
        imagenet_a=Accuracy(7.813, 33.053),
        imagenet_r=Accuracy(39.767, 54.937),
        imagenet_sketch=Accuracy(27.314, 44.817),
        recipe=PAPER,
        pth="res2net50_26w_8s-2c7c9f12.pth",
        url=GITHUB + "res2net50_26w_8s-2c7c9f12.pth",
        hub_id="timm/res2net50_26w_8s.in1k",
    ),
    Variant(
        name="res2net50_48w_2s",
        arch=Arch(base_width=48, scale=2),
        params=25_287_304,
        macs=4_159_832_064,
        published=Published(flops=5_375_291_520, parameters=25_290_000, file_size=101_421_406, top1=77.53, top5=93.56),
        imagenet=Accuracy(77.528, 93.562),
        imagenet_real=Accuracy(84.113, 95.969),
        imagenet_v2=Accuracy(65.24, 85.92),
        imagenet_a=Accuracy(3.6, 26.187),
        imagenet_r=Accuracy(37.18, 53.413),
        imagenet_sketch=Accuracy(25.015, 42.223),
        recipe=PAPER,
        pth="res2net50_48w_2s-afed724a.pth",
        url=GITHUB + "res2net50_48w_2s-afed724a.pth",
        hub_id="timm/res2net50_48w_2s.in1k",
    ),
    Variant(
        name="res2net50_14w_8s",
        arch=Arch(base_width=14, scale=8),
        params=25_059_816,
        macs=4_178_898_944,
        published=Published(flops=5_403_546_768, parameters=25_060_000, file_size=100_638_543, top1=78.14, top5=93.86),
        imagenet=Accuracy(78.142, 93.852),
        imagenet_real=Accuracy(84.326, 96.061),
        imagenet_v2=Accuracy(66.03, 86.12),
        imagenet_a=Accuracy(4.88, 28.44),
        imagenet_r=Accuracy(38.71, 54.177),
        imagenet_sketch=Accuracy(26.491, 44.365),
        recipe=PAPER,
        pth="res2net50_14w_8s-6527dddc.pth",
        url=GITHUB + "res2net50_14w_8s-6527dddc.pth",
        hub_id="timm/res2net50_14w_8s.in1k",
    ),
    Variant(
        name="res2net101_26w_4s",
        arch=Arch(layers=(3, 4, 23, 3)),
        params=45_206_688,
        macs=8_066_974_464,
        published=Published(flops=10_415_881_200, parameters=45_210_000, file_size=181_456_059, top1=79.19, top5=94.43),
        imagenet=Accuracy(79.192, 94.466),
        imagenet_real=Accuracy(85.091, 96.377),
        imagenet_v2=Accuracy(67.42, 87.23),
        imagenet_a=Accuracy(9.413, 34.44),
        imagenet_r=Accuracy(39.763, 54.583),
        imagenet_sketch=Accuracy(27.814, 45.177),
        recipe=PAPER,
        pth="res2net101_26w_4s-02a759a1.pth",
        url=GITHUB + "res2net101_26w_4s-02a759a1.pth",
        hub_id="timm/res2net101_26w_4s.in1k",
    ),
    Variant(
        name="res2next50",
        arch=Arch(base_width=4, cardinality=8),
        params=24_671_464,
        macs=4_172_677_120,
        published=None,
        imagenet=Accuracy(78.238, 93.904),
        imagenet_real=Accuracy(84.22, 96.007),
        imagenet_v2=Accuracy(65.63, 85.8),
        imagenet_a=Accuracy(5.533, 30.653),
        imagenet_r=Accuracy(37.53, 52.87),
        imagenet_sketch=Accuracy(25.4, 42.53),
        recipe=None,
        pth="res2next50_4s-6ef7e7bf.pth",
        url=AUTHORS + "res2next50_4s-6ef7e7bf.pth",
        hub_id="timm/res2next50.in1k",
    ),
    Variant(
        name="res2net50d",
        arch=Arch(stem_type="deep", stem_width=32, avg_down=True),
        params=25_718_352,
        macs=4_494_807_040,
        published=None,
        imagenet=Accuracy(80.28, 95.028),
        imagenet_real=Accuracy(85.763, 96.772),
        imagenet_v2=Accuracy(68.39, 88.02),
        imagenet_a=Accuracy(14.613, 44.507),
        imagenet_r=Accuracy(37.223, 51.303),
        imagenet_sketch=Accuracy(25.497, 43.066),
        recipe=None,
        pth="res2net50_v1b_26w_4s-3cf99910.pth",
        url=AUTHORS + "res2net50_v1b_26w_4s-3cf99910.pth",
        hub_id="timm/res2net50d.in1k",
    ),
    Variant(
        name="res2net101d",
        arch=Arch(layers=(3, 4, 23, 3), stem_type="deep", stem_width=32, avg_down=True),
        params=45_225_920,
        macs=8_306_615_040,
        published=None,
        imagenet=Accuracy(81.236, 95.346),
        imagenet_real=Accuracy(86.143, 96.844),
        imagenet_v2=Accuracy(69.45, 88.62),
        imagenet_a=Accuracy(21.613, 51.147),
        imagenet_r=Accuracy(38.843, 53.02),
        imagenet_sketch=Accuracy(26.721, 44.363),
        recipe=None,
        pth="res2net101_v1b_26w_4s-0812c246.pth",
        url=AUTHORS + "res2net101_v1b_26w_4s-0812c246.pth",
        hub_id="timm/res2net101d.in1k",
    ),
)

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _TABLE}


TAG = ".in1k"  # in timm's names, of weights trained on ImageNet-1k: the only ones there are


def get_variant(name: str) -> Variant:
    """The variant called ``name``, or in timm ``name.in1k``; ValueError that suggests the nearest ones if none is."""
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a model, such as {next(iter(VARIANTS))}; got a {type(name).__name__}")
    if name.removesuffix(TAG) in VARIANTS:
        return VARIANTS[name.removesuffix(TAG)]
    near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known models: {', '.join(VARIANTS)}"
    raise ValueError(f"no model is called {name!r}; {hint}")


def list_models(pattern: str | Sequence[str] = "") -> list[str]:
    """Names of the models that match a shell wildcard, e.g. ``"*50*"``, or one of several; by default all."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    return [name for name in VARIANTS if any(fnmatch.fnmatch(name, wanted or "*") for wanted in patterns)]
