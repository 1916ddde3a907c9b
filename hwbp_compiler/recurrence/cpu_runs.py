"""Runs over the segments of a recurrent layer on a CPU: ``runs.cpp``, one call for all steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import ADDRESS, FLAG, NUMBER, native_kernel

native = native_kernel(
    "runs.cpp",
    "highway_run",
    [ADDRESS] * 11 + [NUMBER] * 6 + [FLAG],
    without="nn.GRU, nn.LSTM, nn.RNN: no backward kernel of our own for this CPU, PyTorch's operators run step by step",
)

HALF = (torch.bfloat16, torch.float16)


def run(
    values: Tensor,
    multipliers: Tensor | None,
    through: Tensor | None,
    into: Tensor,
    weight: Tensor,
    ends: Sequence[Tensor],
    segment: int,
    whole: bool,
) -> list[Tensor] | None:
    """Returns what :func:`.runs._run_segments` returns; None if this kernel does not support the call. 16-bit numbers
    are computed in float32 and rounded once at the end.
    """
    tensors = [t for t in (values, multipliers, through, into, weight, *ends) if t is not None]
    (dtype, *others) = {t.dtype for t in tensors}
    if others or any(t.device.type != "cpu" or t.numel() == 0 for t in tensors):
        return None
    kernel = native.load(torch.float32 if dtype in HALF else dtype)
    if kernel is None:
        return None
    if dtype in HALF:
        m, q = (None if t is None else t.float() for t in (multipliers, through))
        wide = [e.float() for e in ends]
        found = run(values.float(), m, q, into.float(), weight.float(), wide, segment, whole)
        return None if found is None else [t.to(dtype) for t in found]
    steps, batch, hidden = values.shape
    gates = into.shape[2]
    if into.stride()[2:] != (hidden, 1) or into.stride(0) != batch * into.stride(1):
        into = into.contiguous()
    given = [None if t is None else t.contiguous() for t in (values, multipliers, through)]
    weight, ends = weight.contiguous(), [e.contiguous() for e in ends]
    rows = [values.new_empty(values.shape) for _ in ends] if whole else []
    out = [values.new_empty(values.shape[1:] if whole else end.shape) for end in ends]
    kernel(
        *map(_address, (*given, into, weight)),
        *(address for pair in (ends, rows, out) for address in _two(pair)),
        into.stride(1),
        steps,
        batch,
        hidden,
        gates,
        segment,
        torch.get_num_threads(),
    )
    return [*rows, *out]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _two(tensors: Sequence[Tensor]) -> list[int | None]:
    """The addresses of both components, if there are two."""
    return [_address(tensors[i]) if i < len(tensors) else None for i in range(2)]
