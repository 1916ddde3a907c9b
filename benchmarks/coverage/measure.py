"""Measure one model: its chains, the reasons, and its gradients beside those of eager mode."""

from __future__ import annotations

import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hwbp_compiler
from hwbp_compiler.graph.info import is_tangent
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.reasons import Reason
from hwbp_compiler.testing.assertions import AtFullLength
from hwbp_compiler.testing.capture import Capture, capture, eager_highway, leaves_of, options
from hwbp_compiler.testing.compare import Gradients, cosine, total_norm
from hwbp_compiler.testing.losses import probe_loss

from .case import Case, prepared
from .untrue import UNTRUE

SEED = 7
ASKED = {"rewrite": "always", "min_length": 2, "iterations": 1, "damping": 0.0}
FULL = AtFullLength(iterations=10**6, rewrite="always", min_length=2, damping=0.0, strict=True)
# Reported beside the chains: there was no chain to rewrite.
NO_CHAIN = {
    Reason.NO_ELEMENTWISE_PATH,
    Reason.MODULE_WITHOUT_PATH,
    Reason.SHORTCUT_HAS_LAYER,
    Reason.FEATURES_CONCATENATED,
    Reason.STREAMS_MIXED,
    Reason.INTERRUPTED,
    Reason.HIGHER_ORDER_LOOP,
}
# For a gradient that is almost zero (the key bias of an attention), errors count relative to this share of all
# gradients.
SHARE = 1e-3


def measure(case: Case) -> dict[str, Any]:
    """One row. ``outcome`` sums up the result in a word: see :data:`OUTCOMES`."""
    start = time.perf_counter()
    row: dict[str, Any] = {"expected": list(case.chains)}
    try:
        model, args = prepared(case)
        output, exact = eager(model, args)
        count = sum(parameter.numel() for parameter in model.parameters())
        row["parameters"] = count
    except Exception as error:
        return row | {"outcome": "does not run", "error": told(error)}
    try:
        row |= compared(model, args, exact)
        if not case.chains or missing(case.chains, row["rewritten"]):
            row |= looked(model, args)
    except Exception as error:
        row |= {"outcome": "crash", "error": told(error)}
        problem = without_us(model, args)
        if problem:
            row |= {"outcome": "not compiled by torch", "error": problem}
    else:
        row["outcome"] = outcome(case.name, row)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


OUTCOMES = {
    "all": "all expected links are rewritten, and exact at full length",
    "reason": "links are missed, and a record says why",
    "untrue": "links are missed, and what the record says is not true",
    "silent": "links are missed without a record",
    "wrong": "gradients at full length are not those of backprop",
    "crash": "an error of the compiler's",
    "not compiled by torch": "torch.compile fails without the compiler too",
    "does not run": "eager mode fails",
    "time": "stopped at the time limit",
    "memory": "stopped at the memory limit",
}


def outcome(name: str, row: Mapping[str, Any]) -> str:
    if row.get("failure"):
        return "crash"
    if not right(row):
        return "wrong"
    if not missing(row["expected"], row["rewritten"]):
        return "all"
    codes = {record["code"] for record in row["declined"]}
    if not codes and not row["notes"]:
        return "silent"
    return "untrue" if codes & set(UNTRUE.get(name, {})) else "reason"


def right(row: Mapping[str, Any]) -> bool:
    """Whether gradients at full length equal those of eager mode. If torch.compile by itself differs from eager mode,
    they are compared with torch.compile's.
    """
    return "exact" in row and row.get("beyond_torch", row["exact"]) <= row["tolerance"]


def missing(expected: Sequence[int], found: Sequence[int]) -> list[int]:
    """The lengths of expected chains for which no chain was found."""
    return sorted((Counter(expected) - Counter(found)).elements())


def looked(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """What ``explain`` reports about a model in which expected links are missing."""
    torch._dynamo.reset()
    report = hwbp_compiler.explain(model, *args, options=ASKED)
    declined = [r for r in report.chains if r.decision != "rewritten"]
    return {
        **chains(report.chains),
        "declined": [of_record(r) for r in declined],
        "notes": list(report.notes),
        "failure": next((graph.failure for graph in report.graphs if graph.failure), None),
    }


def chains(records: Sequence[ChainRecord]) -> dict[str, Any]:
    """The lengths of the rewritten chains, and of all chains found, rewritten or declined."""
    rewritten = [r for r in records if r.decision == "rewritten"]
    declined = [r for r in records if r.decision != "rewritten" and r.reason_code not in NO_CHAIN]
    return {
        "rewritten": sorted(r.length for r in rewritten),
        "found": sorted([r.length for r in rewritten] + [r.length for r in declined for _ in range(r.times)]),
        "multipliers": sorted({r.multiplier for r in rewritten}),
    }


def of_record(record: ChainRecord) -> dict[str, Any]:
    code = record.reason_code.name if record.reason_code is not None else None
    return {
        "code": code,
        "links": record.length,
        "times": record.times,
        "reason": record.reason,
        "advice": record.advice,
        "line": record.source.rpartition("/")[2],
    }


def compared(model: nn.Module, args: tuple[Any, ...], exact: Gradients) -> dict[str, Any]:
    """Gradients through the rewritten joint graph, without generating code, with as many iterations as links and with
    1.
    """
    torch._dynamo.reset()
    captured = capture(model, args, probe_loss)

    def at_once(options: Any) -> tuple[Gradients, list[Any]]:
        torch.manual_seed(SEED)
        return captured.gradients(options)[1:]

    gradients: Callable[[Any], tuple[Gradients, list[Any]]] = at_once
    try:
        plain = gradients(None)[0]
        as_it_is = difference(plain, exact)
    except Exception:
        as_it_is = float("inf")
    dtype = narrowest(captured)
    row: dict[str, Any] = {"tolerance": tolerance(dtype), "dtype": str(dtype).removeprefix("torch.")}
    if not as_it_is <= row["tolerance"]:
        # The captured joint graphs, run as a whole, differ from eager mode: see what the backend's two halves give.
        gradients = functools.partial(by_backend, model, args)
        plain = gradients(None)[0]
        as_it_is = difference(plain, exact)
    found, records = gradients(FULL)
    row |= {"exact": difference(found, exact), "worst": worst(found, exact)}
    if not as_it_is <= row["tolerance"]:  # torch's decompositions differ from eager mode: compare with them
        row |= {"torch_by_itself": as_it_is, "beyond_torch": difference(found, plain)}
    row["forced"] = sorted(r.length for r in records if r.decision == "rewritten")
    found, records = gradients(options(**ASKED))
    return row | {"cosine": cosine(found, exact), "graphs": len(captured.joints), **chains(records)}


def by_backend(model: nn.Module, args: tuple[Any, ...], options: Any) -> tuple[Gradients, list[Any]]:
    """The same under a backend that runs the two halves of the rewritten graph."""
    torch._dynamo.reset()
    records: list[Any] = []
    compiled = torch.compile(model, backend=eager_highway(options, records=records))
    leaves = leaves_of(model, args)
    torch.manual_seed(SEED)
    found = torch.autograd.grad(probe_loss(compiled(*args)), list(leaves.values()), allow_unused=True)
    return by_leaf(leaves, found), records


def by_leaf(leaves: Mapping[str | int, Tensor], found: Sequence[Tensor | None]) -> Gradients:
    return {k: torch.zeros_like(leaf) if g is None else g for (k, leaf), g in zip(leaves.items(), found, strict=True)}


def eager(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, Gradients]:
    leaves = leaves_of(model, args)
    torch.manual_seed(SEED)
    output = model(*args)
    found = torch.autograd.grad(probe_loss(output), list(leaves.values()), allow_unused=True)
    gradients = by_leaf(leaves, found)
    if not all(g.isfinite().all() for g in gradients.values()):
        raise ValueError("the gradients in eager mode are not finite")
    return output, gradients


def difference(found: Gradients, exact: Gradients) -> float:
    """The maximum over parameters of ``|found - exact| / (|exact| + SHARE |all of exact|)``."""
    return max(_differences(found, exact).values(), default=0.0)


def worst(found: Gradients, exact: Gradients) -> str:
    differences = _differences(found, exact)
    return str(max(differences, key=differences.__getitem__))


def _differences(found: Gradients, exact: Gradients) -> dict[str | int, float]:
    floor = SHARE * total_norm(exact)
    differences = {}
    for key, gradient in exact.items():
        off = float((found[key].double() - gradient.double()).norm())
        allowed = float(gradient.double().norm()) + floor
        differences[key] = off / allowed if off else 0.0
    return {key: value if value == value else float("inf") for key, value in differences.items()}


def narrowest(captured: Capture) -> torch.dtype:
    """The narrowest floating-point type that any gradient passes through in the joint graphs."""
    found = torch.float64
    for joint in captured.joints:
        gradients: set[Any] = set()
        for node in joint.module.graph.nodes:
            if is_tangent(node) or gradients.intersection(node.all_input_nodes):
                gradients.add(node)
                value = node.meta.get("val")
                dtype = value.dtype if isinstance(value, Tensor) else None
                if dtype is not None and dtype.is_floating_point and dtype.itemsize < found.itemsize:
                    found = dtype
    return found


def tolerance(dtype: torch.dtype) -> float:
    """Allows for the rounding of a thousand operations: 2e-10 would be enough in float64, and 1e-4 is enough in
    float32.
    """
    return max(1e-9, 1e3 * torch.finfo(dtype).eps)


def without_us(model: nn.Module, args: tuple[Any, ...]) -> str:
    """The error that ``torch.compile`` raises for the model by itself; empty if it compiles."""
    torch._dynamo.reset()
    try:
        probe_loss(torch.compile(model, backend="aot_eager")(*args)).backward()
    except Exception as error:
        return told(error)
    finally:
        model.zero_grad()
    return ""


def told(error: Exception) -> str:
    """The type and first lines of an error, and the last lines of our code that it passed through."""
    lines = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "hwbp_compiler" in f.filename or "/passes/" in f.filename
    ]
    words = " ".join(str(error).split())[:400]
    inside = ", ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in lines[-2:])
    return f"{type(error).__name__}: {words}" + (f" ({inside})" if inside else "")
