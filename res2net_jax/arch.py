"""The architecture of a Res2Net as data: what can be varied, under timm's names."""

import dataclasses
import difflib
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

from res2net_jax.activations import ACTIVATIONS
from res2net_jax.checks import natural

EXPANSION = 4  # output channels of a block per plane

_STEMS = ("", "deep", "deep_tiered")
_ATTENTION = ("", "se", "eca")
_ANTI_ALIASING = ("", "avg", "blur", "blurpc")
_GLOBAL_POOLS = ("avg", "max", "avgmax", "catavgmax", "")
# What a user of timm may ask for, and what to do instead.
_OF_TIMM = {
    "pretrained": "load gives trained weights, create fresh ones",
    "checkpoint_path": "load(name, source=FILE) takes the weights of a file",
    "block_args": "its scale and attn_layer are options of their own: scale=6",
    "norm_layer": "its norms are BatchNorm",
}
# Of create and load, for those who mistype one.
_OF_MODELS = ("num_classes", "in_chans", "dtype", "param_dtype", "rngs", "features_only", "out_indices")
# timm's ResNet takes these and its Res2Net blocks ignore them.
_IGNORED_BY_TIMM = ("block_reduce_first", "reduce_first")


class BlockPlan(NamedTuple):
    """One block's place in the network: ``stride`` and ``dilation`` of its 3x3 convolutions, rate of its DropPath.

    ``stage_dilation`` is that of the stage, which the first block of a dilated stage only enters.
    """

    planes: int
    stride: int
    dilation: int
    stage_dilation: int
    drop_path: float


@dataclasses.dataclass(frozen=True)
class Arch:
    """The shape of a Res2Net (paper, section 3.1), and timm's options.

    Attributes:
        layers: Blocks in each stage.
        channels: Planes of each stage; a stage puts out four times as many channels.
        base_width: Width *w* of one split in a 64-plane block.
        scale: Number *s* of splits; 1 is an ordinary bottleneck.
        cardinality: Groups of each 3x3 convolution (Res2NeXt).
        stem_type: ``""`` for one 7x7 convolution, ``"deep"`` for three 3x3 ones, ``"deep_tiered"`` for
            three of growing width.
        stem_width: Channels inside a deep stem, which puts out twice as many.
        replace_stem_pool: A 3x3 convolution at stride 2 instead of the stem's max pooling.
        avg_down: Shortcuts average-pool before their 1x1 convolution (the "d" models).
        down_kernel_size: Kernel of the strided shortcut convolutions; odd.
        output_stride: 32, 16 or 8: later stages dilate instead of striding.
        act_layer: Activation, by a name of :data:`res2net_jax.activations.ACTIVATIONS`.
        attn_layer: Channel attention at the end of each block: ``""``, ``"se"`` or ``"eca"``.
        aa_layer: Anti-aliased stem pooling: ``""``, ``"avg"``, ``"blur"`` or ``"blurpc"``.
        global_pool: Pooling of the head: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"``, ``""`` for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly from 0 to this rate in the last block.
        drop_block_rate: DropBlock in the third and fourth stage.
    """

    layers: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    base_width: int = 26
    scale: int = 4
    cardinality: int = 1
    stem_type: str = ""
    stem_width: int = 64
    replace_stem_pool: bool = False
    avg_down: bool = False
    down_kernel_size: int = 1
    output_stride: int = 32
    act_layer: str = "relu"
    attn_layer: str = ""
    aa_layer: str = ""
    global_pool: str = "avg"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_block_rate: float = 0.0

    def __post_init__(self):
        for field in ("layers", "channels"):
            value = getattr(self, field)
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise ValueError(f"{field} must be a tuple of positive integers, one per stage; got {value!r}")
            object.__setattr__(self, field, tuple(natural(field, n, least=1) for n in value))
        if len(self.layers) != len(self.channels):
            raise ValueError(
                f"layers and channels name one number a stage each; got {len(self.layers)} layers "
                f"{self.layers} and {len(self.channels)} channels {self.channels}"
            )
        for field in ("base_width", "scale", "cardinality", "stem_width", "down_kernel_size"):
            object.__setattr__(self, field, natural(field, getattr(self, field), least=1))
        for field in ("replace_stem_pool", "avg_down"):
            if type(getattr(self, field)) is not bool:
                raise ValueError(f"{field} must be True or False; got {getattr(self, field)!r}")
        for field in ("drop_rate", "drop_path_rate", "drop_block_rate"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
                raise ValueError(f"{field} must be a number from 0 up to, not including, 1; got {value!r}")
            object.__setattr__(self, field, float(value))
        _require_one_of("stem_type", self.stem_type, _STEMS)
        _require_one_of("act_layer", self.act_layer, tuple(ACTIVATIONS))
        _require_one_of("attn_layer", self.attn_layer, _ATTENTION)
        _require_one_of("aa_layer", self.aa_layer, _ANTI_ALIASING)
        _require_one_of("global_pool", self.global_pool, _GLOBAL_POOLS)
        _require_one_of("output_stride", self.output_stride, (32, 16, 8))
        self._require_consistent()

    def _require_consistent(self):
        if self.width(min(self.channels)) < 1:
            raise ValueError(
                f"base_width {self.base_width} leaves a split of {min(self.channels)} planes no channel; "
                f"give at least {-(-64 // min(self.channels))}"
            )
        if self.stem_type == "deep_tiered" and self.stem_width < 4:
            raise ValueError(f"a deep_tiered stem needs a stem_width of at least 4; got {self.stem_width}")
        if not self.stem_type and self.stem_width != 64:
            raise ValueError(
                f'stem_width {self.stem_width} needs a deep stem; a stem_type of "" always has 64 channels'
            )
        if self.down_kernel_size % 2 == 0:
            raise ValueError(f"down_kernel_size must be odd to keep the maps aligned; got {self.down_kernel_size}")
        if self.avg_down and self.down_kernel_size != 1:
            raise ValueError("avg_down pools and then convolves 1x1; leave down_kernel_size at 1, or avg_down out")

    def width(self, planes: int) -> int:
        """Channels of one split in a block of ``planes`` planes."""
        return planes * self.base_width // 64 * self.cardinality

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Outputs of the stem's convolutions."""
        if not self.stem_type:
            return (64,)
        first = 3 * (self.stem_width // 4) if self.stem_type == "deep_tiered" else self.stem_width
        return (first, self.stem_width, 2 * self.stem_width)

    @property
    def blocks(self) -> list[list[BlockPlan]]:
        """The plan of every block, stage by stage."""
        stages, stride_so_far, dilation = [], 4, 1
        before = 1  # the dilation of the block before
        for stage, (depth, planes) in enumerate(zip(self.layers, self.channels)):
            stride = 1 if stage == 0 else 2
            if stride_so_far >= self.output_stride:
                dilation, stride = dilation * stride, 1
            stride_so_far *= stride
            plans = []
            for i in range(depth):
                index = sum(self.layers[:stage]) + i
                rate = self.drop_path_rate * index / max(sum(self.layers) - 1, 1)
                plans.append(BlockPlan(planes, stride if i == 0 else 1, before, dilation, rate))
                before = dilation
            stages.append(plans)
        return stages

    @property
    def reductions(self) -> tuple[int, ...]:
        """How many times smaller than the image the stem's and each stage's output is."""
        reductions = [2, 4]
        for stage in self.blocks[1:]:
            reductions.append(reductions[-1] * stage[0].stride)
        return tuple(reductions)


def override(arch: Arch, **options) -> Arch:
    """``arch`` with some fields replaced; ValueError for a field that does not exist."""
    known = [field.name for field in dataclasses.fields(Arch)]
    for option in options:
        if option in _IGNORED_BY_TIMM:
            raise ValueError(f"{option} has no effect on a Res2Net (timm ignores it silently); leave it out")
        if option not in known:
            near = difflib.get_close_matches(option, [*_OF_MODELS, *known], n=1)
            # Of those of a model, the caller has taken its own.
            hint = f"did you mean {near[0]}?" if near and option not in _OF_MODELS else f"options: {', '.join(known)}"
            raise ValueError(f"a Res2Net has no option {option!r}; {_OF_TIMM.get(option, hint)}")
    return dataclasses.replace(arch, **options)


def changes(arch: Arch, usual: Arch) -> dict[str, Any]:
    """The fields of ``arch`` that differ from ``usual``."""
    values = {field.name: getattr(arch, field.name) for field in dataclasses.fields(Arch)}
    return {field: value for field, value in values.items() if value != getattr(usual, field)}


def _require_one_of(field, value, choices):
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, choices))}; got {value!r}")
