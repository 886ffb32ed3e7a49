"""Triton kernels of a convolution that normalizes its input on the way, with a ReLU.

In `channels_last` a convolution is a product of two matrices: an image batch of `rows` places times
`channels`, and a weight of `outputs` times `channels`, once for each of the places around (taps)
that a kernel of 1x1 or 3x3 sees. With few channels it moves more bytes than it computes with, so
what counts is how often a batch is read and written. These kernels read the batch that comes before
the normalization and write the result: batch normalization and ReLU happen between memory and
product, in the backward pass, too, where they are computed again.

Channels and outputs are given in eights: the compiler then knows that it may read eight values of a
place at once, which makes all the difference.

Sums over places are taken in two stages, in an order that depends on the shape alone: the same
input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_scale(mean, inverse, weight, bias, channel, inside):
    """What makes normalization and its scale and shift one multiplication and one addition."""
    spread = tl.load(inverse + channel, inside, other=0.0)
    scale = tl.load(weight + channel, inside, other=0.0) * spread
    center = tl.load(mean + channel, inside, other=0.0)
    return center, scale, tl.load(bias + channel, inside, other=0.0), spread


@triton.jit
def _relu(value):
    return tl.where(value <= 0, 0.0, value)  # NaN stays NaN


@triton.jit
def _normalize(value, center, scale, shift):
    return _relu((value.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :])


@triton.jit
def _neighbor(
    tap,
    row,
    position,
    KERNEL: tl.constexpr,
    SIGN: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """How many rows away a tap's place is, and whether it is in the image."""
    down = (tap // KERNEL - KERNEL // 2) * SIGN
    across = (tap % KERNEL - KERNEL // 2) * SIGN
    y, x = (position // WIDTH) % HEIGHT + down, position % WIDTH + across
    return row + down * WIDTH + across, (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)


@triton.jit
def _to_integer(value):
    """Rounds to the nearest integer, a tie to the even one; the interpreter has no `rint`."""
    # From 2^23 on all float32 are integers: adding it, with the sign of the value, rounds.
    bits = value.to(tl.int32, bitcast=True)
    large = ((bits & -0x80000000) | 0x4B000000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < 8388608.0, (value + large) - large, value)


@triton.jit
def _largest(value):
    """The largest size in a tile, or NaN."""
    # As integers, sizes have the same order, and NaN is larger than infinity.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, None).to(tl.float32, bitcast=True)


@triton.jit
def _store_moments(tile, within, left, out, apart, wanted, ROWS: tl.constexpr):
    """Stores the sums of a tile's values, and of their squared deviations from their own mean."""
    value = tl.where(within[:, None], tile.to(tl.float32), 0.0)
    added = tl.sum(value, 0)
    center = added / tl.minimum(left, ROWS).to(tl.float32)
    deviation = tl.where(within[:, None], value - center[None, :], 0.0)
    tl.store(out, added, mask=wanted)
    tl.store(out + apart, tl.sum(deviation * deviation, 0), mask=wanted)


@triton.jit
def convolve(
    x,
    mean,
    inverse,
    weight,
    bias,
    matrix,
    base,
    out,
    peak,
    partial,
    rows,
    eights,
    output_eights,
    apart,
    sign,
    finer,
    coarser,
    limit,
    KERNEL: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    GRID: tl.constexpr,
    TELL: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """The convolution; with `ADD`, `base + sign` times it. Rows of `base` lie `apart`.

    With `GRID` it is rounded to multiples of `coarser`, of which `finer` make one, and the peak
    becomes infinite if a sum is not below the limit. With `TELL` it also stores the sums of each
    tile of the result.
    """
    channels, outputs = eights * 8, output_eights * 8
    # Programs that read the same rows run one after the other, so these come from the cache.
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    begin = tl.program_id(1).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    position = (begin % (HEIGHT * WIDTH)).to(tl.int32) + row
    within, wanted = row < rows - begin, output < outputs
    x += begin * channels
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    if KERNEL == 1:
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            inside = channel < channels
            center, scale, shift, _ = _load_scale(mean, inverse, weight, bias, channel, inside)
            value = tl.load(
                x + row[:, None] * channels + channel[None, :],
                mask=within[:, None] & inside[None, :],
                other=0.0,
            )
            normal = _normalize(value, center, scale, shift)
            if GRID:  # beyond the last row there must be nothing that is large
                normal = tl.where(within[:, None], normal, 0.0)
            factor_place = output[None, :] * channels + channel[:, None]
            factor = tl.load(
                matrix + factor_place, mask=wanted[None, :] & inside[:, None], other=0.0
            )
            total = tl.dot(normal.to(DTYPE), factor.to(DTYPE), total, input_precision=PRECISION)
    else:  # all channels are in one tile
        channel = tl.arange(0, CHANNELS)
        inside = channel < channels
        center, scale, shift, _ = _load_scale(mean, inverse, weight, bias, channel, inside)
        for tap in range(KERNEL * KERNEL):
            place, seen = _neighbor(tap, row, position, KERNEL, 1, HEIGHT, WIDTH)
            valid = (seen & within)[:, None] & inside[None, :]
            value = tl.load(x + place[:, None] * channels + channel[None, :], mask=valid, other=0.0)
            normal = _normalize(value, center, scale, shift)
            normal = tl.where(valid, normal, 0.0)  # beside the image there is nothing
            factor = tl.load(
                matrix + (output[None, :] * (KERNEL * KERNEL) + tap) * channels + channel[:, None],
                mask=wanted[None, :] & inside[:, None],
                other=0.0,
            )
            total = tl.dot(normal.to(DTYPE), factor.to(DTYPE), total, input_precision=PRECISION)
    valid = within[:, None] & wanted[None, :]
    if ADD:
        place = row[:, None] * apart + output[None, :]
        old = tl.load(base + begin * apart + place, mask=valid, other=0.0)
        if GRID:
            total = old.to(tl.float32) + _to_integer(total * finer) * (sign * coarser)
            if (_largest(total) < limit) == 0:  # NaN is not below
                tl.store(peak, float("inf"))
        else:
            total = old.to(tl.float32) + sign * total
    place = row[:, None] * outputs + output[None, :]
    written = total.to(out.dtype.element_ty)
    tl.store(out + begin * outputs + place, written, mask=valid)
    if TELL:
        partial += tl.program_id(1) * outputs + output
        between = tl.num_programs(1) * outputs
        _store_moments(written, within, rows - begin, partial, between, wanted, ROWS)


@triton.jit(do_not_specialize=["steps"])
def gradient_sums(
    grad,
    x,
    mean,
    inverse,
    weight,
    bias,
    matrix,
    partial,
    rows,
    eights,
    output_eights,
    steps,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Gradients of the matrix, and the sums that those of scale, shift and input need.

    One part of the rows each: a table of `outputs + 2` rows of `channels`, of which the last two
    are the sums of the gradient of what was normalized, and of that times the normalized value.
    """
    channels, outputs = eights * 8, output_eights * 8
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part, output = tl.program_id(1), tl.arange(0, OUTPUTS)
    inside, wanted = channel < channels, output < outputs
    center, scale, shift, spread = _load_scale(mean, inverse, weight, bias, channel, inside)
    factor_place = output[:, None] * channels + channel[None, :]
    factor_valid = wanted[:, None] & inside[None, :]
    factor = tl.load(matrix + factor_place, mask=factor_valid, other=0.0).to(DTYPE)
    begin = part.to(tl.int64) * steps * ROWS
    x, grad, left = x + begin * channels, grad + begin * outputs, rows - begin
    row = tl.arange(0, ROWS)
    x_place = row[:, None] * channels + channel[None, :]
    grad_place = row[:, None] * outputs + output[None, :]
    of_matrix = tl.zeros([OUTPUTS, CHANNELS], tl.float32)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in range(steps):
        within = row < left - step * ROWS
        value = tl.load(
            x + step * ROWS * channels + x_place,
            mask=within[:, None] & inside[None, :],
            other=0.0,
        )
        slope = tl.load(
            grad + step * ROWS * outputs + grad_place,
            mask=within[:, None] & wanted[None, :],
            other=0.0,
        ).to(DTYPE)
        centered = value.to(tl.float32) - center[None, :]
        normal = centered * scale[None, :] + shift[None, :]
        of_normal = tl.dot(slope, factor, input_precision=PRECISION)
        of_normal = tl.where(normal <= 0, 0.0, of_normal)
        total += of_normal
        product += of_normal * centered
        of_matrix = tl.dot(
            tl.trans(slope),
            _relu(normal).to(DTYPE),
            of_matrix,
            input_precision=PRECISION,
        )
    partial += part * (outputs + 2) * channels
    tl.store(partial + factor_place, of_matrix, mask=factor_valid)
    partial += outputs * channels
    tl.store(partial + channel, tl.sum(total, 0), mask=inside)
    tl.store(partial + channels + channel, tl.sum(product, 0) * spread, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def add_up(
    partial,
    of_matrix,
    grad_bias,
    grad_weight,
    parts,
    size,
    channels,
    MORE: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds up the tables of all parts: `size` numbers, with `MORE` two rows of `channels` more."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    all_columns = size
    if MORE:
        all_columns += 2 * channels
    inside = column < all_columns
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        valid = inside[None, :] & (part < parts)[:, None]
        total += tl.load(
            partial + part[:, None] * all_columns + column[None, :], mask=valid, other=0.0
        )
    found = tl.sum(total, 0)
    tl.store(of_matrix + column, found.to(of_matrix.dtype.element_ty), mask=column < size)
    if MORE:
        column -= size
        tl.store(grad_bias + column, found, mask=(column >= 0) & (column < channels))
        column -= channels
        tl.store(grad_weight + column, found, mask=(column >= 0) & (column < channels))


@triton.jit
def input_gradient(
    grad,
    x,
    mean,
    inverse,
    weight,
    bias,
    matrix,
    grad_bias,
    grad_weight,
    base,
    out,
    rows,
    eights,
    output_eights,
    apart,
    share,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """The gradient of every value, through the convolution, mean and variance.

    With `ADD` it is added to `base`, whose rows lie `apart`.
    """
    channels, outputs = eights * 8, output_eights * 8
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1).to(tl.int64) * ROWS
    row, inside = tl.arange(0, ROWS), channel < channels
    within = row < rows - begin
    x, grad, out = x + begin * channels, grad + begin * outputs, out + begin * channels
    of_normal = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, outputs, OUTPUTS):
        output = start + tl.arange(0, OUTPUTS)
        wanted = output < outputs
        slope = tl.load(
            grad + row[:, None] * outputs + output[None, :],
            mask=within[:, None] & wanted[None, :],
            other=0.0,
        )
        factor = tl.load(
            matrix + output[:, None] * channels + channel[None, :],
            mask=wanted[:, None] & inside[None, :],
            other=0.0,
        )
        of_normal = tl.dot(slope.to(DTYPE), factor.to(DTYPE), of_normal, input_precision=PRECISION)
    center, scale, shift, spread = _load_scale(mean, inverse, weight, bias, channel, inside)
    # What of the gradient moves the mean and the variance of the batch has no effect.
    constant = tl.load(grad_bias + channel, inside, other=0.0) * share
    tilt = tl.load(grad_weight + channel, inside, other=0.0) * share * spread
    valid = within[:, None] & inside[None, :]
    place = row[:, None] * channels + channel[None, :]
    centered = tl.load(x + place, mask=valid, other=0.0).to(tl.float32) - center[None, :]
    of_normal = tl.where(centered * scale[None, :] + shift[None, :] <= 0, 0.0, of_normal)
    result = (of_normal - constant[None, :] - centered * tilt[None, :]) * scale[None, :]
    if ADD:
        before = base + begin * apart + row[:, None] * apart + channel[None, :]
        result += tl.load(before, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["steps"])
def activation_gradient(
    grad,
    x,
    mean,
    inverse,
    weight,
    bias,
    matrix,
    out,
    partial,
    rows,
    eights,
    output_eights,
    steps,
    KERNEL: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """The gradient of what was normalized, through convolution and ReLU, and its sums.

    The sums are the two that those of scale, shift and input need: of the gradient, and of that
    times the normalized value. One row for each part of the rows, one table for each sum.
    """
    channels, outputs = eights * 8, output_eights * 8
    part, row, channel = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    inside = channel < channels
    center, scale, shift, spread = _load_scale(mean, inverse, weight, bias, channel, inside)
    begin = part.to(tl.int64) * steps * ROWS
    position = (begin % (HEIGHT * WIDTH)).to(tl.int32) + row
    output = tl.arange(0, OUTPUTS)
    wanted = output < outputs
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    for _ in range(steps):
        within = row < rows - begin
        of_normal = tl.zeros([ROWS, CHANNELS], tl.float32)
        for tap in range(KERNEL * KERNEL):
            place, seen = _neighbor(tap, row, position, KERNEL, -1, HEIGHT, WIDTH)
            slope = tl.load(
                grad + begin * outputs + place[:, None] * outputs + output[None, :],
                mask=(seen & within)[:, None] & wanted[None, :],
                other=0.0,
            )
            factor = tl.load(
                matrix + (output[:, None] * (KERNEL * KERNEL) + tap) * channels + channel[None, :],
                mask=wanted[:, None] & inside[None, :],
                other=0.0,
            )
            of_normal = tl.dot(
                slope.to(DTYPE), factor.to(DTYPE), of_normal, input_precision=PRECISION
            )
        valid = within[:, None] & inside[None, :]
        place = begin * channels + row[:, None] * channels + channel[None, :]
        centered = tl.load(x + place, mask=valid, other=0.0).to(tl.float32) - center[None, :]
        of_normal = tl.where(centered * scale[None, :] + shift[None, :] <= 0, 0.0, of_normal)
        total += of_normal
        product += of_normal * centered
        tl.store(out + place, of_normal.to(out.dtype.element_ty), mask=valid)
        begin += ROWS
        position += ROWS
    partial += part * channels
    tl.store(partial + channel, tl.sum(total, 0), mask=inside)
    partial += tl.num_programs(0) * channels
    tl.store(partial + channel, tl.sum(product, 0) * spread, mask=inside)


@triton.jit(do_not_specialize=["steps"])
def matrix_gradient(
    grad,
    x,
    mean,
    inverse,
    weight,
    bias,
    partial,
    rows,
    eights,
    output_eights,
    steps,
    KERNEL: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """The gradient of the weight, for one tap and one part of the rows each."""
    channels, outputs = eights * 8, output_eights * 8
    tap, part = tl.program_id(0), tl.program_id(1)
    output, channel = tl.arange(0, OUTPUTS), tl.arange(0, CHANNELS)
    inside, wanted, row = channel < channels, output < outputs, tl.arange(0, ROWS)
    center, scale, shift, _ = _load_scale(mean, inverse, weight, bias, channel, inside)
    begin = part.to(tl.int64) * steps * ROWS
    position = (begin % (HEIGHT * WIDTH)).to(tl.int32) + row
    total = tl.zeros([CHANNELS, OUTPUTS], tl.float32)
    for step in range(steps):
        first = begin + step * ROWS
        within = row < rows - first
        place, seen = _neighbor(tap, row, position, KERNEL, -1, HEIGHT, WIDTH)
        slope = tl.load(
            grad + first * outputs + place[:, None] * outputs + output[None, :],
            mask=(seen & within)[:, None] & wanted[None, :],
            other=0.0,
        )
        value = tl.load(
            x + first * channels + row[:, None] * channels + channel[None, :],
            mask=within[:, None] & inside[None, :],
            other=0.0,
        )
        normal = (value.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]
        total = tl.dot(
            tl.trans(_relu(normal).to(DTYPE)),
            slope.to(DTYPE),
            total,
            input_precision=PRECISION,
        )
        position += ROWS
    place = (output[:, None] * (KERNEL * KERNEL) + tap) * channels + channel[None, :]
    partial += part * outputs * KERNEL * KERNEL * channels
    tl.store(partial + place, tl.trans(total), mask=wanted[:, None] & inside[None, :])
