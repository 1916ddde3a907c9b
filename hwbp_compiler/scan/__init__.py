"""The scan along the highway: one operator, with a kernel for each kind of device.

``linear_scan`` is the public function. It calls the operator ``torch.ops.highway.linear_scan``, which also appears in
graphs. Importing this package defines the operator; :mod:`.inductor` generates GPU code for it.
"""

from .function import linear_scan


def register_lowerings() -> None:
    """Register Inductor's lowerings of our operators. Not done at import, because it loads Inductor."""
    from . import inductor

    inductor.register()


__all__ = ["linear_scan", "register_lowerings"]
