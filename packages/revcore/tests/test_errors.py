"""What cannot be right raises an error that says what to do."""

import pytest
import torch
from cases import make_case
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import revcore


def block(branch=None):
    return revcore.ReversibleBlock(nn.Linear(4, 4) if branch is None else branch)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_unknown_coupling():
    with pytest.raises(ValueError, match=r"coupling='afine' is unknown; use one of .*'affine'"):
        revcore.ReversibleBlock(nn.Linear(4, 4), coupling="afine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: revcore.ReversibleBlock(f, coupling=lambda *_, **__: f), "returned Linear"),
        (lambda f: revcore.AffineCoupling(f, f, adapter="sigmoid"), r"adapter \(='sigmoid'\)"),
        (lambda f: revcore.AdditiveCoupling(f, f, split_dim=1.0), r"split_dim \(=1.0\)"),
        (lambda f: revcore.ReversibleBlock(f, split_dim="1"), r"split_dim \(='1'\)"),
        (lambda _: revcore.ReversibleSequential(block(), split_dim=None), r"split_dim \(=None\)"),
        (
            lambda _: revcore.set_reversing(block(), "no"),
            r"enabled \(='no'\) must be",
        ),
    ],
    ids=["coupling", "adapter", "of a coupling", "of a block", "of a chain", "enabled"],
)
def test_arguments_of_another_type(make, message):
    with pytest.raises(TypeError, match=message):
        make(nn.Linear(4, 4))


def test_a_coupling_that_is_given_as_a_branch():
    coupling = revcore.AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(TypeError, match="AdditiveCoupling, which is a block already"):
        revcore.ReversibleBlock(coupling)
    nested = revcore.ReversibleBlock(coupling, coupling)
    assert nested(torch.randn(2, 16)).shape == (2, 16)


def test_branch_that_is_no_module():
    with pytest.raises(TypeError, match=r"f must be an nn.Module, got function"):
        revcore.AdditiveCoupling(lambda x: x, nn.Linear(4, 4))


def test_block_that_is_not_reversible():
    with pytest.raises(TypeError, match=r"block 1 is a Linear.*ReversibleBlock"):
        revcore.ReversibleSequential(block(), nn.Linear(4, 4))


def test_conflicting_split_dim():
    odd_one = revcore.ReversibleBlock(nn.Linear(4, 4), split_dim=-1)
    with pytest.raises(ValueError, match=r"block 0 splits along split_dim=-1 .* split_dim=1"):
        revcore.ReversibleSequential(odd_one)


@pytest.mark.parametrize("call", ["forward", "inverse"])
@pytest.mark.parametrize("wrap", [block, lambda: revcore.ReversibleSequential(block())])
def test_input_that_cannot_be_split(call, wrap):
    run = getattr(wrap(), call)
    with pytest.raises(ValueError, match=r"split_dim=1 of size 7 .* shape \(2, 7\)"):
        run(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"cannot split along split_dim=1.* shape \(8,\)"):
        run(torch.zeros(8))
    with pytest.raises(TypeError, match="no argument"):
        run()
    with pytest.raises(TypeError, match=r"must be tensors, got Tensor, str; .* by keyword"):
        run(torch.zeros(2, 8), "mask")


@pytest.mark.parametrize("reversing", [True, False])
def test_branches_that_cannot_be_reversed(reversing):
    def run(function):
        revcore.set_reversing(block(Lambda(function)), reversing)(torch.randn(2, 8))

    with pytest.raises(ValueError, match=r"the stream has \(2, 4\), the branch returned \(2, 1\)"):
        run(lambda x: x[:, :1])
    with pytest.raises(TypeError, match="branch Lambda must return one tensor, got tuple"):
        run(lambda x: (x, x))
    with pytest.raises(RuntimeError, match=r"changes its input in place.*inplace=False"):
        run(lambda x: x.relu_())


def test_adapter_of_another_shape():
    f, g = nn.Linear(4, 4), nn.Linear(4, 4)
    coupling = revcore.AffineCoupling(f, g, adapter=revcore.sigmoid_adapter)
    with pytest.raises(ValueError, match=r"scale must have the shape of the stream, \(2, 4\)"):
        coupling(torch.zeros(2, 8))
    coupling = revcore.AffineCoupling(f, g, adapter=lambda t: t.exp())
    with pytest.raises(TypeError, match=r"must return a tuple of two tensors.*returned tensor"):
        coupling(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"twice the size of a stream along split_dim=1, got.*3"):
        revcore.sigmoid_adapter(torch.zeros(2, 3))


@pytest.mark.parametrize("through_a_view", [False, True])
@pytest.mark.parametrize("streams", [1, 2])
def test_output_changed_in_place(streams, through_a_view):
    chain = make_case("additive", "mlp", 2).chain
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = chain(x) if streams == 1 else torch.cat(result := chain(*x.chunk(2, 1)), 1)
    target = y if streams == 1 else result[0]
    if through_a_view:
        target[0].detach().mul_(2)
    else:
        target.relu_()
    with pytest.raises(RuntimeError, match="output of a reversible chain has been modified"):
        y.sum().backward()


def test_kept_input_changed_in_place():
    chain = make_case("additive", "mlp", 2).chain
    chain[0].keep_input = True
    x = torch.randn(3, 8, dtype=torch.float64)
    y = chain(x)
    x.zero_()
    with pytest.raises(RuntimeError, match=r"an input that .* keeps has been modified"):
        y.sum().backward()


def test_parameter_changed_before_backward():
    case = make_case("additive", "mlp", 2)
    y = case.chain(case.x)
    torch.optim.SGD(case.chain.parameters(), 0.1)
    with torch.no_grad():
        case.chain[0].coupling.f[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="parameter 'weight' of Linear was changed in place"):
        y.sum().backward()


def test_parameter_given_other_data_before_backward():
    """`p.data = ...` is not counted as a change in place."""
    case = make_case("additive", "mlp", 2)
    y = case.chain(case.x)
    weight = case.chain[0].coupling.f[0].weight
    weight.data = weight.data + 1
    with pytest.raises(RuntimeError, match="parameter 'weight' of Linear was changed in place"):
        y.sum().backward()


def test_buffer_changed_before_backward():
    case = make_case("additive", "conv2d", 2)
    case.chain.eval()
    y = case.chain(case.x)
    case.chain[1].coupling.f[0].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="buffer 'running_mean' of BatchNorm2d was changed"):
        y.sum().backward()


def test_argument_changed_before_backward():
    class Masked(nn.Linear):
        def forward(self, x, mask):
            return super().forward(x) * mask

    mask = torch.ones(4)
    y = block(Masked(4, 4))(torch.randn(2, 8), mask=mask)
    mask.zero_()
    with pytest.raises(RuntimeError, match="argument 'mask' was changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_tensor_that_a_branch_finds_elsewhere(input_needs_grad):
    secret = torch.ones(4, requires_grad=True)
    leaking = block(Lambda(lambda x: x * secret * 2))
    x = torch.randn(2, 8, requires_grad=input_needs_grad)
    with pytest.raises(RuntimeError, match=r"tensor of shape \(4,\) .* pass it by keyword"):
        leaking(x).sum().backward()


def test_branch_that_behaves_differently_when_repeated():
    calls = []

    class Drifts(nn.Module):
        def forward(self, x):
            calls.append(1)  # an attribute would be put back
            return x * torch.rand(len(calls)).sum()

    y = block(Drifts())(torch.randn(2, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match="drew other random numbers"):
        y.sum().backward()


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_streams_changed_between_blocks(how):
    chain = make_case("additive", "mlp", 2).chain

    def hook(_module, _args, streams):
        if how == "in place":
            with torch.no_grad():
                streams[0].mul_(2)
            return None
        return (streams[0] * 2, streams[1])

    chain[0].register_forward_hook(hook)
    with pytest.raises(RuntimeError, match=r"streams between two blocks .* were changed"):
        chain(torch.randn(3, 8, dtype=torch.float64))


def test_half_step_that_reads_what_it_changes():
    coupling = revcore.AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="target=1 and source=1"):
        revcore.HalfStep(coupling, coupling.f, 1, 1)
    with pytest.raises(TypeError, match=r"branch must be an nn\.Module, got function"):
        revcore.HalfStep(coupling, lambda x: x, 1, 0)


def test_only_modules_are_recomputed():
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got builtin_function"):
        revcore.recompute(torch.tanh, torch.zeros(2, requires_grad=True))


@pytest.mark.parametrize(
    "put",
    [
        lambda chain: chain.__setitem__(0, nn.Linear(4, 4)),
        lambda chain: chain.insert(0, nn.Linear(4, 4)),
        lambda chain: chain.__add__([nn.Linear(4, 4)]),
        lambda chain: chain.extend([nn.Linear(4, 4)]),
    ],
)
def test_a_chain_takes_no_other_blocks_later(put):
    chain = revcore.ReversibleSequential(block(), split_dim=-1)
    with pytest.raises(TypeError, match="is a Linear, which cannot be reversed"):
        put(chain)
    assert len(chain) == 1
    longer = (chain + chain).insert(0, block())
    longer[1] = block()
    for other in (longer, chain * 3, 3 * chain):
        assert type(other) is revcore.ReversibleSequential
        assert (len(other), other.split_dim, len(chain)) == (3, -1, 1)


def test_what_a_chain_takes_as_an_attribute():
    chain = revcore.ReversibleSequential(block())
    with pytest.raises(TypeError, match="block norm is a LayerNorm, which cannot be reversed"):
        chain.norm = nn.LayerNorm(8)
    chain.more = block()
    assert len(chain) == 2


def test_slices_of_chains_can_grow():
    chain = revcore.ReversibleSequential(*(block() for _ in range(4)))
    blocks = list(chain)
    for found, wanted in (
        (chain[1:] + chain[:1], [*blocks[1:], blocks[0]]),
        (chain[::2].append(blocks[1]), [blocks[0], blocks[2], blocks[1]]),
        (chain[2:] + chain[:2], blocks[2:] + blocks[:2]),
        (chain[1:] * 2, blocks[1:] * 2),
    ):
        assert type(found) is revcore.ReversibleSequential
        assert all(one is two for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_a_wrapped_block_that_splits_along_another_dimension(wrap):
    with pytest.raises(
        ValueError, match="splits along split_dim=1 and the chain along split_dim=-1"
    ):
        revcore.ReversibleSequential(wrap(block()), split_dim=-1)
    inner = revcore.ReversibleBlock(nn.Linear(4, 4), split_dim=-1)
    chain = revcore.ReversibleSequential(wrap(inner), split_dim=-1)
    assert chain(torch.zeros(3, 2, 8)).shape == (3, 2, 8)


class Normalized(nn.Module):
    """Has batch statistics on the one way and running ones on the other, as flows do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if not self.training:
            return x - self.mean
        mean = x.mean(0)
        self.mean.lerp_(mean.detach(), 0.1)
        return x - mean

    def inverse(self, y):
        return y + self.mean


def test_a_way_back_that_changes_buffers_alone():
    chain = revcore.ReversibleSequential(block(), Normalized(), block())
    y = torch.randn(5, 8, requires_grad=True)
    with pytest.raises(
        RuntimeError, match="buffer 'mean' of Normalized is changed by the way back"
    ):
        chain.inverse(y).sum().backward()
    assert (chain[1].mean == 0).all()
    chain.eval().inverse(y).sum().backward()


def test_lazy_buffers():
    norm = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(affine=False))
    lazy = revcore.ReversibleBlock(norm, nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="has lazy parameters"):
        lazy(torch.randn(3, 8, requires_grad=True))


def test_a_reentrant_checkpoint_in_a_branch():
    linear = nn.Linear(4, 4)
    chain = block(Lambda(lambda x: checkpoint(linear, x, use_reentrant=True)))
    chain.coupling.f.linear = chain.coupling.g.linear = linear
    y = chain(torch.randn(2, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"branch Lambda calls .* with use_reentrant=True"):
        y.sum().backward()


@pytest.mark.parametrize("frees", [True, False])
def test_parameters_that_fsdp_has_freed_meanwhile(frees):
    chain = block()
    y = chain(torch.randn(2, 8, requires_grad=True))
    storage = chain.coupling.g.weight.untyped_storage()
    if frees:
        storage.resize_(0)
        with pytest.raises(RuntimeError, match=r"parameters of branch Linear were freed .*reshard"):
            y.sum().backward()
    else:
        y.sum().backward()


def test_streams_that_fsdp_casts():
    chain = revcore.ReversibleSequential(block(), block())
    chain[1].register_forward_pre_hook(lambda _, streams: tuple(x.bfloat16() for x in streams))
    with pytest.raises(RuntimeError, match=r"a cast of FSDP, .* cast_forward_inputs=False"):
        chain(torch.randn(2, 8, requires_grad=True))
