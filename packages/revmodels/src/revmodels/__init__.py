"""Residual networks and their reversible counterparts."""

from revmodels.registry import create_model, list_models
from revmodels.resnet import ResNet
from revmodels.revnet import RevNet

__all__ = ["ResNet", "RevNet", "create_model", "list_models"]
