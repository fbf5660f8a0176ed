"""A Res2Net as a backbone: images in, a pyramid of feature maps out."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from res2net_jax.feature_info import FeatureInfo
from res2net_jax.model import Res2Net


class FeaturePyramid(nnx.Module):
    """What ``create`` and ``load`` give with ``features_only=True``; timm's FeatureListNet.

    Args:
        backbone: A model, which is not changed; its arrays are shared.
        out_indices: The outputs to pick, as in :meth:`Res2Net.forward_intermediates`; by default all.

    Attributes:
        backbone: The model, without classifier and without the stages after the last one picked.
        out_indices: The outputs picked, from 0 (the stem, before pooling).
    """

    def __init__(self, backbone: Res2Net, out_indices: int | Sequence[int] | None = None):
        self.out_indices = tuple(backbone.feature_indices(out_indices))
        if not self.out_indices:
            raise ValueError("a pyramid has at least one map; out_indices picks none")
        backbone = nnx.clone(backbone)
        backbone.reset_classifier(0)
        for stage in range(max(self.out_indices), len(backbone.arch.layers)):
            delattr(backbone, f"layer{stage + 1}")
        self.backbone = backbone

    def __call__(self, x: Float[Array, "b h w c"], key: jax.Array | None = None) -> list[Float[Array, "b h2 w2 f"]]:
        """The maps at ``out_indices``, largest first. Arguments and errors as of :class:`Res2Net`."""
        return self.backbone.forward_intermediates(x, self.out_indices, stop_early=True, key=key)[1]

    @property
    def feature_info(self) -> FeatureInfo:
        """For each output ``num_chs``, ``reduction`` and ``module``."""
        return FeatureInfo(self.backbone.feature_info[i] for i in self.out_indices)

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """As of :class:`Res2Net`."""
        self.backbone.train(mode)
        return self

    def eval(self) -> "FeaturePyramid":
        """As of :class:`Res2Net`."""
        return self.train(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of :class:`Res2Net`."""
        self.backbone.set_grad_checkpointing(enable)


def backbone_of(model: Res2Net | FeaturePyramid) -> Res2Net:
    """The model under a pyramid; any other as it is."""
    return model.backbone if isinstance(model, FeaturePyramid) else model
