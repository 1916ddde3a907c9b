"""A character-level language model: GRU or LSTM of one to three layers, or a Transformer like GPT-2.

    python examples/char_lm.py                                      # GRU on the text of Python's help()
    python examples/char_lm.py --cell transformer --iterations 5    # damping 0.2 by default
    python examples/char_lm.py --cell lstm --layers 3 --preset paper --text war_and_peace.txt

Every state has a loss here. ``--preset paper`` uses the paper's sizes (recurrent: 512 wide, 256 steps, batch 128;
Transformer: 12 layers, 256 wide), which need a GPU. ``small``, the default, is for a laptop.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from data import characters, text, windows
from torch import nn
from training import Task, main, parser

PRESETS = {
    ("recurrent", "small"): {"layers": 1, "width": 128, "length": 64, "batch": 32, "damping": 0.0},
    ("recurrent", "paper"): {"layers": 1, "width": 512, "length": 256, "batch": 128, "damping": 0.0},
    ("transformer", "small"): {"layers": 6, "width": 64, "length": 64, "batch": 16, "damping": 0.2},
    ("transformer", "paper"): {"layers": 12, "width": 256, "length": 256, "batch": 128, "damping": 0.2},
}


class Recurrent(nn.Module):
    """Characters [B, length] -> logits [B, length, alphabet]"""

    def __init__(self, cell: str, alphabet: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, width)
        self.rnn = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](width, width, layers, batch_first=True)
        self.head = nn.Linear(width, alphabet)

    def forward(self, x):
        states, _ = self.rnn(self.embedding(x))
        return self.head(states)


class Block(nn.Module):
    """Attention and feed-forward network, each after a LayerNorm: two links."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attention(self, x):
        batch, length, width = x.shape
        query, key, value = self.mix(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters [B, length] -> logits [B, length, alphabet]; initialised like GPT-2."""

    def __init__(self, alphabet: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(alphabet, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 32)) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, alphabet, bias=False)
        for label, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_trunk = label.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * layers) ** 0.5 if into_trunk else 1))
            elif label.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = parser(__doc__, epochs=5, iterations=3)
    p.add_argument("--cell", choices=["gru", "lstm", "transformer"], default="gru")
    p.add_argument("--preset", choices=["small", "paper"], default="small", help="defaults for the options below")
    p.add_argument("--layers", type=int)
    p.add_argument("--width", type=int)
    p.add_argument("--length", type=int, help="characters per sample")
    p.add_argument("--text", help="a text file; default: the language reference that Python's help() shows")
    args, _ = p.parse_known_args(words)
    family = "transformer" if args.cell == "transformer" else "recurrent"
    p.set_defaults(**PRESETS[family, args.preset])
    return p.parse_args(words)


def task(args: argparse.Namespace) -> Task:
    stream, alphabet = characters(text(args.text))
    kept = len(stream) // 10  # a tenth is held out
    if kept <= args.length:
        least = 10 * (args.length + 1)
        raise SystemExit(f"--text has {len(stream)} characters; --length {args.length} needs {least} or more")
    train, held_out = stream[:-kept], stream[-kept:]
    samples = held_out[: (len(held_out) - 1) // args.length * args.length].view(-1, args.length)[:200]
    after = held_out[1 : 1 + samples.numel()].view_as(samples)

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    def held_out_loss(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        return {"held_out_loss": loss(model(samples.to(device)), after.to(device)).item()}

    torch.manual_seed(args.seed)
    if args.cell == "transformer":
        model: nn.Module = Transformer(len(alphabet), args.width, args.layers, args.length)
    else:
        model = Recurrent(args.cell, len(alphabet), args.width, args.layers)
    batch = windows(train, args.length, args.batch, args.seed)
    return Task(model, batch, loss, held_out_loss, max(1, len(train) // (args.batch * args.length)))


if __name__ == "__main__":
    args = arguments()
    main(task(args), args)
