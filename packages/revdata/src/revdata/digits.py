"""Handwritten digits, 8x8 pixels in 17 shades of gray, that scikit-learn ships.

References:
    Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
    1998. https://doi.org/10.24432/C50P49
"""

from __future__ import annotations

import numpy as np
import torch

from revdata.errors import MissingDataError
from revdata.splits import TrainAndTest, hold_out

# The set has no official test split, so one image in five of each class is one.
_TEST_ONE_IN = 5


def read_digits() -> TrainAndTest:
    """Reads the 1,797 images; needs no network.

    Raises:
        MissingDataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  # an extra of this package
    except ImportError as error:
        raise MissingDataError(
            "the data set 'digits' comes with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    digits = load_digits()
    shades = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(shades).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test = hold_out(images, labels, _TEST_ONE_IN)
    classes = tuple(str(digit) for digit in range(10))
    return TrainAndTest(classes, images[~test], labels[~test], images[test], labels[test])
