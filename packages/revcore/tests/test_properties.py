"""Properties of any chain: schemes, shapes, dtypes, depths, branches and kept inputs, all mixed.

Forward has the bits of stored activations, the inverse gives the input back, and the gradients are
those of the same formulas in plain PyTorch.
"""

import copy
from dataclasses import dataclass, replace

import torch
from cases import SCHEMES, Attention, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import revcore

# Shape of a stream with a width of None, and the dimension of the width.
LAYOUTS = {
    "vectors": ((3, None), 1),
    "signals": ((2, None, 5), 1),
    "images": ((2, None, 4, 3), 1),
    "volumes": ((2, None, 3, 2, 3), 1),
    "tokens": ((2, 3, None), -1),
}
CONVS = {"signals": nn.Conv1d, "images": nn.Conv2d, "volumes": nn.Conv3d}
NORMS = {
    "vectors": nn.BatchNorm1d,
    "signals": nn.BatchNorm1d,
    "images": nn.BatchNorm2d,
    "volumes": nn.BatchNorm3d,
}


class Bend(nn.Module):
    """A map of the width of any layout, bounded so that no scale explodes."""

    def __init__(self, layout, width, out):
        super().__init__()
        self.dim = LAYOUTS[layout][1]
        self.map = CONVS[layout](width, out, 3, padding=1) if layout in CONVS else None
        self.linear = nn.Linear(width, out) if self.map is None else None

    def forward(self, x):
        if self.map is not None:
            return torch.tanh(self.map(x)) / 2
        return torch.tanh(self.linear(x)) / 2


class Nested(nn.Module):
    """A branch with a chain inside."""

    def __init__(self, layout, width, out):
        super().__init__()
        dim = LAYOUTS[layout][1]
        self.widen = Bend(layout, width, 4)
        blocks = (revcore.ReversibleBlock(Bend(layout, 2, 2), coupling=c) for c in SMOOTH)
        self.chain = revcore.ReversibleSequential(*blocks, split_dim=dim)
        self.narrow = Bend(layout, 4, out)

    def forward(self, x):
        return self.narrow(self.chain(self.widen(x)))


class Low(nn.Module):
    """A branch in bfloat16."""

    def __init__(self, layout, width, out):
        super().__init__()
        self.bend = Bend(layout, width, out)

    def forward(self, x):
        return self.bend(x.bfloat16())


def normed(layout, width, out):
    norm = nn.LayerNorm(width) if layout == "tokens" else NORMS[layout](width)
    return nn.Sequential(norm, nn.ReLU(inplace=True), Bend(layout, width, out))


def dropping(layout, width, out):
    return nn.Sequential(Bend(layout, width, 3), nn.Dropout(0.4), Bend(layout, 3, out))


def spectral(layout, width, out):
    bend = Bend(layout, width, out)
    nn.utils.parametrizations.spectral_norm(bend.linear if bend.map is None else bend.map)
    return bend


def attending(layout, width, out):
    if layout != "tokens":
        return Bend(layout, width, out)
    return nn.Sequential(nn.Linear(width, 4), Attention(4, out), nn.Tanh())


SMOOTH = ("additive", "affine")
BRANCHES = {
    "bend": Bend,
    "normed": normed,
    "dropping": dropping,
    "spectral": spectral,
    "attending": attending,
    "nested": Nested,
    "low": Low,
}
SMOOTHLY = tuple(name for name in BRANCHES if name != "low")  # what is rounded may jump
# "nested" has a chain inside that is not of fixed-point couplings. "spectral" uses a parameter
# twice: where a branch is shared, storing adds up four gradients in a row, reversing two and two.
EXACTLY = tuple(name for name in BRANCHES if name not in {"nested", "spectral"})


@dataclass(frozen=True)
class Plan:
    """A chain that may be built."""

    layout: str
    widths: tuple[int, int]
    blocks: list[tuple[str, str, str, bool, bool]]  # scheme, branches f and g, shared, keep_input
    frozen: set[int]
    needs_x: bool
    joined: bool
    training: bool
    used: tuple[bool, bool]
    seed: int

    def build(self, dtype):
        torch.manual_seed(self.seed)
        (a, b), blocks = self.widths, []
        shape, dim = LAYOUTS[self.layout]
        for scheme, first, second, shared, keep in self.blocks:
            case = SCHEMES[scheme]
            f = g = BRANCHES[first](self.layout, b, a * case.factor)
            if a != b or not shared:
                g = BRANCHES[second](self.layout, a, b * case.factor)
            coupling = case.coupling
            if scheme == "fixed-point" and dtype != torch.float64:
                coupling = revcore.FixedPointCoupling
            blocks.append(revcore.ReversibleBlock(f, g, coupling, dim, keep_input=keep))
            blocks[-1].keep_input_inverse = keep
        chain = revcore.ReversibleSequential(*blocks, split_dim=dim).to(dtype)
        for module in chain.modules():
            if isinstance(module, Low):
                module.bfloat16()
        for position in self.frozen:
            if position < len(chain):
                chain[position].requires_grad_(False)
        streams = [
            torch.randn([width if size is None else size for size in shape], dtype=dtype)
            for width in self.widths
        ]
        return chain.train(self.training), streams

    def plain(self, chain):
        """The chain's function written by hand; no line of it is shared with the engine."""
        dim = LAYOUTS[self.layout][1]

        def run(x1, x2):
            for block, (scheme, *_) in zip(chain, self.blocks, strict=True):
                formula, coupling = SCHEMES[scheme].formula, block.coupling
                x1 = formula(x1, coupling.f(x2.clone()), dim)
                x2 = formula(x2, coupling.g(x1.clone()), dim)
            return x1, x2

        return run

    def call(self, function, streams):
        """Calls with one tensor where the plan says so and the streams are equal."""
        if not self.joined or self.widths[0] != self.widths[1]:
            return function(*streams)
        dim = LAYOUTS[self.layout][1]
        return function(torch.cat(streams, dim)).chunk(2, dim)


@st.composite
def plans(draw, schemes=tuple(SCHEMES), branches=tuple(BRANCHES), training=None):
    # A grid is for a whole chain.
    mixed = [scheme for scheme in schemes if scheme != "fixed-point"]
    schemes = st.sampled_from(mixed if mixed and draw(st.booleans()) else ["fixed-point"])
    branch = st.sampled_from(branches)
    equal = draw(st.booleans())
    width = draw(st.integers(1, 4))
    return Plan(
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        widths=(width, width if equal else draw(st.integers(1, 4))),
        blocks=draw(
            st.lists(st.tuples(schemes, branch, branch, st.booleans(), st.booleans()), max_size=4)
        ),
        frozen=draw(st.sets(st.integers(0, 3), max_size=2)),
        needs_x=draw(st.booleans()),
        joined=draw(st.booleans()),
        training=draw(st.booleans()) if training is None else training,
        used=draw(st.sampled_from([(True, True), (True, False), (False, True)])),
        seed=draw(st.integers(0, 2**31)),
    )


def step(plan, function, module, streams):
    """One step from a given random state: outputs, gradients, buffers, the next random number."""
    module.zero_grad()
    inputs = [stream.clone().requires_grad_(plan.needs_x) for stream in streams]
    torch.manual_seed(plan.seed)
    outputs = function(inputs)
    used = [y for y, use in zip(outputs, plan.used, strict=True) if use]
    loss = sum((y.sin() * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum() for y in used)
    if loss.requires_grad:
        loss.backward()
    seen = {"next": torch.rand(2)}
    seen |= {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    seen |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    seen |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return seen | {f"buffer {name}": b.clone() for name, b in module.named_buffers()}


def without_none(seen, other):
    """Leaves out gradients that are zero on one side and missing on the other."""

    def empty(x):
        return x is None or not x.any()

    return {k: v for k, v in seen.items() if not (empty(v) and empty(other[k]))}


def agree(ours, plain, tolerance=1e-8):
    assert_same(without_none(ours, plain), without_none(plain, ours), tolerance)


@settings(max_examples=60, deadline=None)
@given(plan=plans(branches=SMOOTHLY))
def test_gradients_are_those_of_plain_autograd(plan):
    chain, streams = plan.build(torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    ours = step(plan, lambda x: plan.call(chain, x), chain, streams)
    agree(ours, step(plan, lambda x: plan.plain(twin)(*x), twin, streams))


@settings(max_examples=40, deadline=None)
@given(plan=plans(branches=SMOOTHLY))
def test_gradients_of_the_inverse_are_those_of_storing(plan):
    chain, streams = plan.build(torch.float64)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    ours = step(plan, lambda x: plan.call(chain.inverse, x), chain, streams)
    agree(ours, step(plan, lambda x: plan.call(twin.inverse, x), twin, streams))


@settings(max_examples=60, deadline=None)
@given(plan=plans(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_forward_has_the_bits_of_storing(plan, dtype):
    # In evaluation nn.MultiheadAttention takes another kernel where grad mode is off.
    plan = replace(plan, training=plan.training or any("attending" in b for b in plan.blocks))
    if dtype == torch.bfloat16 and any(block[0] == "fixed-point" for block in plan.blocks):
        dtype = torch.float32
    chain, streams = plan.build(dtype)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    seen = []
    for module in (chain, twin):
        torch.manual_seed(plan.seed)
        seen.append(plan.call(module, [x.clone().requires_grad_() for x in streams]))
        seen[-1] = (*seen[-1], *module.buffers(), torch.rand(2))
    for ours, stored in zip(*seen, strict=True):
        assert torch.equal(ours, stored)


@settings(max_examples=60, deadline=None)
@given(plan=plans(training=False), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_inverse_gives_the_input_back(plan, dtype):
    chain, streams = plan.build(dtype)
    exact = any(block[0] == "fixed-point" for block in plan.blocks)
    if exact:
        bits = chain[0].coupling.fraction_bits
        streams = [torch.round(x * 2.0**bits) / 2.0**bits for x in streams]
    with torch.no_grad():
        back = plan.call(chain.inverse, plan.call(chain, streams))
    for found, x in zip(back, streams, strict=True):
        if exact:
            assert torch.equal(found, x)
        elif not any("low" in block for block in plan.blocks):
            bound = 4000 * torch.finfo(dtype).eps
            torch.testing.assert_close(found, x, rtol=bound, atol=bound)


@settings(max_examples=60, deadline=None)
@given(
    plan=plans(schemes=("fixed-point",), branches=EXACTLY),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_fixed_point_has_the_gradients_of_storing_bit_for_bit(plan, dtype):
    chain, streams = plan.build(dtype)
    twin = revcore.set_reversing(copy.deepcopy(chain), False)
    ours = step(plan, lambda x: plan.call(chain, x), chain, streams)
    stored = step(plan, lambda x: plan.call(twin, x), twin, streams)
    for name, value in without_none(stored, ours).items():
        assert torch.equal(ours[name], value), name
