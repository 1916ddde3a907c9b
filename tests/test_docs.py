"""The docs site builds without a network, has no dead link, loads nothing from elsewhere, and its guide works.

The tests run the Python blocks of the start page and of the pages in ``RUN``, without generating code. A page can ask
for the names that the start page defines. The blocks of the pages in ``ONLY_PARSED`` are parsed but not run: those
about several devices need several processes (``tests/test_distributed*.py`` make the same calls), and those about
inspecting need graphviz (``tests/test_explain.py`` makes the same calls).
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import re
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import snippets
import torch

from hwbp_compiler import options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUN = ("choosing.md", "recurrent.md", "testing.md", "gpus.md")
ONLY_PARSED = ("inspecting.md", "distributed.md", "api/compile.md")

# The build, in a Python that refuses to connect to anything.
BUILD = """
import socket, sys

def refuse(self, address):
    raise OSError(f"the docs must build without a network; connected to {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


class Page(HTMLParser):
    """The links of a page, the files it loads, and the anchors it has."""

    LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
    RELATIONS = {"stylesheet", "icon", "preload", "preconnect", "modulepreload", "manifest", "dns-prefetch"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag == "link" and self.RELATIONS & set(given.get("rel", "").split()):
            self.loaded.add(given.get("href", ""))
        if tag in self.LOADS and self.LOADS[tag] in given:
            self.loaded.add(given[self.LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'{package} is not installed: pip install ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in folder.rglob("*.html")}


def test_every_page_is_built(site):
    folder = next(path for path in site if path.name == "404.html").parent
    built = {path.relative_to(folder).with_suffix(".md").as_posix() for path in site}
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert built == written | {"index.md", "examples.md", "changelog.md", "contributing.md", "404.md"}


def test_no_internal_link_is_dead(site):
    dead = []
    for path, page in site.items():
        if path.name == "404.html":  # its links are absolute: it may be shown for any address
            continue
        for link in page.links:
            target, anchor = urldefrag(unquote(link))
            if re.match(r"\w+:", target):
                continue
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or anchor and file.suffix == ".html" and anchor not in site[file].ids:
                dead.append(f"{path.name}: {link}")
    assert dead == []


def test_no_page_loads_anything_from_elsewhere(site):
    outside = {link for page in site.values() for link in page.loaded if re.match(r"(\w+:)?//", link)}
    assert outside == set()
    folder = next(path for path in site if path.name == "404.html").parent
    for sheet in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_diagram_of_the_design_page_is_drawn_while_the_site_is_built(site):
    if shutil.which("dot") is None:
        pytest.skip("graphviz is not installed")
    (design,) = (path for path in site if path.name == "design.html")
    drawn = design.read_text(encoding="utf-8").partition('<div class="diagram">')[2].partition("</div>")[0]
    named = set(re.findall(r"<title>([\w.]+)</title>", drawn))
    written = re.search(r"^```mermaid\n(.*?)^```$", page("design.md"), re.DOTALL | re.MULTILINE)[1]
    arrows = re.findall(r"^ *(\S+) -\S+ (\S+)$", re.sub(r'\|".*?"\|', "", written), re.MULTILINE)
    assert len(arrows) > 20 and {name for arrow in arrows for name in arrow} <= named
    assert len(re.findall("&#45;&gt;", drawn)) == len(arrows)
    assert drawn.lstrip().startswith("<svg") and "id=" not in drawn and "href=" not in drawn.replace("xmlns:xlink=", "")


def test_without_graphviz_a_diagram_stays_code(monkeypatch):
    diagrams = runpy.run_path(str(DOCS / "_site" / "diagrams.py"))
    text = page("design.md")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert diagrams["on_page_markdown"](text) == text
    with pytest.raises(ValueError, match="not understood: a ==> b"):
        diagrams["dot_of"]("flowchart TD\n    a --> b\n    a ==> b\n")


def test_every_public_name_is_in_the_reference(site):
    import hwbp_compiler

    modules = [hwbp_compiler, hwbp_compiler.testing, hwbp_compiler.distributed]
    names = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    ids = {found for page in site.values() for found in page.ids}
    subpackages = {"hwbp_compiler.testing", "hwbp_compiler.distributed"}
    assert names - subpackages - ids == set()


def documented() -> list[tuple[str, object]]:
    """Public functions, and the classes that users make or subclass."""
    import hwbp_compiler
    from hwbp_compiler.report import Report

    modules = [hwbp_compiler, hwbp_compiler.testing, hwbp_compiler.distributed]
    found = {f"{m.__name__}.{name}": getattr(m, name) for m in modules for name in m.__all__}
    methods = {f"Report.{name}": getattr(Report, name) for name in ("to_html", "draw", "save_repro", "to_dict")}
    return sorted((found | methods).items())


# Arguments and result are those of another function, which the docstring names.
_AS_ANOTHER = ("hwbp_compiler.testing.sum_over_paths", "hwbp_compiler.testing.fixed_point")


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*each, id=each[0]) for each in documented()])
def test_every_argument_and_result_of_a_public_name_is_described(name, thing):
    text = inspect.getdoc(thing) or ""
    assert text, name
    if inspect.ismodule(thing) or name in _AS_ANOTHER:
        return
    if isinstance(thing, type) and issubclass(thing, Exception):
        return
    signature = inspect.signature(thing)
    skipped = {"self", "cls"} | ({"args", "kwargs"} if name.endswith("ScheduleHighway") else set())
    described = {
        n for names in re.findall(r"^ *((?:\*{0,2}\w+, )*\*{0,2}\w+): ", text, re.M) for n in re.findall(r"\w+", names)
    }
    missing = set(signature.parameters) - skipped - described
    assert missing == set()
    returns = signature.return_annotation
    if inspect.isfunction(thing) and returns not in ("None", None, inspect.Signature.empty):
        assert re.search(r"^(Returns|Yields):$", text, re.MULTILINE), "no Returns"


def test_every_column_of_a_table_has_a_head():
    pages = [*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md"))]
    headless = []
    for path in pages:
        lines = path.read_text(encoding="utf-8").splitlines()
        for head, rule in zip(lines, lines[1:], strict=False):
            if re.fullmatch(r"\|(-+\|)+", rule) and not all(cell.strip() for cell in head.strip("|").split("|")):
                headless.append(f"{path.name}: {head}")
    assert headless == []


def test_every_python_block_is_in_a_page_that_is_run_or_parsed():
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    with_code = {name for name in written if snippets.blocks(page(name), "python")}
    assert with_code == {"start.md", *RUN, *ONLY_PARSED}


@pytest.mark.parametrize("name", ONLY_PARSED)
def test_blocks_that_are_not_run_are_python(name):
    for block in snippets.blocks(page(name), "python"):
        ast.parse(block)


def without_estimates(text: str) -> str:
    """Leave out times, which depend on the machine, node counts, which depend on every detail of the passes, and
    cosines, which depend on how sums are rounded.
    """
    changing = r"[\d.]+ ms|[\d.]+x|[\d.]+ [kM]B|\d+ nodes|\d+ after|[\d.]+ (?=(un)?trained)"
    return re.sub(changing, "#", " ".join(text.split()))


def shown_is_printed(printed: str) -> bool:
    shown = snippets.blocks(page("start.md"), "text")
    return len(shown) == 2 and all(without_estimates(text) in without_estimates(printed) for text in shown)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict[str, object]:
    """The names that the start page defines when it runs, and ``"printed"`` and ``"folder"``."""
    folder = tmp_path_factory.mktemp("start")
    script = folder / "train.py"
    script.write_text("\n".join(snippets.blocks(page("start.md"), "python")))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.chdir(folder)
        snippets.without_generated_code(monkeypatch)
        return runpy.run_path(str(script)) | {"printed": printed.getvalue(), "folder": folder}


def test_the_start_page_runs_and_prints_what_it_says(start):
    assert shown_is_printed(start["printed"])
    assert all(start["untrained"][k] > start["trained"][k] + 0.01 for k in (0, 1, 2))
    assert all(parameter.grad is not None for parameter in start["model"].parameters())
    assert "<details" in (start["folder"] / "report.html").read_text()


@pytest.mark.parametrize("name", RUN)
def test_the_page_runs(name, tmp_path, monkeypatch, request):
    code = "\n".join(snippets.blocks(page(name), "python"))
    if "cuda:" in code:
        pytest.importorskip("triton")
    known = request.getfixturevalue("start") if "from [the start](start.md)" in page(name) else {}
    given = {key: value for key, value in known.items() if not key.startswith("__")}
    monkeypatch.chdir(tmp_path)
    snippets.without_generated_code(monkeypatch)
    script = tmp_path / f"{Path(name).stem}_page.py"
    script.write_text(code)
    precision = torch.get_float32_matmul_precision()
    try:
        runpy.run_path(str(script), given, run_name=script.stem)  # Dynamo remembers modules by their names
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.slow
def test_the_start_page_runs_in_a_process_of_its_own(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("\n".join(snippets.blocks(page("start.md"), "python")))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=590, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown_is_printed(done.stdout)


def test_every_option_is_in_the_table_with_its_default():
    table = page("choosing.md").splitlines()
    for name, default in options._DEFAULTS.items():
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        row = next(line for line in table if line.startswith(f"| `{name}` |"))
        assert row.split("|")[3].strip(" `") == shown


def test_every_heading_linked_to_within_docs_is_there():
    dead = []
    for path in DOCS.rglob("*.md"):
        for target, anchor in snippets.links(path.read_text(encoding="utf-8")):
            file = (path.parent / target).resolve() if target else path
            elsewhere = file.relative_to(DOCS).as_posix() if file.is_relative_to(DOCS) else ""
            if elsewhere in ("examples.md", "changelog.md", "contributing.md", "index.md"):
                continue  # pages made while the site is built
            of_the_reference = anchor.startswith("hwbp_compiler.")
            if not file.exists():
                dead.append(f"{path.name}: {target}")
            elif anchor and not of_the_reference and anchor not in snippets.anchors(file.read_text(encoding="utf-8")):
                dead.append(f"{path.name}: {target}#{anchor}")
    assert dead == []
