"""What a recording forward pass keeps for its backward pass, tied to the life of a tensor.

Note [A tensor that keeps an autograd graph]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
PyTorch's recurrent kernels record different things: an autograd graph, a workspace, cuDNN's reserve. The size of most
is unknown before the kernel runs, so they cannot be outputs of a traced operator. The operator returns a *token*
instead: one integer, in memory owned by a Python object that holds the recording. The token is saved for the backward
pass like any tensor, and when it is freed, so is the recording. Correctness does not depend on it: if a token has no
recording (it was used up, or the token is a copy), the forward pass is recorded again.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_numbers = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()


class _Memory(bytearray):
    """The eight bytes of a token, and the recording that it keeps."""

    recording: Any


def token(recording: Any = None) -> Tensor:
    """An int64 tensor of shape [1] that keeps ``recording`` alive. Without a recording it keeps nothing."""
    if recording is None:
        return torch.zeros(1, dtype=torch.int64)
    number = next(_numbers)
    memory = _Memory(number.to_bytes(8, "little"))
    memory.recording = recording
    _alive[number] = memory
    return torch.frombuffer(memory, dtype=torch.int64)


def take(token: Tensor) -> Any:
    """Remove and return the recording that ``token`` keeps; None if there is none."""
    memory = _alive.pop(int(token.item()), None)
    return None if memory is None else memory.__dict__.pop("recording", None)
