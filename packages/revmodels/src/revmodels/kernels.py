"""Triton kernels of batch normalization in training, with the ReLU that follows it.

All of them see an image batch in `channels_last` as rows of channels, and lay several of those rows
side by side, so that a tile of 128 columns is as well used by 16 channels as by 512: a column
belongs to the channel `column % C`. Few kernels then serve all numbers of channels, and compiling
takes seconds.

Sums are taken in two stages, in an order that depends on the shape alone: no atomics, so the same
input gives the same bits.

References:
    Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift
    (Ioffe and Szegedy, 2015), algorithm 1 and the equations after it.
    https://arxiv.org/abs/1502.03167

    Note on a method for calculating corrected sums of squares and products (Welford, 1962).
    https://doi.org/10.1080/00401706.1962.10490022

    Updating formulae and a pairwise algorithm for computing sample variances
    (Chan, Golub, LeVeque, 1979), equation 2.1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["steps"])
def moments(
    x,
    counts,
    means,
    squares,
    size,
    width,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Count, mean and sum of squared deviations of each column, over `steps` tiles a program."""
    part, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = part.to(tl.int64) * steps * ROWS + tl.arange(0, ROWS)
    inside = (column < width)[None, :]
    # Welford's update in each element of the tile; a row that is past the end stays past it, so all
    # that are not have seen the same number of values.
    count = tl.zeros([ROWS, COLUMNS], tl.float32)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(steps):
        offset = row[:, None] * width + column[None, :]
        valid = inside & (offset < size)
        value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
        delta = tl.where(valid, value - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        square += delta * tl.where(valid, value - mean, 0.0)
        count += tl.where(valid, 1.0, 0.0)
        row += ROWS
    total = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    deviation = mean - center[None, :]
    spread = tl.sum(square + count * deviation * deviation, 0)
    if FOLD < COLUMNS:
        # The columns of a channel become one.
        count = tl.reshape(total, [COLUMNS // FOLD, FOLD])
        mean = tl.reshape(center, [COLUMNS // FOLD, FOLD])
        square = tl.reshape(spread, [COLUMNS // FOLD, FOLD])
        total = tl.sum(count, 0)
        center = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
        deviation = mean - center[None, :]
        spread = tl.sum(square + count * deviation * deviation, 0)
        width = FOLD
    column = tl.program_id(1) * FOLD + tl.arange(0, FOLD)
    place = part * width + column
    tl.store(counts + place, total, mask=column < width)
    tl.store(means + place, center, mask=column < width)
    tl.store(squares + place, spread, mask=column < width)


@triton.jit(do_not_specialize=["parts"])
def merge_moments(
    counts,
    means,
    squares,
    mean_out,
    inverse_out,
    running_mean,
    running_var,
    batches,
    parts,
    channels,
    momentum,
    eps,
    TRACK: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merges the moments of all parts; updates the running statistics as nn.BatchNorm2d does."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    count = tl.zeros([PARTS, CHANNELS], tl.float32)
    mean = tl.zeros([PARTS, CHANNELS], tl.float32)
    square = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = part[:, None] * channels + channel[None, :]
        valid = inside[None, :] & (part < parts)[:, None]
        more = tl.load(counts + place, mask=valid, other=0.0)
        delta = tl.load(means + place, mask=valid, other=0.0) - mean
        both = count + more
        share = more / tl.maximum(both, 1.0)
        mean += delta * share
        square += tl.load(squares + place, mask=valid, other=0.0) + delta * delta * count * share
        count = both
    total = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / tl.maximum(total, 1.0)
    deviation = mean - center[None, :]
    sum_of_squares = tl.sum(square + count * deviation * deviation, 0)
    tl.store(mean_out + channel, center, mask=inside)
    inverse = 1.0 / tl.sqrt_rn(sum_of_squares / tl.maximum(total, 1.0) + eps)
    tl.store(inverse_out + channel, inverse, mask=inside)
    if TRACK:
        old = tl.load(running_mean + channel, mask=inside, other=0.0)
        tl.store(running_mean + channel, (1 - momentum) * old + momentum * center, mask=inside)
        old = tl.load(running_var + channel, mask=inside, other=0.0)
        unbiased = sum_of_squares / tl.maximum(total - 1.0, 1.0)
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
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, channel = column < width, column % channels
    scale = tl.load(weight + channel, inside) * tl.load(inverse + channel, inside)
    center, shift = tl.load(mean + channel, inside), tl.load(bias + channel, inside)
    offset = row[:, None] * width + column[None, :]
    valid = inside[None, :] & (offset < size)
    value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    out = (value - center[None, :]) * scale[None, :] + shift[None, :]
    if RELU:
        out = tl.where(out <= 0, 0.0, out)  # NaN stays NaN
    tl.store(y + offset, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["steps"])
def gradient_sums(
    grad,
    x,
    mean,
    inverse,
    weight,
    bias,
    sums,
    products,
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
    row = part.to(tl.int64) * steps * ROWS + tl.arange(0, ROWS)
    inside, channel = column < width, column % channels
    spread = tl.load(inverse + channel, inside)
    scale, shift = tl.load(weight + channel, inside) * spread, tl.load(bias + channel, inside)
    center = tl.load(mean + channel, inside)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(steps):
        offset = row[:, None] * width + column[None, :]
        valid = inside[None, :] & (offset < size)
        centered = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32) - center[None, :]
        g = tl.load(grad + offset, mask=valid, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(centered * scale[None, :] + shift[None, :] <= 0, 0.0, g)
        total += g
        product += g * centered
        row += ROWS
    column_total, column_product = tl.sum(total, 0), tl.sum(product, 0) * spread
    if FOLD < COLUMNS:
        column_total = tl.sum(tl.reshape(column_total, [COLUMNS // FOLD, FOLD]), 0)
        column_product = tl.sum(tl.reshape(column_product, [COLUMNS // FOLD, FOLD]), 0)
        width = FOLD
    column = tl.program_id(1) * FOLD + tl.arange(0, FOLD)
    place = part * width + column
    tl.store(sums + place, column_total, mask=column < width)
    tl.store(products + place, column_product, mask=column < width)


@triton.jit(do_not_specialize=["parts"])
def merge_sums(
    sums,
    products,
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
    total = tl.zeros([PARTS, CHANNELS], tl.float32)
    product = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = part[:, None] * channels + channel[None, :]
        valid = inside[None, :] & (part < parts)[:, None]
        total += tl.load(sums + place, mask=valid, other=0.0)
        product += tl.load(products + place, mask=valid, other=0.0)
    tl.store(grad_bias + channel, tl.sum(total, 0), mask=inside)
    tl.store(grad_weight + channel, tl.sum(product, 0), mask=inside)


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
    out,
    size,
    width,
    channels,
    share,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of every value, through mean and variance, from the sums of its channel."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, channel = column < width, column % channels
    spread = tl.load(inverse + channel, inside)
    scale, shift = tl.load(weight + channel, inside) * spread, tl.load(bias + channel, inside)
    center = tl.load(mean + channel, inside)
    # What of the gradient moves the mean and the variance of the batch has no effect.
    constant = tl.load(grad_bias + channel, inside) * share
    slope = tl.load(grad_weight + channel, inside) * share * spread
    offset = row[:, None] * width + column[None, :]
    valid = inside[None, :] & (offset < size)
    centered = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32) - center[None, :]
    g = tl.load(grad + offset, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        g = tl.where(centered * scale[None, :] + shift[None, :] <= 0, 0.0, g)
    result = (g - constant[None, :] - centered * slope[None, :]) * scale[None, :]
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=valid)
