"""The same questions to every loader."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from revdata import ArgumentError, DeviceLoader, ImageSet, TorchLoader, epoch_order
from revdata.order import CUT_COLUMN, CUT_ROW, random_below

LOADERS = {
    "device": DeviceLoader,
    "torch": TorchLoader,
    "torch, 2 workers": functools.partial(TorchLoader, num_workers=2),
}


@pytest.fixture(params=LOADERS.values(), ids=LOADERS)
def make(request):
    return request.param


def image_set(count=50, *, split="train", channels=3, size=8, pad=2, flip=True):
    """Random images, of which each has its own label."""
    generator = torch.Generator().manual_seed(count)
    return ImageSet(
        "random",
        split,
        torch.randint(256, (count, channels, size, size), generator=generator).byte(),
        torch.arange(count),
        tuple(str(i) for i in range(count)),
        mean=(0.2, 0.5, 0.7)[:channels],
        std=(0.25, 0.3, 0.2)[:channels],
        pad=pad,
        flip=flip,
    )


def normalized(dataset):
    mean = torch.tensor(dataset.mean).view(-1, 1, 1)
    std = torch.tensor(dataset.std).view(-1, 1, 1)
    return (dataset.images / 255 - mean) / std


def epoch_of(loader, epoch=0):
    loader.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_samples_come_in_the_order_of_the_epoch(make, device):
    dataset = image_set()
    loader = make(dataset, 16, augment=False, shuffle=True, seed=3, device=device)
    for epoch in (0, 5):
        x, y = epoch_of(loader, epoch)
        order = epoch_order(50, seed=3, epoch=epoch, shuffle=True)
        assert x.device.type == y.device.type == device.type
        assert y.cpu().equal(order)
        torch.testing.assert_close(x.cpu(), normalized(dataset)[order], rtol=1e-5, atol=1e-5)


def test_augmented_samples_come_in_the_same_order(make):
    loader = make(image_set(), 16, augment=True, shuffle=True, seed=3)
    _, y = epoch_of(loader, 2)
    assert y.equal(epoch_order(50, seed=3, epoch=2, shuffle=True))


@pytest.mark.parametrize("split", ["test", "val"])
def test_test_images_are_never_augmented(make, split):
    dataset = image_set(split=split)
    with pytest.raises(ArgumentError, match="never augmented"):
        make(dataset, 16, augment=True, shuffle=False)
    with pytest.raises(ArgumentError, match="set cutout to 0"):
        make(dataset, 16, augment=False, cutout=2, shuffle=False)
    x, y = epoch_of(make(dataset, 16, augment=False, shuffle=False), 7)
    assert y.tolist() == list(range(50))
    torch.testing.assert_close(x, normalized(dataset), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pad", "flip"), [(2, True), (2, False), (0, True), (0, False)])
def test_an_augmented_image_is_a_crop_of_the_padded_one(make, pad, flip):
    dataset = image_set(pad=pad, flip=flip)
    x, y = epoch_of(make(dataset, 25, augment=True, shuffle=True))
    # Zeros around the normalized image: the padding has the color of the mean.
    padded = torch.nn.functional.pad(normalized(dataset), [pad] * 4)[y]
    crops = [
        padded[:, :, row : row + 8, column : column + 8]
        for row in range(2 * pad + 1)
        for column in range(2 * pad + 1)
    ]
    crops += [crop.flip(3) for crop in crops] if flip else []
    distances = torch.stack([(x - crop).abs().amax((1, 2, 3)) for crop in crops])
    assert distances.amin(0).max() < 1e-5
    assert len(distances.argmin(0).unique()) >= min(len(crops), 15)


def draws(make, seed):
    """Counts over (row, column, flip) of 16,200 augmented images whose pixels say where they were.

    Pixel value = 16 * row + column, and the middle of an image is never padding.
    """
    places = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    dataset = ImageSet(
        "places",
        "train",
        places.expand(16_200, -1, -1, -1),
        torch.zeros(16_200, dtype=torch.int64),
        ("place",),
        mean=(0.0,),
        std=(1.0,),
        pad=4,
        flip=True,
    )
    x, _ = epoch_of(make(dataset, 1000, augment=True, shuffle=True, seed=seed), 1)
    middle, right = (x[:, 0, 8, 8:10] * 255).round().long().unbind(1)
    flipped = (right < middle).long()
    row = middle // 16 - 4
    column = torch.where(flipped == 1, middle % 16 - 3, middle % 16 - 4)
    return torch.bincount((row * 9 + column) * 2 + flipped, minlength=162).double()


def test_augmentations_of_all_loaders_have_one_distribution():
    # 162 cells of 100 draws on average: 99.99th percentile with 161 degrees of freedom is 234.
    counts = {name: draws(LOADERS[name], seed=11) for name in ("device", "torch")}
    for count in counts.values():
        assert len(count) == 162
        assert ((count - 100) ** 2 / 100).sum() < 234
    device, torchs = counts.values()
    assert ((device - torchs) ** 2 / (device + torchs)).sum() < 234


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_cutout_erases_one_square(make, device, side, augment):
    """Around any pixel, so that it may stick out; all else stays as it was."""
    options = {"augment": augment, "shuffle": True, "seed": 4, "device": device}
    dataset = image_set(2000)
    height, width = dataset.images.shape[2:]
    whole, _ = epoch_of(make(dataset, 500, **options), 3)
    cut, _ = epoch_of(make(dataset, 500, cutout=side, **options), 3)
    order = epoch_order(2000, seed=4, epoch=3, shuffle=True)
    rows = random_below(height, 4, CUT_ROW, 3, index=order)
    columns = random_below(width, 4, CUT_COLUMN, 3, index=order)
    assert {(int(r), int(c)) for r, c in zip(rows, columns, strict=True)} == {
        (r, c) for r in range(height) for c in range(width)
    }
    for x, y, row, column in zip(whole.cpu(), cut.cpu(), rows, columns, strict=True):
        top, left = int(row) - side // 2, int(column) - side // 2
        x[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
        assert torch.equal(x, y)


def test_one_sample_is_augmented_otherwise_in_each_epoch(make):
    loader = make(image_set(1), 1, augment=True, shuffle=True)
    seen = {epoch_of(loader, epoch)[0].numpy().tobytes() for epoch in range(20)}
    assert len(seen) > 10


def test_an_epoch_depends_on_seed_and_number_alone(make):
    dataset = image_set()
    x, y = epoch_of(make(dataset, 16, augment=True, shuffle=True, seed=1), 4)
    other = make(dataset, 16, augment=True, shuffle=True, seed=1)
    epoch_of(other, 3)
    next(iter(other))
    again_x, again_y = epoch_of(other, 4)
    assert x.equal(again_x)
    assert y.equal(again_y)
    for seed, epoch in ((2, 4), (1, 5)):
        x_other, y_other = epoch_of(make(dataset, 16, augment=True, shuffle=True, seed=seed), epoch)
        assert not y.equal(y_other)
        assert not x[y.argsort()].equal(x_other[y_other.argsort()])


def test_a_sample_does_not_depend_on_the_batch_size(make):
    dataset = image_set()
    x, y = epoch_of(make(dataset, 16, augment=True, shuffle=True))
    x_other, y_other = epoch_of(make(dataset, 7, augment=True, shuffle=True))
    assert x.equal(x_other)
    assert y.equal(y_other)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_may_begin_at_any_batch(make, world_size):
    options = {"augment": True, "shuffle": True, "seed": 1, "world_size": world_size}
    dataset = image_set(49)
    for rank in range(world_size):
        loader = make(dataset, 12, rank=rank, **options)
        loader.set_epoch(3)
        whole = list(loader)
        for first in range(6):
            loader.set_epoch(3, first)
            assert len(loader) == 5
            rest = list(loader)
            assert len(rest) == 5 - first
            for (x, y), (x_whole, y_whole) in zip(rest, whole[first:], strict=True):
                assert x.equal(x_whole)
                assert y.equal(y_whole)
        loader.set_epoch(3)
        assert len(list(loader)) == 5
        for first in (-1, 6):
            with pytest.raises(ArgumentError, match=rf"first_batch \(={first}\)"):
                loader.set_epoch(3, first)


def ranks_together(make, dataset, batch_size, world_size, **options):
    """Joins what the ranks make of each batch."""
    ranks = [
        list(make(dataset, batch_size, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    return [
        tuple(torch.cat(parts) for parts in zip(*batch, strict=True))
        for batch in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_make_together_what_one_process_makes(make, world_size):
    options = {"augment": True, "shuffle": True, "seed": 2}
    dataset = image_set(49)
    alone = list(make(dataset, 12, **options))
    together = ranks_together(make, dataset, 12, world_size, **options)
    for (x, y), (x_together, y_together) in zip(alone, together, strict=True):
        assert x.equal(x_together)
        assert y.equal(y_together)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["device", "torch"]),
)
def test_every_image_is_seen_once_over_all_ranks(count, per_rank, world_size, drop_last, name):
    dataset, batch_size = image_set(count, size=2, pad=1), per_rank * world_size
    if drop_last and batch_size > count:
        return
    options = {"augment": False, "shuffle": True, "drop_last": drop_last}
    batches = ranks_together(LOADERS[name], dataset, batch_size, world_size, **options)
    seen = torch.cat([y for _, y in batches])
    order = epoch_order(count, seed=0, epoch=0, shuffle=True)
    assert seen.equal(order[: count // batch_size * batch_size] if drop_last else order)


def test_an_empty_part_has_the_shape_of_a_batch(make):
    loader = make(image_set(1), 4, rank=0, world_size=4, augment=True, shuffle=True)
    ((x, y),) = loader
    assert x.shape == (0, 3, 8, 8)
    assert y.shape == (0,)


def test_the_global_random_state_is_left_alone(make, device):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    gpu_before = torch.cuda.get_rng_state() if device.type == "cuda" else None
    epoch_of(make(image_set(), 16, augment=True, shuffle=True, device=device))
    assert torch.get_rng_state().equal(before)
    if gpu_before is not None:
        assert torch.cuda.get_rng_state().equal(gpu_before)


def test_samples_do_not_depend_on_the_global_random_state(make):
    epochs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        epochs.append(epoch_of(make(image_set(), 16, augment=True, shuffle=True))[0])
    assert epochs[0].equal(epochs[1])


def test_the_strides_of_one_channel_are_those_of_the_format(make):
    # torch tells channels_last by strides, also where both formats are the same.
    gray = image_set(channels=1)
    for augment in (False, True):
        for x, _ in make(gray, 16, augment=augment, shuffle=True):
            assert x.stride() == torch.empty(x.shape).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("augment", [True, False])
def test_dtype_and_memory_format(make, dtype, memory_format, augment):
    loader = make(
        image_set(), 16, augment=augment, shuffle=True, dtype=dtype, memory_format=memory_format
    )
    for x, y in loader:
        assert x.dtype == dtype
        assert y.dtype == torch.int64
        assert x.is_contiguous(memory_format=memory_format)


def test_the_images_stay_as_they_are(make):
    dataset = image_set(channels=1)
    before = dataset.images.clone()
    for x, _ in make(dataset, 16, augment=True, shuffle=True):
        x.zero_()
    assert dataset.images.equal(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch size \(=0\) must be at least 1"),
        ({"batch_size": -3}, "at least 1"),
        ({"batch_size": 10, "world_size": 4}, "multiple of 4"),
        ({"batch_size": 8, "world_size": 2, "rank": 2}, r"rank \(=2\)"),
        ({"batch_size": 51, "drop_last": True}, "take at most 50"),
        ({"cutout": -1}, r"cutout \(=-1\) must not be negative"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(make, options, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        make(image_set(), **{"batch_size": 5, "augment": False, "shuffle": False, **options})
    assert "\n" not in str(caught.value)


def test_no_images_and_negative_workers_are_refused(make):
    with pytest.raises(ArgumentError, match="no images"):
        make(image_set(0), 1, augment=False, shuffle=False)
    with pytest.raises(ArgumentError, match="num_workers"):
        TorchLoader(image_set(), 1, augment=False, shuffle=False, num_workers=-1)


class Operations(TorchDispatchMode):
    """Lists the operations that compute something; views are free."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("cutout", [0, 3])
@pytest.mark.parametrize("augment", [True, False])
def test_the_device_loader_makes_a_batch_in_a_handful_of_operations(device, augment, cutout):
    loader = DeviceLoader(
        image_set(),
        10,
        device=device,
        augment=augment,
        cutout=cutout,
        shuffle=True,
        memory_format=torch.channels_last,
    )
    batches = iter(loader)
    next(batches)  # works out the whole epoch
    with Operations() as operations:
        next(batches)
    masks = ["bitwise_and", "mul_"] if augment else []
    square = ["bitwise_and", "masked_fill_"] if cutout else []
    assert operations.names == ["index", "addcmul", *masks, *square]


def test_the_device_loader_makes_the_same_batches_on_every_device(device):
    options = {"augment": True, "shuffle": True, "seed": 5}
    here = DeviceLoader(image_set(), 16, device=device, **options)
    for (x, y), (x_cpu, y_cpu) in zip(here, DeviceLoader(image_set(), 16, **options), strict=True):
        torch.testing.assert_close(x.cpu(), x_cpu)
        assert y.cpu().equal(y_cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a device that the host can wait for")
def test_the_device_loader_never_waits_for_the_device():
    loader = DeviceLoader(image_set(), 16, device="cuda", augment=True, shuffle=True)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in loader:
            pass
    finally:
        torch.cuda.set_sync_debug_mode(before)
