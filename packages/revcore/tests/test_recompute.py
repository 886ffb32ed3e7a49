"""A recomputed module computes what it computes, once, and keeps its input alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import revcore
from revcore import recompute


class Scaled(nn.Module):
    """Takes an extra argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.sin(self.layer(x)) * scale


def stack(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), *more, nn.Tanh(), nn.Linear(16, 6))


def with_chain() -> nn.Module:
    block = revcore.ReversibleBlock(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    return stack(revcore.ReversibleSequential(block))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layers": stack,
    "dropout": lambda: stack(nn.Dropout(0.5)),
    "batch norm": lambda: stack(nn.BatchNorm1d(16)),
    "spectral norm": lambda: stack(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))),
    "a chain": with_chain,
    "nothing": nn.Identity,
}


@pytest.fixture(params=list(MODULES))
def module(request: pytest.FixtureRequest, device: torch.device) -> nn.Module:
    return MODULES[request.param]().to(device)


def batch(device: torch.device) -> Tensor:
    return torch.randn(5, 8, device=device, requires_grad=True)


def run(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns outputs, gradients, buffers, and what the generator draws next."""
    torch.manual_seed(1)
    y = call(x)
    parameters = [p for p in module.parameters() if p.requires_grad]
    inputs = [x, *parameters] if x.requires_grad else parameters
    grads = torch.autograd.grad(y.square().sum(), inputs) if inputs else []
    return [y.detach(), *grads, *module.buffers(), torch.rand(3, device=x.device)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
def test_it_computes_what_the_module_computes(
    module: nn.Module, needs_x: bool, autocast: bool, device: torch.device
) -> None:
    x, twin = batch(device).detach().requires_grad_(needs_x), copy.deepcopy(module)

    def under(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                return call(x)

        return forward

    ours = run(under(lambda x: recompute(module, x)), module, x)
    theirs = run(under(twin), twin, x)
    assert all(map(torch.equal, ours, theirs))


def test_only_the_input_is_kept(device: torch.device) -> None:
    x, module = batch(device), nn.Sequential(*[nn.Linear(8, 8) for _ in range(50)]).to(device)
    kept = []
    for call in (module, lambda x: recompute(module, x)):
        with revcore.track_memory() as memory:
            y = call(x)
            kept.append(memory.live_bytes)
            del y
    assert kept[1] <= 512  # the output
    assert kept[0] > 40 * kept[1]


def test_frozen_parameters_and_frozen_modules(device: torch.device) -> None:
    module = stack().to(device)
    module[0].requires_grad_(False)
    x = batch(device)
    wanted = run(module, module, x)
    assert all(map(torch.equal, run(lambda x: recompute(module, x), module, x), wanted))
    module.requires_grad_(False)
    assert recompute(module, x.detach()).grad_fn is None


def test_arguments_get_their_gradients(device: torch.device) -> None:
    module, x = Scaled().to(device), batch(device)
    scale = torch.randn(6, device=device, requires_grad=True)
    found = torch.autograd.grad(recompute(module, x, scale=scale).sum(), (x, scale))
    wanted = torch.autograd.grad(module(x, scale=scale).sum(), (x, scale))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", ["batch norm", "dropout", "spectral norm"])
def test_between_chains_and_in_a_branch(name: str, device: torch.device) -> None:
    class Branch(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.body, self.again = MODULES[name](), again

        def forward(self, x: Tensor) -> Tensor:
            y = recompute(self.body, x) if self.again else self.body(x)
            return nn.functional.pad(y, (0, 2))

    results = []
    for again in (True, False):
        torch.manual_seed(2)
        chains = [
            revcore.ReversibleSequential(revcore.AdditiveCoupling(Branch(again), Branch(again)))
            for _ in range(2)
        ]
        whole = nn.ModuleList([*chains, nn.Linear(16, 16)]).to(device)
        first, second, between = whole

        def forward(x: Tensor, first=first, second=second, between=between, again=again) -> Tensor:
            middle = first(x)
            return second(recompute(between, middle) if again else between(middle))

        x = torch.randn(5, 16, device=device, requires_grad=True)
        results.append(run(forward, whole, x))
    assert all(map(torch.equal, *results))


def test_a_graph_that_is_retained(device: torch.device) -> None:
    module, x = stack(nn.Dropout(0.5)).to(device), batch(device)
    y = recompute(module, x).sum()
    grads = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    torch.autograd.grad(y, x)
    with pytest.raises(RuntimeError, match=r"recomputed module a second time.*retain_graph=True"):
        torch.autograd.grad(y, x)


def test_changes_in_place_are_refused(device: torch.device) -> None:
    module, x = stack().to(device), batch(device)
    h = x * 1
    y = recompute(module, h)
    h.add_(1)
    with pytest.raises(RuntimeError, match=r"an input that .* keeps has been modified"):
        y.sum().backward()
    y = recompute(module, x)
    with torch.no_grad():
        module[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="parameter 'weight' of Linear was changed in place"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="changes its input in place"):
        recompute(nn.ReLU(inplace=True), x * 1)


def test_modules_that_return_something_else(device: torch.device) -> None:
    with pytest.raises(TypeError, match="branch LSTM must return one tensor, got tuple"):
        recompute(nn.LSTM(8, 8).to(device), batch(device))


def test_second_derivatives_are_refused(device: torch.device) -> None:
    x = batch(device)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(recompute(stack().to(device), x).sum(), x, create_graph=True)


def test_tensors_of_others_are_refused(device: torch.device) -> None:
    module, other = stack().to(device), torch.randn(6, device=device, requires_grad=True)
    module.register_forward_hook(lambda _, __, y: y * other)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(6,\) that requires a gradient"):
        recompute(module, batch(device)).sum().backward()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients_it_is_a_call(mode: str, device: torch.device) -> None:
    module = stack().to(device)
    with getattr(torch, mode)():
        x = torch.randn(5, 8, device=device)
        assert torch.equal(recompute(module, x), module(x))


def test_compilers_and_transforms_see_the_module(device: torch.device) -> None:
    module, x = stack().to(device), batch(device)
    compiled = torch.compile(lambda x: recompute(module, x), backend="aot_eager", fullgraph=True)
    y = module(x)
    torch.testing.assert_close(compiled(x), y)
    found = torch.func.grad(lambda x: recompute(module, x).sum())(x.detach())
    torch.testing.assert_close(found, torch.autograd.grad(y.sum(), x)[0])


def test_in_a_cuda_graph(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need --device cuda")
    module, given = stack(nn.BatchNorm1d(16)).to(device), batch(device)

    def step() -> tuple[Tensor, ...]:
        loss = recompute(module, given).square().sum()
        return torch.autograd.grad(loss, (given, *module.parameters()))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        with torch.no_grad():
            given.copy_(torch.randn_like(given))
        graph.replay()
        for ours, theirs in zip(found, step(), strict=True):
            torch.testing.assert_close(ours, theirs)
