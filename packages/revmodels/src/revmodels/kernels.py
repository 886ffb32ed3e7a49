"""Triton kernels of batch normalization in training, with the ReLU that follows it.

All of them see an image batch in `channels_last` as rows of channels, and lay several of those rows
side by side, so that a tile of 128 columns is as well used by 16 channels as by 512: a column
belongs to the channel `column % C`. Few kernels then serve all numbers of channels, and compiling
takes seconds.

Sums are taken in two stages, in an order that depends on the shape alone: no atomics, so the same
input gives the same bits. Squares are those of deviations from a pivot near the mean, so that a
mean that is large beside the deviation costs no precision.

References:
    Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift
    (Ioffe and Szegedy, 2015), algorithm 1 and the equations after it.
    https://arxiv.org/abs/1502.03167

    Algorithms for computing the sample variance: analysis and recommendations (Chan, Golub,
    LeVeque, 1983), on shifted data. https://doi.org/10.1080/00031305.1983.10483115
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pivot(x, channel, inside, rows, channels):
    """A value near each channel's mean: that of eight places of the batch."""
    apart = (rows // 8).to(tl.int64) * channels
    total = tl.load(x + channel, inside, other=0.0).to(tl.float32)
    for place in tl.static_range(1, 8):
        total += tl.load(x + place * apart + channel, inside, other=0.0).to(tl.float32)
    return total * 0.125


@triton.jit
def _store_sums(first, second, out, part, width, COLUMNS: tl.constexpr, FOLD: tl.constexpr):
    """Adds up the rows of two tiles; the columns of a channel become one if `FOLD` is smaller."""
    total, other = tl.sum(first, 0), tl.sum(second, 0)
    if FOLD < COLUMNS:
        total = tl.sum(tl.reshape(total, [COLUMNS // FOLD, FOLD]), 0)
        other = tl.sum(tl.reshape(other, [COLUMNS // FOLD, FOLD]), 0)
        width = FOLD
    column = tl.program_id(1) * FOLD + tl.arange(0, FOLD)
    tl.store(out + part * width + column, total, mask=column < width)
    out += tl.num_programs(0) * width
    tl.store(out + part * width + column, other, mask=column < width)


@triton.jit
def _add_up(partial, channel, inside, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Adds up what all programs stored."""
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = part[:, None] * channels + channel[None, :]
        valid = inside[None, :] & (part < parts)[:, None]
        first += tl.load(partial + place, mask=valid, other=0.0)
        second += tl.load(partial + parts * channels + place, mask=valid, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=["steps"])
def moments(
    x,
    partial,
    size,
    width,
    channels,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Sums of each column's deviations from its pivot, and of their squares."""
    part, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    pivot = _pivot(x, column % channels, inside, size // channels, channels)
    begin = part.to(tl.int64) * steps * ROWS * width
    x, left = x + begin, size - begin
    offset = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = tl.zeros([ROWS, COLUMNS], tl.float32)
    value = tl.load(x + offset, mask=inside[None, :] & (offset < left), other=0.0)
    for step in range(steps):
        # The next tile is on its way while this one is added.
        valid = inside[None, :] & (offset < left)
        x, left = x + ROWS * width, left - ROWS * width
        more = inside[None, :] & (offset < left) & (step + 1 < steps)
        following = tl.load(x + offset, mask=more, other=0.0)
        deviation = tl.where(valid, value.to(tl.float32) - pivot[None, :], 0.0)
        total += deviation
        square += deviation * deviation
        value = following
    _store_sums(total, square, partial, part, width, COLUMNS, FOLD)


@triton.jit
def _add_up_tiles(
    partial,
    channel,
    inside,
    rows,
    places,
    parts,
    channels,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Adds up what tiles of `places` rows stored, as deviations from the mean of the first one."""
    pivot = tl.load(partial + channel, inside, other=0.0) / tl.minimum(places, rows).to(tl.float32)
    first = tl.zeros([PARTS, CHANNELS], tl.float32)
    second = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = part[:, None] * channels + channel[None, :]
        valid = inside[None, :] & (part < parts)[:, None]
        count = tl.maximum(tl.minimum(rows - part * places, places), 1).to(tl.float32)[:, None]
        added = tl.load(partial + place, mask=valid, other=0.0)
        shift = tl.where(valid, added / count - pivot[None, :], 0.0)
        first += count * shift
        square = tl.load(partial + parts * channels + place, mask=valid, other=0.0)
        second += square + count * shift * shift
    return pivot, tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=["parts"])
def merge_moments(
    x,
    partial,
    mean,
    inverse,
    running_mean,
    running_var,
    batches,
    rows,
    places,
    parts,
    channels,
    momentum,
    eps,
    TRACK: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and deviation; updates the running statistics as nn.BatchNorm2d does.

    The sums are those of `moments`, or with `TILES` those that a convolution told.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    if TILES:
        pivot, total, square = _add_up_tiles(
            partial, channel, inside, rows, places, parts, channels, PARTS, CHANNELS
        )
    else:
        pivot = _pivot(x, channel, inside, rows, channels)
        total, square = _add_up(partial, channel, inside, parts, channels, PARTS, CHANNELS)
    count = rows.to(tl.float32)
    shift = total / count
    center = pivot + shift
    square -= total * shift
    square = tl.where(square < 0, 0.0, square)  # NaN stays NaN
    tl.store(mean + channel, center, mask=inside)
    tl.store(inverse + channel, 1.0 / tl.sqrt_rn(square / count + eps), mask=inside)
    if TRACK:
        old = tl.load(running_mean + channel, mask=inside, other=0.0)
        tl.store(running_mean + channel, (1 - momentum) * old + momentum * center, mask=inside)
        old = tl.load(running_var + channel, mask=inside, other=0.0)
        unbiased = square / (count - 1.0)
        tl.store(running_var + channel, (1 - momentum) * old + momentum * unbiased, mask=inside)
        first = tl.program_id(0) == 0
        tl.store(batches, tl.load(batches, mask=first) + 1, mask=first)


@triton.jit
def normalize(
    x,
    mean,
    inverse,
    weight,
    bias,
    y,
    size,
    width,
    channels,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scale and shift of every value by its channel's."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(0).to(tl.int64) * ROWS * width
    inside, channel = column < width, column % channels
    scale = tl.load(weight + channel, inside) * tl.load(inverse + channel, inside)
    center, shift = tl.load(mean + channel, inside), tl.load(bias + channel, inside)
    offset = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    valid = inside[None, :] & (offset < size - begin)
    value = tl.load(x + begin + offset, mask=valid, other=0.0).to(tl.float32)
    out = (value - center[None, :]) * scale[None, :] + shift[None, :]
    if RELU:
        out = tl.where(out <= 0, 0.0, out)  # NaN stays NaN
    tl.store(y + begin + offset, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["steps"])
def gradient_sums(
    grad,
    x,
    mean,
    inverse,
    weight,
    bias,
    partial,
    size,
    width,
    channels,
    steps,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Sums of the gradient, and of the gradient times the normalized value, of each column."""
    part, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, channel = column < width, column % channels
    begin = part.to(tl.int64) * steps * ROWS * width
    x, grad, left = x + begin, grad + begin, size - begin
    offset = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    valid = inside[None, :] & (offset < left)
    value = tl.load(x + offset, mask=valid, other=0.0)
    slope = tl.load(grad + offset, mask=valid, other=0.0)
    spread = tl.load(inverse + channel, inside)
    scale, shift = tl.load(weight + channel, inside) * spread, tl.load(bias + channel, inside)
    center = tl.load(mean + channel, inside)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        # The next tiles are on their way while these are added.
        x, grad, left = x + ROWS * width, grad + ROWS * width, left - ROWS * width
        valid = inside[None, :] & (offset < left) & (step + 1 < steps)
        next_value = tl.load(x + offset, mask=valid, other=0.0)
        next_slope = tl.load(grad + offset, mask=valid, other=0.0)
        centered, g = value.to(tl.float32) - center[None, :], slope.to(tl.float32)
        if RELU:
            g = tl.where(centered * scale[None, :] + shift[None, :] <= 0, 0.0, g)
        total += g
        product += g * centered
        value, slope = next_value, next_slope
    _store_sums(total, product * spread[None, :], partial, part, width, COLUMNS, FOLD)


@triton.jit(do_not_specialize=["parts"])
def merge_sums(
    partial,
    grad_bias,
    grad_weight,
    parts,
    channels,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Adds up the sums of all parts: the gradients of shift and scale."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    total, product = _add_up(partial, channel, inside, parts, channels, PARTS, CHANNELS)
    tl.store(grad_bias + channel, total, mask=inside)
    tl.store(grad_weight + channel, product, mask=inside)


@triton.jit
def input_gradient(
    grad,
    x,
    mean,
    inverse,
    weight,
    bias,
    grad_bias,
    grad_weight,
    base,
    out,
    size,
    width,
    channels,
    share,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of every value, through mean and variance, from the sums of its channel.

    With `ADD` it is added to `base`.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(0).to(tl.int64) * ROWS * width
    inside, channel = column < width, column % channels
    spread = tl.load(inverse + channel, inside)
    scale, shift = tl.load(weight + channel, inside) * spread, tl.load(bias + channel, inside)
    center = tl.load(mean + channel, inside)
    # What of the gradient moves the mean and the variance of the batch has no effect.
    constant = tl.load(grad_bias + channel, inside) * share
    slope = tl.load(grad_weight + channel, inside) * share * spread
    offset = tl.arange(0, ROWS)[:, None] * width + column[None, :]
    valid = inside[None, :] & (offset < size - begin)
    centered = tl.load(x + begin + offset, mask=valid, other=0.0).to(tl.float32) - center[None, :]
    g = tl.load(grad + begin + offset, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        g = tl.where(centered * scale[None, :] + shift[None, :] <= 0, 0.0, g)
    result = (g - constant[None, :] - centered * slope[None, :]) * scale[None, :]
    if ADD:
        result += tl.load(base + begin + offset, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + begin + offset, result.to(out.dtype.element_ty), mask=valid)
