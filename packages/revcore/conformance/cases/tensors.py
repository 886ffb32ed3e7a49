"""What goes into a chain and comes out of it: shapes, strides, operations in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.adapters import Adapter
from conformance.questions import Observed, question
from conformance.subject import Attention, Subject, conv, loss_of, mlp

INPUTS = "Inputs"
IN_PLACE = "Operations in place"


@question(INPUTS)
def images(adapter: Adapter, device: torch.device) -> Observed:
    """Images, through convolutions."""
    return Subject(adapter, device, conv, (3, 4, 6, 5)).step()


class _SeesLayout(nn.Module):
    """Notes whether all that passes through is in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = True

    def forward(self, x: Tensor) -> Tensor:
        self.kept &= x.is_contiguous(memory_format=torch.channels_last)
        return x


@question(INPUTS)
def channels_last(adapter: Adapter, device: torch.device) -> Observed:
    """Images in channels_last stay so, in forward and in recomputation."""

    def branch(width: int, out: int) -> nn.Module:
        return nn.Sequential(conv(width, out), _SeesLayout())

    subject = Subject(adapter, device, branch, (3, 4, 6, 5))
    subject.net.to(memory_format=torch.channels_last)
    y = subject(subject.x.contiguous(memory_format=torch.channels_last))
    loss_of(y).backward()
    layouts = [module.kept for module in subject.parts(_SeesLayout)]
    kept = y.is_contiguous(memory_format=torch.channels_last)
    seen = subject.observe(output=y)
    return seen | {"channels_last inside": layouts, "channels_last outside": kept}


@question(INPUTS)
def signals(adapter: Adapter, device: torch.device) -> Observed:
    """Signals in one dimension."""

    def branch(width: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(width, out, 3, padding=1), nn.Tanh())

    return Subject(adapter, device, branch, (3, 4, 6)).step()


@question(INPUTS)
def volumes(adapter: Adapter, device: torch.device) -> Observed:
    """Volumes in three dimensions."""

    def branch(width: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(width, out, 3, padding=1), nn.Tanh())

    return Subject(adapter, device, branch, (2, 4, 3, 4, 3)).step()


@question(INPUTS)
def tokens(adapter: Adapter, device: torch.device) -> Observed:
    """Tokens through attention, split along the last dimension."""
    return Subject(adapter, device, Attention, (2, 5, 4), split_dim=2).step()


@question(INPUTS)
def vector(adapter: Adapter, device: torch.device) -> Observed:
    """A single vector, split along its only dimension."""
    return Subject(adapter, device, mlp, (4,), split_dim=0).step()


@question(INPUTS)
def batch_of_one(adapter: Adapter, device: torch.device) -> Observed:
    """A batch of one."""
    return Subject(adapter, device, mlp, (1, 4)).step()


@question(INPUTS)
def empty_batch(adapter: Adapter, device: torch.device) -> Observed:
    """An empty batch."""
    return Subject(adapter, device, mlp, (0, 4)).step()


@question(INPUTS)
def view(adapter: Adapter, device: torch.device) -> Observed:
    """The input is a view of a larger tensor, whose other part is used too."""
    subject = Subject(adapter, device)
    base = torch.cat((subject.x, subject.x * 2), 1)
    y = subject.net(base[:, :8])
    (loss_of(y) + loss_of(base[:, 8:])).backward()
    return subject.observe(output=y)


@question(INPUTS)
def not_contiguous(adapter: Adapter, device: torch.device) -> Observed:
    """The input is a transposed tensor."""
    subject = Subject(adapter, device)
    y = subject.net(subject.x.t().contiguous().t())
    loss_of(y).backward()
    return subject.observe(output=y)


@question(INPUTS)
def expanded(adapter: Adapter, device: torch.device) -> Observed:
    """The input is one row, expanded to a batch."""
    subject = Subject(adapter, device)
    y = subject.net((subject.x[:1] * 2).expand(5, -1))
    loss_of(y).backward()
    return subject.observe(output=y)


@question(INPUTS, may_raise=True)
def complex_numbers(adapter: Adapter, device: torch.device) -> Observed:
    """Complex streams."""

    def branch(width: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 7), nn.Linear(7, out))

    subject = Subject(adapter, device, branch, dtype=torch.complex128)
    y = subject()
    y.abs().square().sum().backward()
    return subject.observe(output=y)


@question(IN_PLACE)
def in_place_before(adapter: Adapter, device: torch.device) -> Observed:
    """The input was changed in place before the chain."""
    subject = Subject(adapter, device)
    y = subject.net((subject.x * 1).relu_())
    loss_of(y).backward()
    return subject.observe(output=y)


class _StartsInPlace(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inner = mlp(width, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(F.relu_(x))
        return y


@question(IN_PLACE, may_raise=True)
def in_place_first(adapter: Adapter, device: torch.device) -> Observed:
    """A branch changes its input in place."""
    return Subject(adapter, device, _StartsInPlace).step()


@question(IN_PLACE)
def in_place_inside(adapter: Adapter, device: torch.device) -> Observed:
    """A branch changes its own intermediate results in place."""

    def branch(width: int, out: int) -> nn.Module:
        inside = nn.Linear(width, 7), nn.ReLU(inplace=True), nn.Linear(7, out)
        return nn.Sequential(*inside, nn.ReLU(inplace=True))

    return Subject(adapter, device, branch).step()


@question(IN_PLACE, may_raise=True)
def in_place_on_output(adapter: Adapter, device: torch.device) -> Observed:
    """`relu_` on the chain's output."""
    subject = Subject(adapter, device)
    y = subject()
    loss_of(y.relu_()).backward()
    return subject.observe(output=y)


@question(IN_PLACE, may_raise=True)
def in_place_on_output_view(adapter: Adapter, device: torch.device) -> Observed:
    """`mul_` on a view of the chain's output."""
    subject = Subject(adapter, device)
    y = subject()
    y[:, 2:4].mul_(2)
    loss_of(y).backward()
    return subject.observe(output=y)


@question(IN_PLACE, may_raise=True)
def in_place_on_output_detached(adapter: Adapter, device: torch.device) -> Observed:
    """The chain's output is changed in place behind autograd's back, through `detach()`."""
    subject = Subject(adapter, device)
    y = subject()
    loss = loss_of(y.clone())
    y.detach().mul_(2)
    loss.backward()
    return subject.observe(output=y)


@question(IN_PLACE, may_raise=True)
def in_place_on_intermediate(adapter: Adapter, device: torch.device) -> Observed:
    """`mul_` between two chains, on the output of the first."""
    subject = Subject(adapter, device)
    y = subject().mul_(2)
    z = subject.net(y)
    loss_of(z).backward()
    return subject.observe(output=z)
