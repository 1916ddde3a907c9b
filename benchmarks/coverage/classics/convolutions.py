"""Convolutional models for images and sequences."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .made import by_hand

C = 8


class WideResNet(nn.Module):
    """Two stages of three pre-activation blocks; the first block of the second is strided."""

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
            self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None

        def forward(self, x):
            y = F.relu(self.norm1(x))
            skip = x if self.shortcut is None else self.shortcut(y)
            return skip + self.conv2(F.relu(self.norm2(self.conv1(y))))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, 1, 1)
        plan = [(C, C, 1)] * 3 + [(C, 2 * C, 2), (2 * C, 2 * C, 1), (2 * C, 2 * C, 1)]
        self.blocks = nn.Sequential(*(self.Block(*sizes) for sizes in plan))
        self.norm, self.head = nn.BatchNorm2d(2 * C), nn.Linear(2 * C, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class ResNetD(nn.Module):
    """Pooled shortcuts where a stage begins; grouped convolutions (ResNeXt) in the blocks."""

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.conv = nn.Sequential(
                nn.Conv2d(before, after, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
                nn.Conv2d(after, after, 3, stride, 1, groups=4, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
                nn.Conv2d(after, after, 1, bias=False),
                nn.BatchNorm2d(after),
            )
            self.shortcut = nn.Identity()
            if stride > 1:
                self.shortcut = nn.Sequential(
                    nn.AvgPool2d(2), nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
                )
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.relu(self.conv(x) + self.shortcut(x))

    def __init__(self) -> None:
        super().__init__()
        plan = [(C, C, 1)] * 3 + [(C, 2 * C, 2), (2 * C, 2 * C, 1), (2 * C, 2 * C, 1)]
        self.stem, self.blocks = nn.Conv2d(3, C, 3, 1, 1), nn.Sequential(*(self.Block(*sizes) for sizes in plan))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


class MobileNetV3(nn.Module):
    """Inverted bottlenecks with squeeze and excitation; two of five are strided."""

    class Block(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.expand = nn.Sequential(nn.Conv2d(C, 2 * C, 1, bias=False), nn.BatchNorm2d(2 * C), nn.Hardswish())
            self.depthwise = nn.Sequential(
                nn.Conv2d(2 * C, 2 * C, 3, stride, 1, groups=2 * C, bias=False), nn.BatchNorm2d(2 * C), nn.Hardswish()
            )
            self.squeeze, self.excite = nn.Conv2d(2 * C, 4, 1), nn.Conv2d(4, 2 * C, 1)
            self.project = nn.Sequential(nn.Conv2d(2 * C, C, 1, bias=False), nn.BatchNorm2d(C))
            self.stride = stride

        def forward(self, x):
            y = self.depthwise(self.expand(x))
            y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
            y = self.project(y)
            return x + y if self.stride == 1 else y

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, 1, 1)
        self.blocks = nn.Sequential(*(self.Block(stride) for stride in (1, 1, 2, 1, 1, 1)))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


class ConvMixer(nn.Module):
    """The depthwise convolution has a shortcut, the pointwise one has none."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.Conv2d(3, C, 2, 2), nn.GELU(), nn.BatchNorm2d(C))
        self.depth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, C, 3, groups=C, padding="same"), nn.GELU(), nn.BatchNorm2d(C)) for _ in range(4)
        )
        self.point = nn.ModuleList(nn.Sequential(nn.Conv2d(C, C, 1), nn.GELU(), nn.BatchNorm2d(C)) for _ in range(4))

    def forward(self, x):
        x = self.patch(x)
        for depth, point in zip(self.depth, self.point, strict=True):
            x = point(x + depth(x))
        return x.mean((2, 3))


class UNet(nn.Module):
    """Blocks of convolutions, concatenated skips, no additions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, C, 3, 1, 1), nn.Conv2d(C, C, 3, 1, 1), nn.Conv2d(C, C, 3, 1, 1)])
        self.up = nn.ModuleList([nn.Conv2d(2 * C, C, 3, 1, 1), nn.Conv2d(2 * C, C, 3, 1, 1)])

    def forward(self, x):
        skips = []
        for conv in self.down[:-1]:
            x = F.relu(conv(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.relu(self.down[-1](x))
        for conv in self.up:
            x = F.interpolate(x, scale_factor=2)
            x = F.relu(conv(torch.cat([x, skips.pop()], 1)))
        return x


class DiffusionUNet(nn.Module):
    """ResNet blocks that see the time, three a level, and self-attention at the bottom, as in DDPM.

    Down three, pooled, three with attention, upsampled, concatenated and projected, three.
    """

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(2, C), nn.GroupNorm(2, C)
            self.conv1, self.conv2 = nn.Conv2d(C, C, 3, 1, 1), nn.Conv2d(C, C, 3, 1, 1)
            self.time = nn.Linear(4, C)

        def forward(self, x, t):
            y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
            return x + self.conv2(F.silu(self.norm2(y)))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.GroupNorm(2, C), nn.Conv2d(C, 3 * C, 1), nn.Conv2d(C, C, 1)

        def forward(self, x):
            b, c, h, w = x.shape
            q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
            y = F.scaled_dot_product_attention(q, k, v)
            return x + self.out(y.transpose(1, 2).reshape(b, c, h, w))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, 1, 1)
        self.down = nn.ModuleList(self.Block() for _ in range(3))
        self.middle = nn.ModuleList(self.Block() for _ in range(3))
        self.attention = nn.ModuleList(self.Attention() for _ in range(3))
        self.up = nn.ModuleList(self.Block() for _ in range(3))
        self.join, self.head = nn.Conv2d(2 * C, C, 1), nn.Conv2d(C, 3, 3, 1, 1)

    def forward(self, x, t):
        x = self.stem(x)
        for block in self.down:
            x = block(x, t)
        skip, x = x, F.avg_pool2d(x, 2)
        for block, attention in zip(self.middle, self.attention, strict=True):
            x = attention(block(x, t))
        x = self.join(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        for block in self.up:
            x = block(x, t)
        return self.head(x)


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else C, C, 3, padding=1) for i in range(6))
        self.head = nn.Linear(C, 5)

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(x))
            if i % 2:
                x = F.max_pool2d(x, 2)
        return self.head(x.flatten(1))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(C + 4 * i) for i in range(5))
        self.convs = nn.ModuleList(nn.Conv2d(C + 4 * i, 4, 3, 1, 1) for i in range(5))

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return x.mean((2, 3))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, 1, 1)
        self.one = nn.ModuleList(nn.Conv2d(C, 4, 1) for _ in range(4))
        self.three = nn.ModuleList(nn.Conv2d(C, 2, 3, padding=1) for _ in range(4))
        self.five = nn.ModuleList(nn.Conv2d(C, 2, 5, padding=2) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for branches in zip(self.one, self.three, self.five, strict=True):
            x = torch.cat([F.relu(branch(x)) for branch in branches], 1)
        return x.mean((2, 3))


class WaveNet(nn.Module):
    """Gated dilated convolutions, a residual and a summed skip output a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, C, 1)
        self.filters = nn.ModuleList(nn.Conv1d(C, C, 2, dilation=2**i) for i in range(5))
        self.gates = nn.ModuleList(nn.Conv1d(C, C, 2, dilation=2**i) for i in range(5))
        self.residual = nn.ModuleList(nn.Conv1d(C, C, 1) for _ in range(5))
        self.skip = nn.ModuleList(nn.Conv1d(C, C, 1) for _ in range(5))
        self.head = nn.Conv1d(C, 4, 1)

    def forward(self, x):
        x, total = self.stem(x), 0
        for i in range(5):
            past = F.pad(x, (2**i, 0))
            y = torch.tanh(self.filters[i](past)) * torch.sigmoid(self.gates[i](past))
            total = total + self.skip[i](y)
            x = x + self.residual[i](y)
        return self.head(F.relu(total))


class TCN(nn.Module):
    """Bai's temporal blocks: chomped causal convolutions with weight norm, ReLU behind the addition."""

    class Block(nn.Module):
        def __init__(self, dilation: int) -> None:
            super().__init__()
            conv = partial(nn.Conv1d, C, C, 3, padding=2 * dilation, dilation=dilation)
            self.conv1 = nn.utils.parametrizations.weight_norm(conv())
            self.conv2 = nn.utils.parametrizations.weight_norm(conv())
            self.chomp = 2 * dilation

        def forward(self, x):
            y = F.relu(self.conv1(x)[:, :, : -self.chomp])
            y = F.relu(self.conv2(y)[:, :, : -self.chomp])
            return F.relu(y + x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv1d(3, C, 1), nn.Sequential(*(self.Block(2**i) for i in range(4)))

    def forward(self, x):
        return self.blocks(self.stem(x))


class ConvTasNet(nn.Module):
    """A separator: blocks of depthwise convolutions, whose sum of skips is a mask on the encoded signal."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv1d(1, C, 4, 2), nn.ConvTranspose1d(C, 1, 4, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(C, 16, 1),
                nn.PReLU(),
                nn.GroupNorm(1, 16),
                nn.Conv1d(16, 16, 3, padding=2**i, dilation=2**i, groups=16),
                nn.PReLU(),
                nn.GroupNorm(1, 16),
                nn.Conv1d(16, C, 1),
            )
            for i in range(4)
        )

    def forward(self, x):
        coded = self.encode(x)
        y = coded
        for block in self.blocks:
            y = y + block(y)
        return self.decode(coded * torch.sigmoid(y))


class EDSR(nn.Module):
    """Super-resolution: scaled residual blocks, and one long shortcut over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.end = nn.Conv2d(3, C, 3, 1, 1), nn.Conv2d(C, C, 3, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, C, 3, 1, 1), nn.ReLU(), nn.Conv2d(C, C, 3, 1, 1)) for _ in range(5)
        )
        self.tail = nn.Sequential(nn.Conv2d(C, 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x):
        first = x = self.head(x)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.tail(first + self.end(x))


class Hourglass(nn.Module):
    """Residual blocks on the way down and up, two a level, skips added."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3, 1, 1))  # noqa: E731
        self.stem = nn.Conv2d(3, C, 3, 1, 1)
        self.parts = nn.ModuleList(nn.ModuleList(block() for _ in range(3)) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.parts[0]:
            x = x + block(x)
        skip, x = x, F.max_pool2d(x, 2)
        for block in self.parts[1]:
            x = x + block(x)
        x = skip + F.interpolate(x, scale_factor=2)
        for block in self.parts[2]:
            x = x + block(x)
        return x


case = by_hand("convolutions")
IMAGE = (2, 3, 8, 8)
CASES = [
    case("Wide ResNet", (3, 2), WideResNet, IMAGE, why="the strided block is in no chain"),
    case("ResNeXt with pooled shortcuts", (3, 2), ResNetD, IMAGE, why="the strided block is in no chain"),
    case("MobileNet v3", (2, 3), MobileNetV3, IMAGE, why="the strided block has no shortcut"),
    case(
        "ConvMixer", (), ConvMixer, IMAGE, why="every state goes through a pointwise convolution: no path of two links"
    ),
    case("U-Net", (), UNet, IMAGE, why="convolutions, and features side by side; nothing is added"),
    case(
        "diffusion U-Net",
        (3, 3, 6),
        DiffusionUNet,
        IMAGE,
        (2, 4),
        why="the middle has a block and an attention, thrice",
    ),
    case("VGG", (), VGG, IMAGE, why="convolutions one after the other; nothing is added"),
    case("DenseNet", (), DenseNet, IMAGE, why="features side by side; nothing is added"),
    case("Inception", (), Inception, IMAGE, why="features side by side; nothing is added"),
    case("WaveNet", (4,), WaveNet, (2, 1, 12), why="the fifth addition is not used: only skips reach the head"),
    case("TCN", (4,), TCN, (2, 3, 10)),
    case("Conv-TasNet", (4,), ConvTasNet, (2, 1, 20)),
    case("EDSR", (5,), EDSR, IMAGE, why="a convolution stands between the last block and the long shortcut"),
    case("hourglass", (7,), Hourglass, IMAGE, why="the pooled level is the block of one link"),
]
