"""Attention and its replacements, written by hand. A layer has two links unless stated otherwise."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .made import W, by_hand

T, LAYERS = 6, 3


class Attention(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(W, W), nn.Linear(W, 2 * W), nn.Linear(W, W)
        self.heads = heads

    def forward(self, x, context=None):
        context = x if context is None else context
        parts = (self.q(x), *self.kv(context).chunk(2, -1))
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int = W) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class PreNorm(nn.Module):
    """Any two blocks, a layer norm before each."""

    def __init__(self, mix, feed=mlp, layers: int = LAYERS) -> None:
        super().__init__()
        self.mix, self.feed = nn.ModuleList(mix() for _ in range(layers)), nn.ModuleList(feed() for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(2 * layers + 1))

    def forward(self, x):
        for i, (mix, feed) in enumerate(zip(self.mix, self.feed, strict=True)):
            x = x + mix(self.norms[2 * i](x))
            x = x + feed(self.norms[2 * i + 1](x))
        return self.norms[-1](x)


class TokenMixing(nn.Module):
    """MLP-Mixer: an MLP over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(T)

    def forward(self, x):
        return self.net(x.transpose(1, 2)).transpose(1, 2)


class Fourier(nn.Module):
    """FNet."""

    def forward(self, x):
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real


class GlobalFilter(nn.Module):
    """GFNet: a learnt filter between a Fourier transform and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(T // 2 + 1, W, 2))

    def forward(self, x):
        y = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.weight.contiguous())
        return torch.fft.irfft(y, n=T, dim=1)


class AFNO(nn.Module):
    """A block-diagonal complex MLP on frequencies, soft shrinkage."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(0.1 * torch.randn(2, W, W)), nn.Parameter(0.1 * torch.randn(2, W, W))

    def forward(self, x):
        y = torch.fft.rfft(x, dim=1, norm="ortho")
        real = F.relu(y.real @ self.w1[0] - y.imag @ self.w1[1])
        imag = F.relu(y.imag @ self.w1[0] + y.real @ self.w1[1])
        real, imag = real @ self.w2[0] - imag @ self.w2[1], imag @ self.w2[0] + real @ self.w2[1]
        y = torch.view_as_complex(F.softshrink(torch.stack([real, imag], -1), 0.01))
        return torch.fft.irfft(y, n=T, dim=1, norm="ortho")


class SpatialGating(nn.Module):
    """The whole block of a gMLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(W, 4 * W), nn.Linear(2 * W, W), nn.LayerNorm(2 * W)
        self.space = nn.Linear(T, T)

    def forward(self, x):
        u, v = F.gelu(self.up(x)).chunk(2, -1)
        return self.down(u * self.space(self.norm(v).transpose(1, 2)).transpose(1, 2))


class GMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SpatialGating() for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(5))

    def forward(self, x):
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return x


class Pooling(nn.Module):
    """PoolFormer: what is left of the mean of the neighbours."""

    def forward(self, x):
        return F.avg_pool1d(x.transpose(1, 2), 3, 1, 1, count_include_pad=False).transpose(1, 2) - x


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
        norm = (q * k.cumsum(1)).sum(-1, keepdim=True)
        return self.out((q.unsqueeze(-2) @ states).squeeze(-2) / norm)


class Retention(nn.Module):
    """RetNet in its parallel form: decay in place of a softmax, a group norm, a swish gate."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvg, self.out, self.norm = nn.Linear(W, 4 * W), nn.Linear(W, W), nn.GroupNorm(2, W)

    def forward(self, x):
        q, k, v, gate = self.qkvg(x).chunk(4, -1)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        decay = torch.where(distance >= 0, 0.9 ** distance.clamp(min=0), 0.0).to(x.dtype)
        y = (q @ k.transpose(1, 2) * decay) @ v
        return self.out(F.silu(gate) * self.norm(y.flatten(0, 1)).view_as(y))


class LongConvolution(nn.Module):
    """Hyena: gates around a convolution as long as the sequence, by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.filter = nn.Parameter(0.2 * torch.randn(T, W))

    def forward(self, x):
        a, b, v = self.into(x).chunk(3, -1)
        y = torch.fft.irfft(
            torch.fft.rfft(v * a, n=2 * T, dim=1) * torch.fft.rfft(self.filter, n=2 * T, dim=0), n=2 * T, dim=1
        )
        return self.out(b * y[:, :T])


class Windows(nn.Module):
    """Swin's windows, shifted in every second layer."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.attention, self.shift = Attention(), shift

    def forward(self, x):
        b, t, c = x.shape
        y = torch.roll(x, -self.shift, 1).reshape(b * t // 2, 2, c)
        return torch.roll(self.attention(y).reshape(b, t, c), self.shift, 1)


class Swin(PreNorm):
    def __init__(self) -> None:
        super().__init__(lambda: Windows(0))
        self.mix = nn.ModuleList(Windows(i % 2) for i in range(LAYERS))


class PostNorm(nn.Module):
    """LayerNorm behind every addition; with ``alpha`` it is a DeepNet."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.mix, self.feed = nn.ModuleList(Attention() for _ in range(3)), nn.ModuleList(mlp() for _ in range(3))
        self.norms, self.alpha = nn.ModuleList(nn.LayerNorm(W) for _ in range(6)), alpha

    def forward(self, x):
        for i in range(3):
            x = self.norms[2 * i](self.alpha * x + self.mix[i](x))
            x = self.norms[2 * i + 1](self.alpha * x + self.feed[i](x))
        return x


class DiT(nn.Module):
    """A diffusion transformer: shift, scale and gate from a condition (adaLN-Zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.feed = nn.ModuleList(Attention() for _ in range(3)), nn.ModuleList(mlp() for _ in range(3))
        self.modulate = nn.ModuleList(nn.Linear(W, 6 * W) for _ in range(3))

    def forward(self, x, condition):
        for mix, feed, modulate in zip(self.mix, self.feed, self.modulate, strict=True):
            s1, b1, g1, s2, b2, g2 = modulate(F.silu(condition))[:, None].chunk(6, -1)
            x = x + g1 * mix(F.layer_norm(x, (W,)) * (1 + s1) + b1)
            x = x + g2 * feed(F.layer_norm(x, (W,)) * (1 + s2) + b2)
        return x


class Decoder(nn.Module):
    """Self-attention, attention to an encoder's output, MLP: three links a layer. No encoder: memory is given."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = (
            nn.ModuleList(Attention() for _ in range(3)),
            nn.ModuleList(Attention() for _ in range(3)),
        )
        self.feed = nn.ModuleList(mlp() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(9))

    def forward(self, x, memory):
        for i in range(3):
            x = x + self.own[i](self.norms[3 * i](x))
            x = x + self.other[i](self.norms[3 * i + 1](x), memory)
            x = x + self.feed[i](self.norms[3 * i + 2](x))
        return x


class ClassAttention(nn.Module):
    """CaiT's last layers: only the class token attends, and only it is updated."""

    def __init__(self) -> None:
        super().__init__()
        self.body = PreNorm(Attention, layers=2)
        self.token = nn.Parameter(torch.randn(1, 1, W))
        self.mix, self.feed = nn.ModuleList(Attention() for _ in range(3)), nn.ModuleList(mlp() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(6))

    def forward(self, x):
        x = self.body(x)
        token = self.token.expand(x.shape[0], -1, -1)
        for i in range(3):
            token = token + self.mix[i](self.norms[2 * i](token), self.norms[2 * i](torch.cat([token, x], 1)))
            token = token + self.feed[i](self.norms[2 * i + 1](token))
        return token


class SetTransformer(nn.Module):
    """Induced attention blocks: MAB(x, MAB(I, x)) with layer norms behind the additions."""

    class MAB(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.feed = Attention(), nn.Linear(W, W)
            self.norm1, self.norm2 = nn.LayerNorm(W), nn.LayerNorm(W)

        def forward(self, x, y):
            h = self.norm1(x + self.attention(x, y))
            return self.norm2(h + F.relu(self.feed(h)))

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.ParameterList(torch.randn(1, 3, W) for _ in range(3))
        self.inner, self.outer = (
            nn.ModuleList(self.MAB() for _ in range(3)),
            nn.ModuleList(self.MAB() for _ in range(3)),
        )

    def forward(self, x):
        for points, inner, outer in zip(self.points, self.inner, self.outer, strict=True):
            x = outer(x, inner(points.expand(x.shape[0], -1, -1), x))
        return x


class SlotAttention(nn.Module):
    """Slots compete for inputs; a GRU cell and an MLP update them, four times."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.cell, self.feed = nn.Parameter(torch.randn(1, 3, W)), nn.GRUCell(W, W), mlp()
        self.q, self.kv = nn.Linear(W, W), nn.Linear(W, 2 * W)
        self.norm1, self.norm2 = nn.LayerNorm(W), nn.LayerNorm(W)

    def forward(self, x):
        slots = self.slots.expand(x.shape[0], -1, -1)
        k, v = self.kv(x).chunk(2, -1)
        for _ in range(4):
            weights = torch.softmax(self.q(self.norm1(slots)) @ k.transpose(1, 2) / W**0.5, 1) + 1e-8
            updates = (weights / weights.sum(-1, keepdim=True)) @ v
            slots = self.cell(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.feed(self.norm2(slots))
        return slots


class Universal(nn.Module):
    """A universal transformer: one layer, again and again, with the step's number added to the state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.steps = PreNorm(Attention, layers=1), nn.Parameter(torch.randn(4, W))

    def forward(self, x):
        layer = self.layer
        for step in self.steps:
            x = x + step
            x = x + layer.mix[0](layer.norms[0](x))
            x = x + layer.feed[0](layer.norms[1](x))
        return x


class TransformerXL(nn.Module):
    """Each layer also attends to its own states of the segment before, which want no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.feed = nn.ModuleList(Attention() for _ in range(3)), nn.ModuleList(mlp() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(6))

    def forward(self, x, memory):
        for i in range(3):
            context = torch.cat([memory[i].detach(), x], 1)
            x = self.norms[2 * i](x + self.mix[i](x, context))
            x = self.norms[2 * i + 1](x + self.feed[i](x))
        return x


class GTrXL(nn.Module):
    """Gates in place of additions (a stabilised transformer for reinforcement learning)."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of_y, self.of_x, self.candidate = nn.Linear(W, 3 * W), nn.Linear(W, 2 * W), nn.Linear(W, W)

        def forward(self, x, y):
            ry, zy, hy = self.of_y(y).chunk(3, -1)
            rx, zx = self.of_x(x).chunk(2, -1)
            r, z = torch.sigmoid(ry + rx), torch.sigmoid(zy + zx - 2)
            return (1 - z) * x + z * torch.tanh(hy + self.candidate(r * x))

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.feed = nn.ModuleList(Attention() for _ in range(3)), nn.ModuleList(mlp() for _ in range(3))
        self.norms, self.gates = (
            nn.ModuleList(nn.LayerNorm(W) for _ in range(6)),
            nn.ModuleList(self.Gate() for _ in range(6)),
        )

    def forward(self, x):
        for i in range(3):
            x = self.gates[2 * i](x, F.relu(self.mix[i](self.norms[2 * i](x))))
            x = self.gates[2 * i + 1](x, F.relu(self.feed[i](self.norms[2 * i + 1](x))))
        return x


def torch_layers(norm_first: bool, **more):
    layer = nn.TransformerEncoderLayer(W, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first, **more)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


case = by_hand("attention and the like")
X = (2, T, W)
TWO = (2 * LAYERS,)
CASES = [
    case("pre-norm transformer", TWO, partial(PreNorm, Attention), X),
    case("MLP-Mixer", TWO, partial(PreNorm, TokenMixing), X),
    case("FNet by hand", TWO, partial(PreNorm, Fourier), X),
    case("global filter network", TWO, partial(PreNorm, GlobalFilter), X),
    case("AFNO", TWO, partial(PreNorm, AFNO), X),
    case("gMLP", (5,), GMLP, X),
    case("PoolFormer by hand", TWO, partial(PreNorm, Pooling), X, why="the pooled difference is the block"),
    case("linear attention", TWO, partial(PreNorm, LinearAttention), X),
    case("RetNet", TWO, partial(PreNorm, Retention), X),
    case("Hyena", TWO, partial(PreNorm, LongConvolution), X),
    case("shifted windows", TWO, Swin, X),
    case("post-norm transformer", TWO, PostNorm, X),
    case("DeepNet", TWO, partial(PostNorm, 2.4), X),
    case("DiT", TWO, DiT, X, (2, W)),
    case("cross-attending decoder", (9,), Decoder, X, X),
    case("class attention", (4, 6), ClassAttention, X, why="two layers of all tokens, three of the class token alone"),
    case("set transformer", TWO, SetTransformer, X, why="the induced points have a block of their own in every layer"),
    case("slot attention", (8,), SlotAttention, X, why="a gate and an addition a round"),
    case("universal transformer", (8,), Universal, X),
    case("Transformer-XL", TWO, TransformerXL, X, (3, 2, 4, W)),
    case("GTrXL", TWO, GTrXL, X),
    case("nn.TransformerEncoder, post-norm", TWO, partial(torch_layers, False), X),
    case("nn.TransformerEncoder, pre-norm", TWO, partial(torch_layers, True), X),
]
