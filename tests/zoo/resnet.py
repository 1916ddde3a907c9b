"""Convolutional residual networks: pre-activation (K = 1), and post-activation with stages (K = the mask)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, ExpectedChain, Link, program_of, residual, setup
from .residual import linear

CHANNELS, SIZE, BATCH = 3, 4, 3


def conv3(a: int, b: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False)


def norm2d(channels: int) -> nn.BatchNorm2d:
    """With nontrivial statistics and affine part, so that eval mode is not the identity."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(1.0 + 0.2 * torch.randn(channels))
        norm.bias.copy_(0.2 * torch.randn(channels))
        norm.running_mean.copy_(0.1 * torch.randn(channels))
        norm.running_var.copy_(1.0 + 0.5 * torch.rand(channels))
    return norm


class PreActivationBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = norm2d(channels), conv3(channels, channels)
        self.bn2, self.conv2 = norm2d(channels), conv3(channels, channels)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return x + out


class PreActivationResNet(nn.Module):
    def __init__(self, depth: int = 5, training: bool = True) -> None:
        super().__init__()
        self.stem = conv3(3, CHANNELS)
        self.blocks = nn.Sequential(*(PreActivationBlock(CHANNELS) for _ in range(depth)))
        self.norm = norm2d(CHANNELS)
        self.head = nn.Linear(CHANNELS, 3)
        self.train(training)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class BasicBlock(nn.Module):
    """``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``, as in ResNet-18 and ResNet-110."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(channels_in, channels, stride), norm2d(channels)
        self.conv2, self.bn2 = conv3(channels, channels), norm2d(channels)
        self.relu = nn.ReLU(inplace=inplace)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), norm2d(channels)
            )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, a stage of 5 identity blocks, a strided block, 4 identity blocks, pooling, classifier."""

    def __init__(self, training: bool = True, inplace: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = conv3(3, CHANNELS), norm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=inplace)
        self.stage1 = nn.Sequential(*(BasicBlock(CHANNELS, CHANNELS, inplace=inplace) for _ in range(5)))
        self.stage2 = nn.Sequential(
            BasicBlock(CHANNELS, 4, stride=2, inplace=inplace),
            *(BasicBlock(4, 4, inplace=inplace) for _ in range(4)),
        )
        self.fc = nn.Linear(4, 3)
        self.train(training)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = self.stage2(self.stage1(x))
        return self.fc(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """``relu(x + y * gate(y))``: the block has a join of its own, where the gradients of ``y`` meet."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3(CHANNELS, CHANNELS) for _ in range(4))
        self.gates = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.Sigmoid())
            for _ in range(4)
        )

    def forward(self, x):
        for conv, gate in zip(self.convs, self.gates, strict=True):
            y = conv(x)
            y = y * gate(y)
            y += x
            x = F.relu(y)
        return x.mean((2, 3))


class NormOnTrunk(nn.Module):
    """``bn(x + conv(relu(conv(x))))``: BatchNorm on the trunk, K = weight / sigma."""

    def __init__(self, depth: int = 5, training: bool = True) -> None:
        super().__init__()
        self.first = nn.ModuleList(conv3(CHANNELS, CHANNELS) for _ in range(depth))
        self.second = nn.ModuleList(conv3(CHANNELS, CHANNELS) for _ in range(depth))
        self.norms = nn.ModuleList(norm2d(CHANNELS) for _ in range(depth))
        self.train(training)

    def forward(self, x):
        for first, second, norm in zip(self.first, self.second, self.norms, strict=True):
            x = norm(x + second(F.relu(first(x))))
        return x.mean((2, 3))


def conv(layer: nn.Conv2d, x):
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)


def batch_norm(norm: nn.BatchNorm2d, x, hold=lambda t: t):
    """BatchNorm written out, so that the mean and the deviation can be held and no buffer changes."""
    if norm.training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, variance = norm.running_mean, norm.running_var
    deviation = torch.sqrt(variance + norm.eps)
    centred = x - hold(mean)[:, None, None]
    return centred / hold(deviation)[:, None, None] * norm.weight[:, None, None] + norm.bias[:, None, None]


def pre_activation(block: PreActivationBlock):
    def apply(x):
        out = conv(block.conv1, F.relu(batch_norm(block.bn1, x)))
        return conv(block.conv2, F.relu(batch_norm(block.bn2, out)))

    return apply


def _pre_activation_program(model):
    def forward(run, x):
        chain = run([residual(pre_activation(block)) for block in model.blocks], (conv(model.stem, x),))
        (x,) = chain.states[-1]
        return linear(model.head, F.relu(batch_norm(model.norm, x)).mean((2, 3)))

    return program_of(model, forward)


def basic(block: BasicBlock, x):
    out = F.relu(batch_norm(block.bn1, conv(block.conv1, x)))
    return batch_norm(block.bn2, conv(block.conv2, out))


def _identity_link(block: BasicBlock):
    return Link(lambda state, side, hold: ((F.relu(state[0] + hold(basic(block, state[0]))),), ()))


def _resnet_program(model):
    strided, *rest = model.stage2

    def forward(run, x):
        x = F.relu(batch_norm(model.bn, conv(model.conv, x)))
        (x,) = run([_identity_link(block) for block in model.stage1], (x,)).states[-1]
        shortcut, norm = strided.shortcut
        x = F.relu(basic(strided, x) + batch_norm(norm, F.conv2d(x, shortcut.weight, stride=shortcut.stride)))
        (x,) = run([_identity_link(block) for block in rest], (x,)).states[-1]
        return linear(model.fc, x.mean((2, 3)))

    return program_of(model, forward)


def _squeeze_excite_program(model):
    def link(weights, gate):
        def step(state, side, hold):
            (x,) = state
            y = conv(weights, x)
            pooled = y.mean((2, 3), keepdim=True)
            return (F.relu(x + hold(y * torch.sigmoid(conv(gate[1], pooled)))),), ()

        return Link(step)

    def forward(run, x):
        links = [link(*parts) for parts in zip(model.convs, model.gates, strict=True)]
        return run(links, (x,)).states[-1][0].mean((2, 3))

    return program_of(model, forward)


def _norm_on_trunk_program(model):
    def link(first, second, norm):
        def step(state, side, hold):
            (x,) = state
            return (batch_norm(norm, x + hold(conv(second, F.relu(conv(first, x)))), hold),), ()

        return Link(step)

    def forward(run, x):
        links = [link(*parts) for parts in zip(model.first, model.second, model.norms, strict=True)]
        return run(links, (x,)).states[-1][0].mean((2, 3))

    return program_of(model, forward)


IMAGE, STATE = (BATCH, 3, SIZE, SIZE), (BATCH, CHANNELS, SIZE, SIZE)
STAGES = (ExpectedChain(5, "mask"), ExpectedChain(4, "mask"))

CASES = [
    Case("resnet_preact_train", setup(PreActivationResNet, IMAGE), _pre_activation_program, (ExpectedChain(5, "1"),)),
    Case(
        "resnet_preact_eval",
        setup(lambda: PreActivationResNet(training=False), IMAGE),
        _pre_activation_program,
        (ExpectedChain(5, "1"),),
    ),
    Case("resnet_postact_train", setup(ResNet, IMAGE), _resnet_program, STAGES),
    Case("resnet_postact_eval", setup(lambda: ResNet(training=False), IMAGE), _resnet_program, STAGES),
    Case("resnet_postact_not_in_place", setup(lambda: ResNet(inplace=False), IMAGE), _resnet_program, STAGES),
    Case(
        "resnet_norm_on_trunk_train",
        setup(NormOnTrunk, STATE),
        _norm_on_trunk_program,
        (ExpectedChain(5, "weight/sigma"),),
    ),
    Case(
        "resnet_norm_on_trunk_eval",
        setup(lambda: NormOnTrunk(training=False), STATE),
        _norm_on_trunk_program,
        (ExpectedChain(5, "weight/sigma"),),
    ),
    Case("resnet_squeeze_excite", setup(SqueezeExcite, STATE), _squeeze_excite_program, (ExpectedChain(4, "mask"),)),
]
