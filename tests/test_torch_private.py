"""Private parts of torch are named in one file, and this torch has them all."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hwbp_compiler import torch_private

ROOT = Path(__file__).parents[1]
HOME = ROOT / "hwbp_compiler" / "torch_private.py"
SOURCES = [p for folder in ("hwbp_compiler", "passes") for p in (ROOT / folder).rglob("*.py") if p != HOME]

# Underscored, but PyTorch's own documentation tells users to write it.
DOCUMENTED = re.compile(
    r"torch\._(dynamo\.(reset|config|mark_dynamic|maybe_mark_dynamic)|inductor\.(config|list_\w+)|ops\.\w+|check\w*)"
    r"|torch\.utils\._pytree"
)


def private_names(source: str) -> set[str]:
    """``torch._x.y`` as written: in imports, and as attributes of ``torch``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            # Operators are public, underscored or not.
            if re.fullmatch(r"torch(\.\w+)+", name) and not name.startswith("torch.ops."):
                found.add(name)
    private = {name for name in found if re.search(r"\._(?!_)", name) and not DOCUMENTED.match(name)}
    # ``torch._inductor`` is also a part of ``torch._inductor.config``.
    return {name for name in private if not any(DOCUMENTED.match(other) and other.startswith(name) for other in found)}


@pytest.mark.parametrize("source, names", [
    ("from torch._inductor import ir", {"torch._inductor.ir"}),
    ("import torch\ntorch._C._something()", {"torch._C", "torch._C._something"}),
    ("import torch\ntorch._dynamo.reset(); torch.ops.aten._softmax; torch.__version__", set()),
])  # fmt: skip
def test_what_counts_as_private(source, names):
    assert private_names(source) == names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_parts_of_torch_are_used_through_one_file(path):
    assert not private_names(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(torch_private.LATE))
def test_this_torch_has_every_private_part(name):
    assert getattr(torch_private, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torch_private.nothing  # noqa: B018
