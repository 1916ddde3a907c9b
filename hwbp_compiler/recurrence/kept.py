"""What a recording forward pass keeps for its backward pass, tied to the life of a tensor.

Note [A tensor that keeps an autograd graph]
PyTorch's recurrent kernels record different things (an autograd graph, a workspace, cuDNN's reserve), most of no size
that is known before they run, so they cannot be outputs of an operator that is traced. An operator returns a *token*
instead: one integer, in memory that belongs to a Python object which holds the recording. The token is saved for the
backward pass like any tensor; when it is freed, so is the recording. Nothing depends on it for correctness: whoever
finds a token without a recording (used up, or a copy of a token) records again.
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
    """The eight bytes of a token, and what it stands for."""

    recording: Any


def token(recording: Any = None) -> Tensor:
    """An int64 tensor of shape [1] that keeps ``recording`` alive; without one it stands for nothing."""
    if recording is None:
        return torch.zeros(1, dtype=torch.int64)
    number = next(_numbers)
    memory = _Memory(number.to_bytes(8, "little"))
    memory.recording = recording
    _alive[number] = memory
    return torch.frombuffer(memory, dtype=torch.int64)


def take(token: Tensor) -> Any:
    """What ``token`` keeps, which it then keeps no longer; None if there is nothing."""
    memory = _alive.pop(int(token.item()), None)
    return None if memory is None else memory.__dict__.pop("recording", None)
