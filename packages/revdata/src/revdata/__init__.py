"""CIFAR-10, CIFAR-100 and digits as tensors, and two loaders that make the same batches of them."""

from revdata.datasets import DatasetInfo, describe, list_datasets, load
from revdata.device_loader import DeviceLoader
from revdata.errors import ArgumentError, DamagedDataError, DataError, MissingDataError
from revdata.image_set import ImageSet
from revdata.loader import Loader
from revdata.order import epoch_order
from revdata.torch_loader import TorchLoader

__all__ = [
    "ArgumentError",
    "DamagedDataError",
    "DataError",
    "DatasetInfo",
    "DeviceLoader",
    "ImageSet",
    "Loader",
    "MissingDataError",
    "TorchLoader",
    "describe",
    "epoch_order",
    "list_datasets",
    "load",
]
