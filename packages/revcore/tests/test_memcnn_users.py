"""Nets as MemCNN's users build them, with the import line changed: gradients as with `disable`.

Modelled on what is public: reversible V-Nets, invertible U-Nets, an implicit image decoder,
reversible generators that are trained in both directions, a joint network of a speech recognizer,
a flat vector in chunks.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same, gradients
from torch import nn

import revcore.memcnn as memcnn  # noqa: PLR0402 - as users write it


def stored(twin, net):
    """Makes `twin` the same net as `net`, without the trick."""
    twin.load_state_dict(net.state_dict())
    for part in twin.modules():
        if isinstance(part, memcnn.InvertibleModuleWrapper):
            part.disable = True
    return twin


class RevBlock3d(nn.Module):
    """The block of a reversible V-Net, which can be told to run backwards."""

    def __init__(self, channels, keep_input):
        super().__init__()
        self.rev_block = memcnn.InvertibleModuleWrapper(
            fn=memcnn.AdditiveCoupling(
                Fm=self.branch(channels // 2), Gm=self.branch(channels // 2)
            ),
            keep_input=keep_input,
            keep_input_inverse=keep_input,
        )

    def branch(self, channels):
        convolution = nn.Conv3d(channels, channels, kernel_size=5, padding=2)
        return nn.Sequential(convolution, nn.BatchNorm3d(channels), nn.PReLU(channels))

    def forward(self, x, inverse=False):
        return self.rev_block.inverse(x) if inverse else self.rev_block(x)


class VNet(nn.Module):
    def __init__(self, keep_input):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, padding=1)
        self.fine = nn.Sequential(*(RevBlock3d(4, keep_input) for _ in range(2)))
        self.down = nn.Sequential(nn.Conv3d(4, 8, 2, stride=2), nn.BatchNorm3d(8), nn.PReLU(8))
        self.coarse = nn.Sequential(*(RevBlock3d(8, keep_input) for _ in range(2)))
        self.up = nn.ConvTranspose3d(8, 4, 2, stride=2)
        self.last = RevBlock3d(8, keep_input)
        self.head = nn.Conv3d(8, 1, 1)

    def forward(self, x):
        fine = self.fine(self.stem(x))
        coarse = self.up(self.coarse(self.down(fine)))
        return self.head(self.last(torch.cat((coarse, fine), 1)))


class Decoder(nn.Module):
    """Pixels from coordinates, through linear layers with weight normalization."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 6), *(self.block() for _ in range(3)))

    def block(self):
        branches = (
            nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.LeakyReLU(inplace=True))
            for _ in range(2)
        )
        fn = memcnn.AdditiveCoupling(*branches)
        assert memcnn.is_invertible_module(fn, test_input_shape=(2, 6))
        return memcnn.InvertibleModuleWrapper(fn=fn)

    def forward(self, x):
        return self.layers(x.flatten(2).transpose(1, 2).reshape(-1, 2))


class Joint(nn.Module):
    """Two encodings, joined along the last of four dimensions."""

    def __init__(self):
        super().__init__()
        fn = memcnn.AdditiveCoupling(Fm=nn.Linear(4, 4), Gm=nn.Linear(4, 4), split_dim=3)
        assert memcnn.is_invertible_module(fn, test_input_shape=(4, 3, 2, 8))
        self.joint = memcnn.InvertibleModuleWrapper(fn, keep_input=False, keep_input_inverse=False)
        assert memcnn.is_invertible_module(self.joint, test_input_shape=(4, 3, 2, 8))

    def forward(self, x):
        a, b = x.flatten(2).chunk(2, -1)
        joined = torch.cat(torch.broadcast_tensors(a[:, :, None], b[:, None]), -1)
        return self.joint(joined[..., :8]).log_softmax(-1)


class Chunks(nn.Module):
    """A flat vector, to whose chunks one wrapper is applied, and to other chunks the next."""

    def __init__(self):
        super().__init__()
        for i, size in enumerate((2, 4)):
            fn = memcnn.AdditiveCoupling(self.operation(size), self.operation(size))
            self.add_module(f"invertible_{i}", memcnn.InvertibleModuleWrapper(fn, True, True))

    def operation(self, size):
        return nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, size))

    def forward(self, x):
        x, rest = x.flatten()[:-3], x.flatten()[-3:]
        x = x[: len(x) // 8 * 8].view(1, -1)
        for i, size in enumerate((4, 8)):
            wrapper = getattr(self, f"invertible_{i}")
            x = torch.concat([wrapper(chunk) for chunk in x.split(size, -1)], -1)
        return torch.concat((x.view(-1), rest))


class Downsampling(nn.Module):
    """A learned orthogonal map of 2x2 pixels to 4 channels; Cayley's transform makes it one."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.matrices = nn.Parameter(torch.randn(channels, 4, 4))

    def kernel(self):
        a = self.matrices - self.matrices.transpose(1, 2)
        one = torch.eye(4, dtype=a.dtype)
        return torch.linalg.solve(one + a, one - a).reshape(-1, 1, 2, 2)

    def forward(self, x):
        return F.conv2d(x, self.kernel(), stride=2, groups=self.channels)

    def inverse(self, y):
        return F.conv_transpose2d(y, self.kernel(), stride=2, groups=self.channels)


class SplitChannels(nn.Module):
    def forward(self, x):
        a, b = x.split((2, x.shape[1] - 2), 1)
        return a.clone(), b.clone()

    def inverse(self, a, b):
        return torch.cat((a, b), 1)


class InvertibleUNet(nn.Module):
    """Invertible as a whole: a part of the channels goes down, the rest waits to be joined."""

    def __init__(self):
        super().__init__()
        wrap = memcnn.InvertibleModuleWrapper
        self.fine = wrap(memcnn.AdditiveCoupling(self.branch(2)))
        self.split = wrap(SplitChannels())
        self.down = wrap(Downsampling(2))
        self.coarse = nn.ModuleList(wrap(memcnn.AdditiveCoupling(self.branch(4))) for _ in range(2))

    def branch(self, channels):
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.InstanceNorm2d(channels),
            nn.LeakyReLU(inplace=True),
        )

    def forward(self, x):
        down, rest = self.split(self.fine(x))
        y = self.down(down)
        for block in self.coarse:
            y = block(y)
        return self.split.inverse(self.down.inverse(y), rest)

    def inverse(self, y):
        down, rest = self.split(y)
        x = self.down(down)
        for block in reversed(self.coarse):
            x = block.inverse(x)
        return self.fine.inverse(self.split.inverse(self.down.inverse(x), rest))


class BothWays(nn.Module):
    """A generator whose inverse translates back; both are trained in one step."""

    def __init__(self):
        super().__init__()
        branches = [nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()) for _ in range(4)]
        blocks = [
            memcnn.ReversibleBlock(F, G, "additive", True, True, 1, 1)
            for F, G in zip(branches[::2], branches[1::2], strict=True)
        ]
        self.core = nn.Sequential(*blocks)
        self.encode, self.decode = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        there = self.decode(self.core(self.encode(x)))
        back = self.encode(x.flip(0))
        for block in reversed(self.core):
            back = block.inverse(back)
        return torch.cat((there, self.decode(back)))


NETS = {
    "V-Net": (lambda: VNet(False), (2, 1, 4, 4, 4)),
    "V-Net that keeps inputs": (lambda: VNet(True), (2, 1, 4, 4, 4)),
    "decoder": (Decoder, (3, 2, 4, 4)),
    "joint": (Joint, (2, 3, 8)),
    "chunks": (Chunks, (35,)),
    "invertible U-Net": (InvertibleUNet, (2, 4, 6, 6)),
    "both ways": (BothWays, (2, 4, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_stored_activations(name):
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = make().double()
    twin = stored(make().double(), net)
    x = torch.randn(shape, dtype=torch.float64)
    assert_same(gradients(net, net, x), gradients(twin, twin, x))


def test_the_whole_u_net_is_invertible():
    net = InvertibleUNet().eval()
    assert memcnn.is_invertible_module(net, test_input_shape=(2, 4, 6, 6), atol=1e-5)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(net.inverse(net(x)), x, atol=1e-5, rtol=1e-4)


def test_a_block_runs_backwards():
    block = RevBlock3d(4, keep_input=False).eval()
    x = torch.randn(2, 4, 4, 4, 4)
    torch.testing.assert_close(block(block(x), inverse=True), x, atol=1e-5, rtol=1e-4)
