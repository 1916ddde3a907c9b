"""``torch.compile(model, backend="highway")``: backpropagation in Highway-BP form (arXiv 2501.17086).

No import is needed to compile: torch finds the backend by its entry point. ``__all__`` lists what can be imported from
here. Each name is loaded when it is first used, so importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from . import distributed as distributed
    from . import testing as testing
    from .auto.climb import Climb as Climb
    from .auto.control import Schedule as Schedule
    from .auto.control import set_iterations as set_iterations
    from .auto.control import set_options as set_options
    from .auto.meter import GradientMeter as GradientMeter
    from .calibration import calibrate as calibrate
    from .counting import counters as counters
    from .counting import reset_counters as reset_counters
    from .errors import HighwayError as HighwayError
    from .errors import OptionError as OptionError
    from .generate import generate_code as generate_code
    from .options import Options as Options
    from .report import explain as explain
    from .rolled import recurrent as recurrent
    from .scan import linear_scan as linear_scan

# A public function must not have the name of the module that defines it. Importing a submodule binds its name on the
# package, and the module would then hide the function.
_HOME = {
    "Climb": "auto.climb",
    "GradientMeter": "auto.meter",
    "HighwayError": "errors",
    "OptionError": "errors",
    "Options": "options",
    "Schedule": "auto.control",
    "calibrate": "calibration",
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
