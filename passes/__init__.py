"""The passes over a joint graph: find chains, check separation, split links, group links, decide, rewrite."""

from __future__ import annotations

from torch.fx import Graph

from hwbp_compiler.options import Options

from .pipeline import run

__all__ = ["Graph", "Options", "run"]
