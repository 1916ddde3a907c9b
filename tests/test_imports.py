"""Files do not import one another in circles, and a long file says why it is long."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import networkx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hwbp_compiler"
MOST_LINES = 500


class Import(NamedTuple):
    """``name`` is taken from ``module``, or is None where the module is imported itself."""

    module: str
    name: str | None
    for_types: bool  # inside ``if TYPE_CHECKING``


def _files() -> dict[str, Path]:
    """The file of each module. In a checkout, hwbp_compiler.passes is the folder passes/ beside the package."""
    found = {}
    for place, prefix in ((PACKAGE, PACKAGE), ("passes", f"{PACKAGE}.passes"), ("benchmarks", "benchmarks")):
        for path in (ROOT / place).rglob("*.py"):
            inside = path.relative_to(ROOT / place).with_suffix("").parts
            if inside[0] == "passes":
                continue  # the link to passes/
            parts = inside[:-1] if inside[-1] == "__init__" else inside
            found[".".join((prefix, *parts))] = path
    return found


FILES = _files()


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(module: str, tree: ast.AST, for_types: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(_absolute(module, node), alias.name, for_types) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _imports(module, ast.Module(node.body, []), True)
            yield from _imports(module, ast.Module(node.orelse, []), for_types)
        else:
            yield from _imports(module, node, for_types)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    keep = len(parts) - node.level + (FILES[module].name == "__init__.py")
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _graph(types_too: bool) -> networkx.DiGraph:
    """The modules that each module imports, also inside functions. Importing ``a.b`` from elsewhere runs ``a`` first.

    The package itself is left out, because it loads a module only when one of its names is used.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from(FILES)
    for module, path in FILES.items():
        for wanted in _imports(module, _tree(path)):
            if wanted.for_types and not types_too:
                continue
            inner = f"{wanted.module}.{wanted.name}"
            target = inner if inner in FILES else wanted.module
            parts = target.split(".")
            for count in range(1, len(parts) + 1):
                needed = ".".join(parts[:count])
                around = needed != target and f"{module}.".startswith(f"{needed}.")
                if needed in FILES and needed != module and not around:
                    graph.add_edge(module, needed)
    graph.remove_nodes_from([PACKAGE, "benchmarks"])
    return graph


def _circles(graph: networkx.DiGraph) -> list[list[str]]:
    return [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]


@pytest.mark.parametrize("types_too", [False, True], ids=["when run", "for types too"])
def test_no_module_imports_itself_in_a_circle(types_too):
    assert _circles(_graph(types_too)) == []


@pytest.mark.parametrize("types_too", [False, True], ids=["when run", "for types too"])
def test_no_package_imports_itself_in_a_circle(types_too):
    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    graph = _graph(types_too)
    packages = networkx.DiGraph((package(a), package(b)) for a, b in graph.edges if package(a) != package(b))
    assert _circles(packages) == []


def test_a_circle_is_seen():
    graph = _graph(False)
    assert graph.has_edge(f"{PACKAGE}.backend", f"{PACKAGE}.joint_pass")
    assert graph.has_edge(f"{PACKAGE}.joint_pass", f"{PACKAGE}.report.text")  # inside a function
    assert graph.has_edge(f"{PACKAGE}.rolled.link", f"{PACKAGE}.passes.split_links")
    assert not graph.has_edge(f"{PACKAGE}.backend", f"{PACKAGE}.rolled.recurrence")  # for types
    assert _graph(True).has_edge(f"{PACKAGE}.backend", f"{PACKAGE}.rolled.recurrence")
    graph.add_edge(f"{PACKAGE}.joint_pass", f"{PACKAGE}.backend")
    (circle,) = _circles(graph)
    assert {f"{PACKAGE}.backend", f"{PACKAGE}.joint_pass"} <= set(circle)


def test_a_file_is_short_or_says_why_it_is_long():
    long = {
        path.relative_to(ROOT).as_posix(): ast.get_docstring(_tree(path)) or ""
        for module, path in FILES.items()
        if module.startswith(PACKAGE) and len(path.read_text().splitlines()) > MOST_LINES
    }
    assert [name for name, text in long.items() if "however long it grows" not in text] == []


def test_a_long_file_of_tests_has_sections():
    texts = {path.name: path.read_text() for path in (ROOT / "tests").glob("*.py")}
    long = {name: text for name, text in texts.items() if len(text.splitlines()) > MOST_LINES}
    assert long and [name for name, text in long.items() if text.count("\n# -- ") < 3] == []


# -- the diagram of docs/design.md ----------------------------------------------------------------------------------


def _arrows() -> list[tuple[str, str, str]]:
    """(from, arrow, to) for every line with an arrow."""
    drawing = (ROOT / "docs/design.md").read_text().partition("```mermaid\n")[2].partition("```")[0]
    return re.findall(r"^ *(\S+) (-->|-\.->)(?:\|[^|]*\|)? (\S+)$", drawing, re.MULTILINE)


def _place(name: str) -> tuple[str, str]:
    """The module that contains a name of the diagram, and the name inside it; "" for the module itself."""
    whole = f"{PACKAGE}.{name}"
    module, _, inside = (whole, "", "") if whole in FILES else whole.rpartition(".")
    return module, inside


def test_whatever_the_diagram_names_is_there():
    names = {name for a, _, b in _arrows() for name in (a, b) if "." in name}
    assert len(names) > 15
    for module, inside in map(_place, names):
        assert module in FILES and (not inside or hasattr(importlib.import_module(module), inside)), (module, inside)


def test_whoever_calls_in_the_diagram_imports_what_it_calls():
    graph = _graph(False)
    calls = [(_place(a)[0], _place(b)[0]) for a, arrow, b in _arrows() if arrow == "-->"]
    assert len(calls) > 20
    for caller, called in calls:
        inside = [m for m in FILES if f"{m}.".startswith(f"{caller}.")]  # a package calls from any file of it
        found = (caller == called, *(graph.has_edge(m, t) for m in inside for t in (called, called.rpartition(".")[0])))
        assert any(found), f"{caller} does not import {called}"
