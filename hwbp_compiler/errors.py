"""The exceptions a user can meet."""

from __future__ import annotations

from types import FrameType

from .torch_private import ShortenTraceback


class HighwayError(ShortenTraceback):
    """Base of every error this package raises; a ``RuntimeError``.

    Args:
        message: what went wrong, and what to do.
        inner_exception: the error that this one stands for, if any; also an attribute.
        first_useful_frame: the frame at which the traceback begins for a user.

    The base class is Dynamo's mark for errors that reach the user as they are: any other exception that
    leaves a backend arrives as ``BackendCompilerFailed``. Dynamo drops ``__cause__`` on the way, so an error
    that stands for another one keeps it in ``inner_exception``; and it cuts from the traceback what lies
    outside ``first_useful_frame``.
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
    """A key, a value or a mode given to ``torch.compile(..., backend="highway")`` that is not allowed."""


def first_line(error: BaseException) -> str:
    """The kind of ``error`` and the first line of what it says."""
    return f"{type(error).__name__}: {error}".strip().removesuffix(":").partition("\n")[0]
