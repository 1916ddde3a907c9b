"""The scan along the highway: one operator, with a kernel for each kind of device behind it.

``linear_scan`` is the public function, ``torch.ops.highway.linear_scan`` the operator it calls and that graphs
contain. Importing this package defines the operator; GPU code for it comes from :mod:`.inductor`.
"""

from .function import linear_scan


def register_lowerings() -> None:
    """Inductor's side of our operators. Not at import: it loads Inductor."""
    from . import inductor

    inductor.register()


__all__ = ["linear_scan", "register_lowerings"]
