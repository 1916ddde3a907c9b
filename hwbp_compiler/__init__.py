"""``torch.compile(model, backend="highway")``: backpropagation in Highway-BP form (arXiv 2501.17086).

No import is needed to compile: the backend is found by its entry point. What can be imported from here is
listed in ``__all__``; each name is loaded when it is first used, so the import itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import testing as testing
    from .auto.calibrate import calibrate as calibrate
    from .auto.climb import Climb as Climb
    from .auto.control import Schedule as Schedule
    from .auto.control import set_iterations as set_iterations
    from .auto.control import set_options as set_options
    from .auto.meter import GradientMeter as GradientMeter
    from .counting import counters as counters
    from .counting import reset_counters as reset_counters
    from .errors import HighwayError as HighwayError
    from .errors import OptionError as OptionError
    from .generate import generate_code as generate_code
    from .options import Options as Options
    from .report import explain as explain
    from .rolled import recurrent as recurrent
    from .scan import linear_scan as linear_scan

# A public function must not be called like the module it stands in: importing a submodule binds its name
# on the package, and the module would hide the function.
_HOME = {
    "Climb": "auto.climb",
    "GradientMeter": "auto.meter",
    "HighwayError": "errors",
    "OptionError": "errors",
    "Options": "options",
    "Schedule": "auto.control",
    "calibrate": "auto.calibrate",
    "counters": "counting",
    "explain": "report",
    "generate_code": "generate",
    "linear_scan": "scan",
    "recurrent": "rolled",
    "reset_counters": "counting",
    "set_iterations": "auto.control",
    "set_options": "auto.control",
}
_SUBPACKAGES = ("distributed", "testing")

__all__ = sorted([*_HOME, *_SUBPACKAGES])


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
