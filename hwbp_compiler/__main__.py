"""Show what the compiler would do with a model (explain my_module:make_model_and_inputs --html out.html), or check this
machine (doctor).
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MAKER = """\
The function takes no argument and returns (model, inputs) or (model, inputs, loss): inputs is a tensor, a tuple of
positional arguments or a dict of keyword arguments; loss(output) is one number.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    # Python puts a script's own folder on sys.path, but not the current folder, where the user's module may be.
    sys.path.insert(0, str(Path.cwd()))
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hwbp_compiler", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="explain | doctor")
    explain = commands.add_parser("explain", help="show what the compiler would do with a model", epilog=_MAKER)
    explain.add_argument("maker", help="module:function or file.py:function")
    explain.add_argument("--html", metavar="FILE", help="write the report as a page")
    explain.add_argument("--json", metavar="FILE", help="write the report as data")
    explain.add_argument("--repro", metavar="FILE", help="write a script that rebuilds the joint graph")
    explain.add_argument("--draw", metavar="FILE", help="draw the rewritten graph: .dot, .svg or .png")
    explain.add_argument(
        "--option", "-o", action="append", default=[], metavar="KEY=VALUE", help='one option, "iterations=2"'
    )
    explain.add_argument("--measure", action="store_true", help="time a training step with inductor and highway")
    explain.add_argument("--errors", action="store_true", help="compare w^k with the exact gradient")
    explain.set_defaults(run=_explain)
    doctor = commands.add_parser("doctor", help="show versions, devices, compilers and caches")
    doctor.add_argument(
        "--probe", action="store_true", help="first measure the devices for a few seconds, for the cost model"
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    from .errors import OptionError
    from .report import explain
    from .report.explaining import LossError
    from .report.text import show

    try:
        _check_places(arguments)
        maker = _load(arguments.maker)
        _check_takes_nothing(maker, arguments.maker)
        made = maker()
        if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
            raise _Usage(
                f"{arguments.maker} returned {type(made).__name__}"
                + (f" of length {len(made)}" if isinstance(made, (tuple, list)) else "")
                + "; it must return (model, inputs) or (model, inputs, loss)"
            )
        model, inputs, loss = (*made, None)[:3]
        args, kwargs = _call(inputs, torch.Tensor)
        options = dict(_option(text) for text in arguments.option)
    except _Usage as error:
        print(f"python -m hwbp_compiler explain: {error}", file=sys.stderr)
        return 2
    try:
        report = explain(
            model, *args, options=options, loss=loss, measure=arguments.measure, errors=arguments.errors, **kwargs
        )
    except (OptionError, LossError) as error:
        print(f"python -m hwbp_compiler explain: {error}", file=sys.stderr)
        return 2
    show(report)
    if arguments.html:
        report.to_html(arguments.html)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    try:
        if arguments.repro:
            report.save_repro(arguments.repro)
        if arguments.draw:
            report.draw(arguments.draw)
    except ValueError as error:  # there is no graph, or a script cannot contain it
        print(f"python -m hwbp_compiler explain: {error}", file=sys.stderr)
        return 1
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    return doctor.main(arguments.probe)


class _Usage(Exception):
    pass


def _load(maker: str) -> Callable[[], tuple]:
    place, _, name = maker.rpartition(":")
    if not place or not name:
        raise _Usage(f"{maker!r} names no function; write module:function or file.py:function. {_MAKER}")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise _Usage(f"{place!r} cannot be imported: {error}. Start it in the folder that holds the module.") from error
    function = getattr(module, name, None)
    if not callable(function):
        near = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))[:8])
        raise _Usage(f"{place!r} has no function {name!r}; it has {near or 'none'}. {_MAKER}")
    return function


def _load_file(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _check_places(arguments: argparse.Namespace) -> None:
    """Report a path that cannot be written before the work starts, not after it."""
    from .report import draw

    for place in filter(None, (arguments.html, arguments.json, arguments.repro, arguments.draw)):
        if not Path(place).absolute().parent.is_dir():
            raise _Usage(f"{place!r} is in a folder that does not exist; make it first")
    if arguments.draw:
        try:
            draw.check(arguments.draw)
        except (ValueError, ImportError, FileNotFoundError) as error:
            raise _Usage(f"--draw: {error}") from None


def _check_takes_nothing(function: Callable[..., Any], name: str) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise _Usage(f"{name} cannot be called without arguments: {error}. {_MAKER}") from None
    except ValueError:  # functions written in C may have no signature
        pass


def _call(inputs: Any, tensor: type) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, tensor):
        return (inputs,), {}
    raise _Usage(f"the inputs are a {type(inputs).__name__}. {_MAKER}")


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise _Usage(f"--option {text!r} has no value; write KEY=VALUE, such as iterations=2")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value  # a word: rewrite=always


if __name__ == "__main__":
    sys.exit(main())
