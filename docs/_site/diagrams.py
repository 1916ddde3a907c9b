"""A MkDocs hook that draws Mermaid flowcharts with graphviz while the site is built, as SVG inside the page.

GitHub draws a block of Mermaid by itself. A site would have to load Mermaid's script for that. Without ``dot`` the
block stays a block of code. Only what the pages use is understood; anything else in a flowchart is an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator

_BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_GROUP = re.compile(r'subgraph (\w+) \["(.*)"\]')
_NODE = re.compile(r'([\w.]+)(?:\(\["(.*)"\]\))?')
_ARROW = re.compile(r'(\S+) (-->|-\.->)(?:\|"(.*)"\|)? (\S+)')

# The page's style sheet gives the colours.
_STYLE = """
    graph [bgcolor=transparent nodesep=0.2 ranksep=0.35]
    graph [fontname=Helvetica fontsize=12 style=rounded labeljust=r labelloc=b]
    node [shape=box style=rounded fontname=Helvetica fontsize=12 height=0.3 margin="0.1,0.05"]
    edge [fontname=Helvetica fontsize=11 arrowsize=0.6]
"""


def dot_of(flowchart: str) -> str:
    """A Mermaid flowchart in graphviz's language. Raises ValueError for a line that it does not understand."""
    return "\n".join(["digraph flowchart {", _STYLE, *_statements(flowchart.splitlines()), "}"])


def _statements(lines: list[str]) -> Iterator[str]:
    for line in map(str.strip, lines):
        if not line or line == "flowchart TD":
            continue
        if line == "end":
            yield "}"
        elif found := _GROUP.fullmatch(line):
            yield f'subgraph "cluster_{found[1]}" {{ label={_quoted(found[2])}'
        elif found := _NODE.fullmatch(line):
            look = "" if found[2] is None else "penwidth=2"
            yield f"{_quoted(found[1])} [label={_broken(found[2] or found[1])} {look}]"
        elif found := _ARROW.fullmatch(line):
            start, arrow, label, end = found.groups()
            for name in (start, end):
                if "." in name:
                    yield f"{_quoted(name)} [label={_broken(name)}]"
            look = "" if arrow == "-->" else "style=dashed"
            yield f"{_quoted(start)} -> {_quoted(end)} [label={_broken(label or '')} {look}]"
        else:
            raise ValueError(f"this line of a flowchart is not understood: {line}")


def _broken(text: str) -> str:
    """``text`` in short lines, broken at spaces. A dotted name is broken at its last dot, and a function that is called
    like its module is written once.
    """
    if re.fullmatch(r"[\w.]+", text):
        module, _, name = text.rpartition(".")
        short = module if module.rpartition(".")[2] == name else text
        before, dot, last = short.rpartition(".")
        return _quoted(f"{before}{dot}\\n{last}" if before else last)
    lines = textwrap.wrap(text, 18, break_long_words=False, break_on_hyphens=False)
    return _quoted("\\n".join(f" {line} " for line in lines))


def _quoted(text: str) -> str:
    return '"' + text.replace('"', r"\"") + '"'


def svg_of(flowchart: str) -> str:
    """The flowchart as an SVG element."""
    drawn = subprocess.run(["dot", "-Tsvg"], input=dot_of(flowchart), capture_output=True, text=True, check=True).stdout
    bare = re.sub(r"<!--.*?-->\s*", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' id="\w+"', "", bare).replace("<svg ", '<svg role="img" ', 1)


def on_page_markdown(markdown: str, **_: object) -> str:
    if shutil.which("dot") is None:
        return markdown
    return _BLOCK.sub(lambda found: f'<div class="diagram">\n{svg_of(found[1])}</div>', markdown)
