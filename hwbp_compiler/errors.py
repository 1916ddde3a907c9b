"""The exceptions that users may see."""

from __future__ import annotations

from types import FrameType

from .torch_private import ShortenTraceback


class HighwayError(ShortenTraceback):
    """The base class of this package's errors. It is a ``RuntimeError``.

    Args:
        message: what went wrong, and what to do.
        inner_exception: the error that caused this one, if any. It is also an attribute.
        first_useful_frame: the frame at which the traceback starts.

    Dynamo passes errors of our base class to the user unchanged. It turns any other exception of a backend into
    ``BackendCompilerFailed``. Dynamo drops ``__cause__``, so the original error is kept in ``inner_exception``. It also
    removes the frames outside ``first_useful_frame`` from the traceback.
    """

    def __init__(
        self,
        message: str,
        inner_exception: BaseException | None = None,
        first_useful_frame: FrameType | None = None,
    ) -> None:
        super().__init__(message, first_useful_frame=first_useful_frame)
        self.inner_exception = inner_exception


class OptionError(HighwayError, ValueError):
    """``torch.compile(..., backend="highway")`` was given a key, a value or a mode that is not allowed."""


def first_line(error: BaseException) -> str:
    """The class of ``error`` and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().removesuffix(":").partition("\n")[0]
