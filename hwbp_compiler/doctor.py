"""``python -m hwbp_compiler doctor``: show what is installed on this machine and what the compiler will use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .torch_private import NEWEST_KNOWN

_OLDEST = (2, 11)


def checks() -> Iterator[tuple[str, str, bool]]:
    """Yield (what, finding, whether it is fine), in the order a reader needs them. Nothing here raises."""
    for what, look in _LOOKS:
        try:
            finding, well = look()
        except Exception as error:  # the doctor reports broken things, so it must not fail on them
            finding, well = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}", False
        yield what, finding, well


def text() -> tuple[str, bool]:
    """All findings as text, and whether all are fine."""
    found = list(checks())
    width = max(len(what) for what, _, _ in found)
    lines = [f"{'ok' if well else '!!'} {what.ljust(width)}  {finding}" for what, finding, well in found]
    return "\n".join(lines), all(well for _, _, well in found)


def _package() -> tuple[str, bool]:
    return f"hwbp_compiler {importlib.metadata.version('hwbp_compiler')}, Python {platform.python_version()}", True


def _torch() -> tuple[str, bool]:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    known = f"{'.'.join(map(str, _OLDEST))} to {'.'.join(map(str, NEWEST_KNOWN))}"
    well = _OLDEST <= release <= NEWEST_KNOWN
    return f"torch {torch.__version__}" + ("" if well else f"; this package knows {known}"), well


def _entry_point() -> tuple[str, bool]:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="highway")
    if not found:
        return 'backend="highway" is not registered: install the package (pip install .)', False
    return 'torch.compile(model, backend="highway") needs no import', True


def _cpu() -> tuple[str, bool]:
    from .cost.devices import cores

    return f"{cores()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", True


def _accelerators() -> tuple[str, bool]:
    if not torch.cuda.is_available():
        return "none that torch sees: graphs are compiled for the CPU", True
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})", True


def _cost_model() -> tuple[str, bool]:
    from .cost.probe import stored

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = stored(device)
    if found is None:
        return "reads a table of typical devices; doctor --probe measures this one", True
    return f"reads what was measured here: {found}", True


def _compiler() -> tuple[str, bool]:
    from .torch_private import get_cpp_compiler  # how Inductor itself chooses

    try:
        name = get_cpp_compiler()
    except Exception:
        name = ""
    where = shutil.which(name) if name else None
    if where is None:
        return "no C++ compiler: Inductor cannot compile for a CPU. Install g++ or clang++, or set CXX", False
    return where, True


def _scan() -> tuple[str, bool]:
    from .scan.cpu import native

    if native.load(torch.float32) is None:
        return "on a CPU: torch operators, slower (the C++ kernel does not build)", False
    return "on a CPU: a C++ kernel, one pass over memory", True


def _triton() -> tuple[str, bool]:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: needed only for GPUs", not torch.cuda.is_available()
    return f"triton {version}; on a GPU the scan is a Triton kernel that Inductor generates", True


def _caches() -> tuple[str, bool]:
    from .torch_private import cache_dir, functorch_config, inductor_config

    folder = Path(cache_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror}): set TORCHINDUCTOR_CACHE_DIR", False
    on = [
        name
        for name, used in (
            ("FxGraphCache", inductor_config.fx_graph_cache),
            ("AOTAutogradCache", functorch_config.enable_autograd_cache),
        )
        if used
    ]
    return f"{folder}, {' and '.join(on) if on else 'no graph cache'} in use", True


def _logs() -> tuple[str, bool]:
    chosen = os.environ.get("TORCH_LOGS", "")
    return chosen or 'not set; TORCH_LOGS="+hwbp_compiler" logs every decision', True


def _extras() -> tuple[str, bool]:
    found = {"rich": "coloured reports", "pydot": "report.draw", "hypothesis": "property tests"}
    missing = [f"{name} ({use})" for name, use in found.items() if importlib.util.find_spec(name) is None]
    return "all there" if not missing else f"not installed: {', '.join(missing)}", True


_LOOKS: tuple[tuple[str, Callable[[], tuple[str, bool]]], ...] = (
    ("package", _package),
    ("torch", _torch),
    ("entry point", _entry_point),
    ("CPU", _cpu),
    ("accelerators", _accelerators),
    ("cost model", _cost_model),
    ("C++ compiler", _compiler),
    ("linear_scan", _scan),
    ("triton", _triton),
    ("caches", _caches),
    ("TORCH_LOGS", _logs),
    ("extras", _extras),
)


def probe() -> None:
    """Measure the CPU and, if there is one, the GPU. The cost model reads the result from now on."""
    from .cost.probe import keep
    from .measure_device import measured

    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        found = measured(device)
        print(f"{device}: {found}\nwritten to {keep(device, found)}; delete the file to return to the table\n")


def main(measuring: bool = False) -> int:
    if measuring:
        probe()
    found, well = text()
    print(found)
    print(f"\n{'All is well.' if well else 'Lines with !! need attention.'}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
