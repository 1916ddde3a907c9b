"""Code blocks of Markdown files, and a way to run them quickly: compiled without generated code."""

from __future__ import annotations

import re

import pytest
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from hwbp_compiler import backend
from hwbp_compiler.engine.native import NativeKernel


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def without_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run Inductor's graphs directly, and our operators without their C++ code."""

    def no_code(module, example_inputs, **kwargs):
        return make_boxed_func(module.forward)

    def compile_(gm, inputs, patches, inner_compile=no_code):
        return compile_fx(gm, inputs, inner_compile=inner_compile, config_patches=dict(patches))

    monkeypatch.setattr(backend, "compile_fx", compile_)
    monkeypatch.setattr(NativeKernel, "load", lambda self, dtype: None)


def anchor(heading: str) -> str:
    """The anchor that GitHub and MkDocs give to a heading."""
    words = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", words)).strip("-")


def anchors(text: str) -> set[str]:
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)}


def links(text: str) -> list[tuple[str, str]]:
    """File and anchor of every link to a file of the repository."""
    without_code = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", without_code)
