"""Measure every model in its own process, with limits, and write each result immediately."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import resource
import warnings
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..harness import ROOT, environment, say
from .case import Case

RESULTS = ROOT / "benchmarks" / "results" / "coverage.jsonl"
GIGABYTES = 8
Row = dict[str, Any]


def run(cases: list[Case], only: str = "", seconds: float = 180.0, again: bool = False) -> None:
    """Measure what the results lack. A case is measured again if the case, torch or its package has changed."""
    known = {row["name"]: row for row in rows()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.coverage.preload"])
    place = environment("cpu")
    place = {key: place[key] for key in ("torch", "hwbp_compiler", "commit", "date")}
    todo = [(case, case.digest) for case in cases if re.search(only, f"{case.family}/{case.name}")]
    for number, (case, digest) in enumerate(todo, start=1):
        mine = {"name": case.name, "family": case.family, "digest": digest, **versions(case)}
        if not again and is_same(known.get(case.name), mine | {"torch": place["torch"]}):
            continue
        row = place | mine | _in_a_process(context, case.name, seconds)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = [f"{number}/{len(todo)} {case.name}: {row['outcome']}", f"expected {row.get('expected')}"]
        said += [f"rewritten {row.get('rewritten')}", *sorted({str(d["code"]) for d in row.get("declined", [])})]
        said += [f"exact {row['exact']:.1e}"] if "exact" in row else []
        say(", ".join(said + [row["error"]] if "error" in row else said), f"{row.get('seconds', seconds)} s")
    tidy()


def versions(case: Case) -> Row:
    """The version of the package that a case comes from."""
    return {"package": case.package, "version": metadata.version(case.package)} if case.package else {"package": ""}


def is_same(row: Row | None, mine: Row) -> bool:
    return row is not None and all(row.get(key) == value for key, value in mine.items())


def rows() -> list[Row]:
    """The last row of every case."""
    if not RESULTS.exists():
        return []
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({row["name"]: row for row in found}.values())


def tidy(path: Path | None = None) -> None:
    """One line per case, sorted."""
    kept = sorted(rows(), key=lambda row: (row["family"], row["name"]))
    (path or RESULTS).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _in_a_process(context: Any, name: str, seconds: float) -> Row:
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, sending), daemon=True)
    process.start()
    sending.close()
    try:
        if receiving.poll(seconds):
            with contextlib.suppress(EOFError):
                return receiving.recv()
            process.join(5)
            return {"outcome": "memory" if process.exitcode == -9 else "crash", "error": f"exit {process.exitcode}"}
        return {"outcome": "time", "error": f"more than {seconds:g} s"}
    finally:
        process.kill()
        process.join()


def _measure(name: str, sending: Connection) -> None:
    limit = GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    warnings.simplefilter("ignore")
    from .cases import CASES
    from .measure import measure

    try:
        (case,) = (case for case in CASES if case.name == name)
        row = measure(case)
    except MemoryError as error:
        row = {"outcome": "memory", "error": str(error)}
    sending.send(row)
    sending.close()
