"""Res2Net in JAX and Flax, with the published ImageNet weights."""

from res2net_jax import backend as backend
from res2net_jax import groups as groups
from res2net_jax import stablehlo as stablehlo
from res2net_jax.arch import Arch
from res2net_jax.checkpoint import save
from res2net_jax.explanation import explain
from res2net_jax.extraction import feature_extractor, save_features
from res2net_jax.features import FeaturePyramid
from res2net_jax.formats import export
from res2net_jax.fusion import compile, fuse
from res2net_jax.hub import create, load
from res2net_jax.inference import Prediction, classify
from res2net_jax.model import Res2Net
from res2net_jax.preprocess import preprocess
from res2net_jax.sharing import push_to_hub
from res2net_jax.variants import VARIANTS, Preprocessing, Variant, get_variant, list_models

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "Arch",
    "FeaturePyramid",
    "Prediction",
    "Preprocessing",
    "Res2Net",
    "Variant",
    "classify",
    "compile",
    "create",
    "explain",
    "export",
    "feature_extractor",
    "fuse",
    "get_variant",
    "list_models",
    "load",
    "preprocess",
    "push_to_hub",
    "save",
    "save_features",
]
