"""Models as people write them, each with the same model retold for the oracle and what has to be found in it."""

from __future__ import annotations

from . import encoder_decoder, huggingface, nothing, recurrent, residual, resnet, side_losses, transformer
from .case import Case, ExpectedChain

CASES: list[Case] = [
    *residual.CASES,
    *resnet.CASES,
    *transformer.CASES,
    *recurrent.CASES,
    *encoder_decoder.CASES,
    *side_losses.CASES,
    *huggingface.CASES,
    *nothing.CASES,
]

__all__ = ["CASES", "Case", "ExpectedChain"]
