"""Real data for the examples. Nothing is downloaded unless requested."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Images = tuple[Tensor, Tensor, Tensor, Tensor]  # train [N, C, H, W] in 0..1, test, train labels [N], test labels


def images(name: str, folder: str | None) -> Images:
    """digits: 1,797 images of 8 x 8, included in scikit-learn. cifar10, cifar100: from a folder or torchvision."""
    return digits() if name == "digits" else cifar(name, folder)


def pixels(name: str, folder: str | None) -> Images:
    """The same images read pixel by pixel: [N, H * W, C] in -0.5..0.5."""
    x, test_x, labels, test_labels = images(name, folder)
    return x.flatten(2).mT.contiguous() - 0.5, test_x.flatten(2).mT.contiguous() - 0.5, labels, test_labels


def digits() -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        pixels / 16, labels, test_size=0.25, random_state=0, stratify=labels
    )
    x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in (train, test))
    return x, test_x, torch.tensor(train_labels), torch.tensor(test_labels)


def cifar(name: str, folder: str | None) -> Images:
    """The batches of the "python version", unpacked in ``folder``; without a folder, torchvision downloads them."""
    if folder is None:
        try:
            from torchvision import datasets
        except ImportError:
            raise SystemExit(
                f"--data {name} needs --folder, a folder with the unpacked python version of the data set "
                "(data_batch_1, ... or train, test), or torchvision to download it; --data digits needs neither"
            ) from None
        set_ = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
        found = set_("out/data", download=True)
        folder = str(Path(found.root) / found.base_folder)
    parts = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    test = "test_batch" if name == "cifar10" else "test"
    missing = [part for part in [*parts, test] if not (Path(folder) / part).exists()]
    if missing:
        raise SystemExit(f"--folder {folder}: no {', '.join(missing)} there, which {name} is made of")

    def read(part: str) -> tuple[Tensor, Tensor]:
        with (Path(folder) / part).open("rb") as file:
            found = pickle.load(file, encoding="bytes")  # the data set's own format: open only files you trust
        labels = found[b"labels" if name == "cifar10" else b"fine_labels"]
        return torch.tensor(found[b"data"]).view(-1, 3, 32, 32) / 255, torch.tensor(labels)

    train = [read(part) for part in parts]
    test_x, test_labels = read(test)
    return torch.cat([x for x, _ in train]), test_x, torch.cat([labels for _, labels in train]), test_labels


def shuffled(x: Tensor, target: Tensor, batch: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Step (from 1) -> its batch. The order changes every epoch; an incomplete last batch is left out."""
    batch = min(batch, len(x))
    per_epoch = len(x) // batch

    def at(step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step - 1, per_epoch)
        order = torch.randperm(len(x), generator=generator(seed, epoch))
        rows = order[place * batch : (place + 1) * batch]
        return x[rows], target[rows]

    return at


def flipped_and_shifted(x: Tensor, rng: torch.Generator) -> Tensor:
    """The usual augmentation: images are randomly mirrored and shifted by up to four pixels."""
    flip = torch.rand(len(x), generator=rng) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(9, (2, len(x), 1, 1, 1), generator=rng)
    size, padded = x.shape[2], F.pad(x, (4, 4, 4, 4))
    rows = (torch.arange(size)[:, None] + down).expand(-1, x.shape[1], -1, padded.shape[3])
    columns = (torch.arange(size) + right).expand(-1, x.shape[1], size, -1)
    return padded.gather(2, rows).gather(3, columns)


def generator(seed: int, step: int) -> torch.Generator:
    """A separate random generator for each seed and step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# -- text -----------------------------------------------------------------------------------------------------------


def text(path: str | None) -> str:
    """The text of a file. Without one, the language reference of Python's ``help()`` (470 kB, depending on the
    version).
    """
    if path is not None:
        return read(path, "--text")
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def read(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{option} {path}: {error}; it takes a text file in UTF-8") from None


def characters(text: str) -> tuple[Tensor, str]:
    """The text as numbers, and the alphabet that they index."""
    alphabet = "".join(sorted(set(text)))
    number = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text]), alphabet


def windows(stream: Tensor, length: int, batch: int, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Step -> random windows of the stream [batch, length], and the same one character later."""

    def at(step: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(stream) - length, (batch, 1), generator=generator(seed, step))
        rows = starts + torch.arange(length)
        return stream[rows], stream[rows + 1]

    return at


def sentence_pairs(path: str | None) -> list[tuple[int, str, str]]:
    """Label, sentence, sentence: the lines of a file, separated by tabs. Without a file: the two halves of each
    sentence in Python's language reference, in their order (1) or swapped (0).
    """
    if path is not None:
        rows = [line.split("\t") for line in read(path, "--pairs").splitlines() if line.strip()]
        wrong = next((i for i, row in enumerate(rows, 1) if len(row) != 3 or not row[0].isdigit()), None)
        if wrong is not None:
            raise SystemExit(f"{path}, line {wrong}: expected LABEL<tab>SENTENCE<tab>SENTENCE with a label 0, 1, ...")
        return [(int(label), first, second) for label, first, second in rows]
    words = [found.split() for found in re.findall(r"\b[A-Z][^.:*|]{40,200}(?=\.)", " ".join(text(None).split()))]
    halves = [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in words]
    return [(1, a, b) if i % 2 else (0, b, a) for i, (a, b) in enumerate(dict.fromkeys(halves))]
