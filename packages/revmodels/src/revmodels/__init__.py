"""Residual networks and their reversible counterparts."""

from revmodels.ahead import compile_ahead
from revmodels.fused import set_fused
from revmodels.memcnn import from_memcnn
from revmodels.registry import Architecture, create_model, get_architecture, list_models
from revmodels.resnet import ResNet
from revmodels.revnet import RevNet

__all__ = [
    "Architecture",
    "ResNet",
    "RevNet",
    "compile_ahead",
    "create_model",
    "from_memcnn",
    "get_architecture",
    "list_models",
    "set_fused",
]
