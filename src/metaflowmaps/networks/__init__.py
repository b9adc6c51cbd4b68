"""Networks of maps and classifiers of images: modules, and the configurations that build them."""

from metaflowmaps.networks.classifiers import Classifier, ConvClassifierConfig, PatchClassifierConfig
from metaflowmaps.networks.context_encoder import Observed, ObservedConfig
from metaflowmaps.networks.dit import DiT, DiTConfig
from metaflowmaps.networks.family import (
    ClassifierNetworkConfig,
    NetworkConfig,
    describe_network,
    make_classifier,
    make_network,
    read_network,
)
from metaflowmaps.networks.mlp import MLP, MLPConfig
from metaflowmaps.networks.unet import UNet, UNetConfig

__all__ = [
    "MLP",
    "Classifier",
    "ClassifierNetworkConfig",
    "ConvClassifierConfig",
    "DiT",
    "DiTConfig",
    "MLPConfig",
    "NetworkConfig",
    "Observed",
    "ObservedConfig",
    "PatchClassifierConfig",
    "UNet",
    "UNetConfig",
    "describe_network",
    "make_classifier",
    "make_network",
    "read_network",
]
