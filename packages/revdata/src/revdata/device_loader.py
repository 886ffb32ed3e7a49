"""The whole set on the training device, and batches made there in a handful of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from revdata.loader import Loader
from revdata.order import CROP_COLUMN, CROP_ROW, FLIP, random_below


@dataclass(eq=False)
class DeviceLoader(Loader):
    """Keeps all images on the device as uint8 and makes the batches there.

    CIFAR takes 154 MB. No sample passes through Python, no worker process runs and nothing is
    copied from the host, so it can feed a network that takes a few milliseconds a step.
    Arguments, batches and errors are those of `Loader`.

    Example:
        >>> import revdata
        >>> digits = revdata.load("digits", "train")
        >>> loader = DeviceLoader(digits, 100, augment=True, shuffle=True)
        >>> x, y = next(iter(loader))
        >>> x.shape, y.shape
        (torch.Size([100, 1, 8, 8]), torch.Size([100]))
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        # Channels last, so that one pixel is one run of bytes and a batch of them is already in
        # the memory format that convolutions like best.
        self._images_NHWC = self.dataset.images.to(self.device).permute(0, 2, 3, 1).contiguous()
        self._labels = self.dataset.labels.to(self.device)
        mean = torch.tensor(self.dataset.mean, device=self.device)
        std = torch.tensor(self.dataset.std, device=self.device)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._rows = torch.arange(self.dataset.images.shape[2], device=self.device)
        self._columns = torch.arange(self.dataset.images.shape[3], device=self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Whatever can be worked out for all samples at once is, in some hundred kernels an epoch;
        # four are left for a batch: gather, normalize, combine two masks, apply them; and two of
        # these once more where a square is erased.
        order = self._order(self.device)
        labels = self._labels[order]
        windows = self._windows(order) if self.augment else None
        squares = self._squares(order) if self.cutout else None
        for part in self._slices():
            if windows is None:
                x_NHWC = self._normalize(self._images_NHWC[order[part]])
            else:
                x_NHWC = self._crop(order[part], *(window[part] for window in windows))
            if squares is not None:
                rows, columns = (square[part] for square in squares)
                x_NHWC.masked_fill_((rows[:, :, None] & columns[:, None, :])[..., None], 0.0)
            x_NCHW = x_NHWC.permute(0, 3, 1, 2).to(self.dtype)
            x_NCHW = x_NCHW.contiguous(memory_format=self.memory_format)
            if self.memory_format == torch.contiguous_format:
                # Of one channel the strides are any, and those of channels_last choose its kernels.
                x_NCHW = x_NCHW.reshape(-1).view(x_NCHW.shape)
            yield x_NCHW, labels[part]

    def _windows(self, order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws a whole epoch's crops, in a form that indexes the images as it is.

        Returns:
            The source row (N, H, 1) and column (N, 1, W) of every pixel, moved inside of the image
            where they were not, and whether they were, (N, H, 1, 1) and (N, 1, W, 1).
        """
        pad, seed, epoch = self.dataset.pad, self.seed, self.epoch
        row = random_below(2 * pad + 1, seed, CROP_ROW, epoch, index=order)[:, None] - pad
        column = random_below(2 * pad + 1, seed, CROP_COLUMN, epoch, index=order)[:, None] - pad
        columns = self._columns.expand(len(order), -1)
        if self.dataset.flip:
            mirrored = random_below(2, seed, FLIP, epoch, index=order)[:, None] == 1
            columns = torch.where(mirrored, columns.flip(1), columns)
        rows, columns = row + self._rows, column + columns
        rows_inside, columns_inside = (
            rows.clamp(0, len(self._rows) - 1),
            columns.clamp(0, len(self._columns) - 1),
        )
        return (
            rows_inside[:, :, None],
            columns_inside[:, None, :],
            (rows == rows_inside)[:, :, None, None],
            (columns == columns_inside)[:, None, :, None],
        )

    def _crop(
        self, index: Tensor, rows: Tensor, columns: Tensor, row_inside: Tensor, col_inside: Tensor
    ) -> Tensor:
        """Gathers float32 images (n, H, W, C) whose pixels outside of the original are zero."""
        x_NHWC = self._images_NHWC[index[:, None, None], rows, columns]
        return self._normalize(x_NHWC).mul_(row_inside & col_inside)

    def _normalize(self, x_NHWC: Tensor) -> Tensor:
        return torch.addcmul(self._shift, x_NHWC, self._scale)
