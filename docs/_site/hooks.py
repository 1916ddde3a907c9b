"""MkDocs' hooks: pages that live elsewhere in the tree, and links that lead out of ``docs/``."""

from __future__ import annotations

import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

# Page of the site -> the file it is made from.
ELSEWHERE = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
_PAGE_OF = {source: page for page, source in ELSEWHERE.items()}

_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?!\w+:)([^)\s#]+)(#[^)\s]*)?\)")


def relinked(text: str, source: str, page: str, repository: str | None = None) -> str:
    """``text`` of the file ``source`` as ``page`` of the site: links to files that are pages lead there. A link to any
    other file of the tree leads to ``repository``, or becomes plain text where there is none."""

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = _PAGE_OF.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if to is not None:
            return f"[{words}]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"
        if not (ROOT / path).exists():
            return found[0]  # MkDocs reports it
        return f"[{words}]({repository.rstrip('/')}/blob/HEAD/{path}{anchor})" if repository else words

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def on_files(files: Files, config: Any) -> Files:
    for page, source in ELSEWHERE.items():
        text = relinked((ROOT / source).read_text(encoding="utf-8"), source, page, config.repo_url)
        if page == "index.md":  # the first page has no neighbours to show at its side
            text = f"---\nhide: [navigation]\n---\n\n{text}"
        files.append(File.generated(config, page, content=text))
    return files


def reasons() -> str:
    """Every member of ``Reason``, its text and its advice, as a table."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from hwbp_compiler.reasons import Reason

    def cell(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")

    lines = [f"| `{reason.name}` | {cell(reason.text)} | {cell(reason.advice)} |" for reason in Reason]
    return "\n".join(["| name | reason | advice |", "|---|---|---|", *lines])


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    path = page.file.src_uri
    markdown = markdown.replace("<!-- reasons -->", reasons()) if path == "api/reasons.md" else markdown
    return markdown if path in ELSEWHERE else relinked(markdown, f"docs/{path}", path, config.repo_url)
