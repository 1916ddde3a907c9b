"""What linear_scan accepts: all checks of shapes, dtypes and devices, with their messages."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a scan of ``dtype`` adds and multiplies: float32 for the 16-bit types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_values(values: Tensor, name: str = "values") -> None:
    """Raise TypeError or ValueError, naming ``name``, unless it can be scanned along dim 0."""
    if values.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"linear_scan: {name} has dtype {values.dtype}; allowed are {allowed}")
    if values.ndim == 0:
        raise ValueError(f"linear_scan: {name} has no dimension; dim 0 must be the length of the scan")
    if values.layout != torch.strided:
        raise TypeError(f"linear_scan: {name} has layout {values.layout}; only torch.strided is allowed")


def check_multipliers(values: Tensor, multipliers: Tensor, name: str = "multipliers") -> None:
    """Raise TypeError or ValueError, naming ``name``, unless it can multiply the links of ``values``."""
    if multipliers.dtype != values.dtype:
        raise TypeError(
            f"linear_scan: {name} has dtype {multipliers.dtype}, values have {values.dtype}; "
            f"they must be the same (cast one of them)"
        )
    if multipliers.device != values.device:
        raise ValueError(
            f"linear_scan: {name} is on {multipliers.device}, values are on {values.device}; "
            f"they must be on the same device"
        )
    if multipliers.layout != torch.strided:
        raise TypeError(f"linear_scan: {name} has layout {multipliers.layout}; only torch.strided is allowed")
    if multipliers.ndim not in (0, 1, values.ndim):
        raise ValueError(
            f"linear_scan: {name} has shape {_shape(multipliers)}, {multipliers.ndim} dimensions; allowed are "
            f"0 (one for all), 1 (one per link) or {values.ndim}, as many as values of shape {_shape(values)}"
        )
    # zip stops at the shorter one: a 1-d tensor is compared only along the length.
    for dim, (have, need) in enumerate(zip(multipliers.shape, values.shape, strict=False)):
        if have != 1 and have != need:
            raise ValueError(
                f"linear_scan: {name} has shape {_shape(multipliers)}, which cannot multiply values of shape "
                f"{_shape(values)}: dimension {dim} must be 1 or {need}"
            )


def check_initial(values: Tensor, initial: Tensor) -> None:
    """Raise TypeError or ValueError unless ``initial`` can be the state before the first link of ``values``."""
    if initial.dtype != values.dtype:
        raise TypeError(f"linear_scan: initial has dtype {initial.dtype}, values have {values.dtype}; they must agree")
    if initial.device != values.device:
        raise ValueError(f"linear_scan: initial is on {initial.device}, values are on {values.device}; they must agree")
    if initial.shape != values.shape[1:]:
        raise ValueError(
            f"linear_scan: initial has shape {_shape(initial)}; it must be {_shape(values)[1:]}, that of one link"
        )


def _shape(tensor: Tensor) -> list[object]:
    return list(tensor.shape)
