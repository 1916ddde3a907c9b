"""Fine-tune a post-LN encoder (BERT) on pairs of sentences.

    python examples/finetune_bert.py                                            # small, random weights
    python examples/finetune_bert.py --pairs pairs.tsv --weights bert-base-uncased/ --lr 2e-5 --batch 32

``--pairs`` is a file of lines LABEL<tab>SENTENCE<tab>SENTENCE. Without it, the task is whether two halves of a sentence
from Python's language reference are in the right order. ``--weights`` is a folder that transformers can load, with
weights and tokenizer. Without it, the model is a BERT of 6 layers with random weights, and its vocabulary is the words
of the pairs.

A LayerNorm follows every residual addition, so K is not the identity but weight / sigma. The default damping is the
paper's for RoBERTa, 0.8.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from data import sentence_pairs, shuffled
from torch import Tensor, nn
from training import Task, accuracy, main, parser

LENGTH = 48  # tokens per pair
Pair = tuple[int, str, str]


class Encoder(nn.Module):
    """Token ids, attention mask and segments in one tensor [B, 3, length] -> logits [B, classes]"""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        ids, mask, segments = x.unbind(1)
        return self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits


def own_words(pairs: list[Pair], words: int = 4000) -> tuple[Tensor, int]:
    """The pairs as [N, 3, LENGTH], in the most common of their own words, and the number of words."""
    split = [tuple(re.findall(r"\w+|[^\w\s]", sentence.lower()) for sentence in pair[1:]) for pair in pairs]
    common = Counter(word for pair in split for sentence in pair for word in sentence).most_common(words)
    number = {word: i for i, (word, _) in enumerate(common, 4)}  # 0 padding, 1 CLS, 2 SEP, 3 any other word
    rows = []
    for first, second in split:
        a = [1, *(number.get(word, 3) for word in first[: LENGTH // 2 - 2]), 2]
        b = [*(number.get(word, 3) for word in second[: LENGTH // 2 - 1]), 2]
        padding = [0] * (LENGTH - len(a) - len(b))
        rows.append([[*a, *b, *padding], [1] * len(a + b) + padding, [0] * len(a) + [1] * len(b) + padding])
    return torch.tensor(rows), len(number) + 4


def with_tokenizer(folder: str, pairs: list[Pair]) -> Tensor:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder)(
        [first for _, first, _ in pairs], [second for _, _, second in pairs],
        padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt",
    )  # fmt: skip
    ids, mask = found["input_ids"], found["attention_mask"]
    return torch.stack([ids, mask, found.get("token_type_ids", torch.zeros_like(ids))], 1)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = parser(__doc__, damping=0.8, epochs=8, batch=16, lr=5e-4)
    p.add_argument("--pairs", help="file of labelled pairs")
    p.add_argument("--weights", help="folder with weights and tokenizer")
    p.add_argument("--layers", type=int, default=6, help="without --weights (default: 6)")
    p.add_argument("--width", type=int, default=64, help="without --weights (default: 64)")
    return p.parse_args(words)


def task(args: argparse.Namespace) -> Task:
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    if args.weights and not Path(args.weights).is_dir():
        raise SystemExit(f"--weights {args.weights}: no such folder; nothing is downloaded")
    pairs = sentence_pairs(args.pairs)
    if len(pairs) < 2:
        raise SystemExit(f"{len(pairs)} pairs of sentences; two are needed, one to learn from and one held out")
    random.Random(0).shuffle(pairs)
    labels = torch.tensor([label for label, _, _ in pairs])
    classes = int(labels.max()) + 1
    torch.manual_seed(args.seed)
    if args.weights:
        x = with_tokenizer(args.weights, pairs)
        # If the weights have a classifier for other classes, a new one replaces it.
        encoder = AutoModelForSequenceClassification.from_pretrained(
            args.weights, num_labels=classes, ignore_mismatched_sizes=True
        )
    else:
        x, words = own_words(pairs)
        encoder = BertForSequenceClassification(
            BertConfig(
                vocab_size=words,
                hidden_size=args.width,
                intermediate_size=4 * args.width,
                num_labels=classes,
                num_hidden_layers=args.layers,
                num_attention_heads=max(1, args.width // 32),
                max_position_embeddings=LENGTH,
            )  # fmt: skip
        )
    kept = max(1, len(x) // 10)
    test_x, test_labels = x[-kept:], labels[-kept:]
    batch = shuffled(x[:-kept], labels[:-kept], args.batch, args.seed)
    epoch = max(1, (len(x) - kept) // args.batch)
    return Task(Encoder(encoder), batch, F.cross_entropy, accuracy(test_x, test_labels), epoch)


if __name__ == "__main__":
    args = arguments()
    main(task(args), args)
