"""Every way to ask autograd for gradients, and nothing kept afterwards."""

import gc
import weakref

import pytest
import torch
from cases import KINDS, assert_same, gradients, loss_of, make_case
from torch import nn

import revcore


def test_autograd_grad_of_subsets(device):
    case = make_case("additive", "conv2d", 3, device)
    twin = case.twin()
    x = case.x.clone().requires_grad_()
    parameters = list(case.chain.parameters())
    plain = list(twin.parameters())
    ours = torch.autograd.grad(loss_of(case.chain(x)), [x, parameters[-1]])
    expected = torch.autograd.grad(loss_of(case.plain(x, twin)), [x, plain[-1]])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    (one,) = torch.autograd.grad(loss_of(case.chain(x)), [parameters[0]])
    (expected,) = torch.autograd.grad(loss_of(case.plain(x, twin)), [plain[0]])
    torch.testing.assert_close(one, expected)
    assert all(p.grad is None for p in parameters)


def test_backward_with_inputs_in_parts(device):
    case = make_case("affine-exp", "conv2d", 3, device)
    twin = case.twin()
    first, rest = list(case.chain[:1].parameters()), list(case.chain[1:].parameters())
    loss = loss_of(case.chain(case.x))
    loss.backward(inputs=rest, retain_graph=True)
    assert all(p.grad is None for p in first)
    loss.backward(inputs=first)
    loss_of(case.plain(case.x, twin)).backward()
    for ours, plain in zip(case.chain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


def test_retained_graph_gives_the_same_again(device):
    case = make_case("additive", "conv2d", 3, device)
    x = case.x.clone().requires_grad_()
    loss = loss_of(case.chain(x))
    first = torch.autograd.grad(loss, x, retain_graph=True)
    second = torch.autograd.grad(loss, x)
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("parameters", [True, False])
def test_second_backward_without_retaining_is_refused(parameters, device):
    case = make_case("additive", "mlp", 2, device)
    case.chain.requires_grad_(parameters)
    loss = loss_of(case.chain(case.x.clone().requires_grad_()))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_outputs_by_two_calls(device):
    case = make_case("additive", "mlp", 3, device)
    twin = case.twin()
    x = case.x.clone().requires_grad_()
    y1, y2 = case.chain(*x.chunk(2, 1))
    ours = [
        *torch.autograd.grad(loss_of(y1), x, retain_graph=True),
        *torch.autograd.grad(loss_of(y2), x),
    ]
    z1, z2 = case.plain(x, twin).chunk(2, 1)
    torch.testing.assert_close(ours[0], torch.autograd.grad(loss_of(z1), x, retain_graph=True)[0])
    torch.testing.assert_close(ours[1], torch.autograd.grad(loss_of(z2), x)[0])


def test_accumulation_over_two_steps(device):
    case = make_case("additive", "mlp", 2, device)
    twin = case.twin()
    for scale in (1.0, 2.0):
        loss_of(case.chain(case.x * scale)).backward()
        loss_of(case.plain(case.x * scale, twin)).backward()
    for ours, plain in zip(case.chain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, device):
    case = make_case("additive", "conv2d", 2, device)
    case.chain.eval()
    expected = case.plain(case.x)
    with mode():
        y = case.chain(case.x)
        back = case.chain.inverse(y)
    assert not y.requires_grad
    assert torch.equal(y, expected)
    torch.testing.assert_close(back, case.x)


def test_double_backward_is_refused_and_stored_mode_does_it(device):
    case = make_case("additive", "mlp", 2, device)
    x = case.x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="set_reversing"):
        torch.autograd.grad(loss_of(case.chain(x)), x, create_graph=True)
    revcore.set_reversing(case.chain, False)
    (grad,) = torch.autograd.grad(loss_of(case.chain(x)), x, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_torch_func_and_forward_derivatives_run_stored(device):
    case = make_case("additive", "mlp", 2, device)
    twin = case.twin()
    by_transform = torch.func.grad(lambda x: loss_of(case.chain(x)))(case.x)
    x = case.x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(case.plain(x, twin)), x)
    torch.testing.assert_close(by_transform, expected)
    tangent = torch.ones_like(case.x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.x, tangent)
        derivative = torch.autograd.forward_ad.unpack_dual(loss_of(case.chain(dual))).tangent
    torch.testing.assert_close(derivative, (expected * tangent).sum())


@pytest.mark.parametrize("reversing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_inputs(kind, reversing, device):
    case = make_case("additive", kind, 2, device)
    chain = revcore.set_reversing(case.chain, reversing).eval()
    x = torch.stack((case.x, case.x * 2))
    expected = torch.stack([chain(each) for each in x])
    torch.testing.assert_close(torch.func.vmap(chain)(x), expected)


def test_functional_call_with_other_parameters(device):
    case = make_case("additive", "mlp", 2, device)
    twin = case.twin()
    x = case.x.clone().requires_grad_()
    source = {name: p.detach().clone().requires_grad_() for name, p in twin.named_parameters()}
    others = {name: p * 1.5 for name, p in source.items()}
    y = torch.func.functional_call(case.chain, others, (x,))
    ours = torch.autograd.grad(loss_of(y), [x, *source.values()])
    revcore.set_reversing(twin, False)
    y = torch.func.functional_call(twin, {n: p * 1.5 for n, p in source.items()}, (x,))
    for a, b in zip(ours, torch.autograd.grad(loss_of(y), [x, *source.values()]), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_of_branches_and_parameters_run_as_in_plain_autograd(device):
    def counts(reversing):
        case = make_case("additive", "mlp", 2, device)
        chain = revcore.set_reversing(case.chain, reversing)
        seen = {"backward": 0, "tensor": 0, "accumulated": 0, "forward": 0}

        def count(name, result=None):
            def hook(*_):
                seen[name] += 1
                return result

            return hook

        branch = chain[0].coupling.f
        branch.register_forward_hook(count("forward"))
        branch.register_full_backward_hook(count("backward"))
        parameter = branch[0].weight
        parameter.register_hook(lambda grad: (seen.update(tensor=seen["tensor"] + 1), grad * 2)[1])
        parameter.register_post_accumulate_grad_hook(count("accumulated"))
        loss_of(chain(case.x.requires_grad_())).backward()
        return seen, parameter.grad

    torch.manual_seed(3)
    ours, grad = counts(reversing=True)
    torch.manual_seed(3)
    plain, expected = counts(reversing=False)
    assert ours == plain | {"forward": 2}
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("reversing", [True, False])
def test_hooks_of_the_coupling_of_a_block_run(reversing, device):
    case = make_case("additive", "mlp", 3, device)
    chain, twin = revcore.set_reversing(case.chain, reversing), case.twin()
    seen = []
    coupling = chain[1].coupling
    coupling.register_forward_pre_hook(lambda *_: seen.append("before"))
    coupling.register_forward_hook(lambda *_: seen.append("after"))
    coupling.register_full_backward_hook(lambda *_: seen.append("backward"))
    ours = gradients(chain, chain, case.x)
    assert seen == ["before", "after", "backward"]
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, case.x))
    with torch.no_grad():
        chain[1](*case.x.chunk(2, 1))
    assert seen[3:] == ["before", "after"]


def test_a_hook_may_hand_on_an_alias(device):
    """FSDP does so around blocks, to be told when their backward pass is done."""
    case = make_case("additive", "mlp", 3, device)
    twin = case.twin()
    for block in case.chain:
        block.register_forward_pre_hook(lambda _module, args: tuple(x.view_as(x) for x in args))
    ours = gradients(case.chain, case.chain, case.x)
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, case.x))


def test_nothing_lives_on_after_backward(device):
    case = make_case("additive", "conv2d", 3, device)
    case.chain[1].keep_input = True
    with revcore.track_memory():  # torch imports a part of itself here, which leaves a cycle
        case.chain(case.x)
    gc.collect()
    gc.disable()
    try:
        x = case.x.clone().requires_grad_()
        with revcore.track_memory() as memory:
            y = case.chain(x)
            output = weakref.ref(y)
            loss = loss_of(y)
            del y
            loss.backward()
            x.grad = None
            for parameter in case.chain.parameters():
                parameter.grad = None
            assert output() is None
            assert memory.live_bytes == loss.nbytes  # the caller still holds the loss
    finally:
        gc.enable()


def test_an_exception_in_forward_leaves_nothing_behind(device):
    class Fails(nn.Module):
        def forward(self, x):
            raise FloatingPointError

    gc.collect()
    gc.disable()
    try:
        case = make_case("additive", "mlp", 2, device)
        broken = revcore.ReversibleSequential(case.chain[0], revcore.ReversibleBlock(Fails()))
        with revcore.track_memory() as memory:
            with pytest.raises(FloatingPointError):
                broken(case.x)
            assert memory.live_bytes == 0
    finally:
        gc.enable()
    # The thread is not stuck in the broken chain's recording.
    twin = case.twin()
    ours = gradients(case.chain, case.chain, case.x)
    assert_same(ours, gradients(lambda x: case.plain(x, twin), twin, case.x))


@pytest.mark.parametrize("scheme", ["additive", "affine-exp", "fixed-point"])
def test_the_gradient_of_an_output_that_another_is_made_of(scheme, device):
    case = make_case(scheme, "mlp", 3, device)
    found = []
    for reversing in (True, False):
        chain = revcore.set_reversing(case.chain, reversing)
        inner = []
        with chain[1].register_forward_hook(lambda *a, inner=inner: inner.append(a[2][0])):
            y1, y2 = chain(*case.x.clone().requires_grad_().chunk(2, 1))
        wanted = [y1, *inner, *chain.parameters()]
        y1.register_hook(lambda grad: grad / 2)
        found.append(torch.autograd.grad(loss_of(y1) + loss_of(y2), wanted))
    for ours, stored in zip(*found, strict=True):
        torch.testing.assert_close(ours, stored)
