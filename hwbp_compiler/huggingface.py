"""Use the backend with ``TrainingArguments(torch_compile=True, torch_compile_backend="highway")`` or Accelerate:

    import hwbp_compiler.huggingface

Accelerate accepts only the backends in a fixed list, so installing this package is not enough. Importing this module
adds ``"highway"`` to that list and changes nothing else. It needs the ``accelerate`` package.

``HighwayCallback(trainer)`` logs the gradient's cosine with the exact one while a ``Trainer`` trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import DynamoBackend

if TYPE_CHECKING:
    from .huggingface_callback import HighwayCallback as HighwayCallback

NAME = "HIGHWAY"


def register() -> None:
    """Make Accelerate accept ``"highway"`` as a Dynamo backend. A second call changes nothing."""
    if NAME in DynamoBackend._value2member_map_:
        return
    # An enum with members cannot be extended by inheritance. Checked on accelerate 1.15.0.
    member = str.__new__(DynamoBackend, NAME)
    member._name_ = member._value_ = NAME
    DynamoBackend._member_map_[NAME] = member
    DynamoBackend._value2member_map_[NAME] = member
    DynamoBackend._member_names_.append(NAME)


register()


def __getattr__(name: str) -> Any:
    """``HighwayCallback``, which needs ``transformers``; Accelerate alone does not."""
    if name != "HighwayCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .huggingface_callback import HighwayCallback

    return HighwayCallback
