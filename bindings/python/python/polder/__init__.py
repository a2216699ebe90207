"""polder: sharpness-aware optimizers and curvature, with fused kernels.

- ``polder.torch``: optimizers for PyTorch: ``SAM``, ``ASAM``, ``CRSAM``, ``GNR`` and others.
- ``polder.curvature``: trace, eigenvalues and spectrum of the Hessian of any PyTorch model, and how its loss rises
  around the weights; ``polder.landscape`` writes a picture of the loss around them.
- ``polder.minimize``: the same methods on arrays of NumPy and JAX.
- ``polder.report``: a page that compares runs of the program ``polder``, or the logs of your own.

Only NumPy is needed until a part for PyTorch or JAX is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._minimize import Minimum, minimize
from ._polder import __version__
from ._report import RunLog, report

if TYPE_CHECKING:
    from ._curvature import Curvature, curvature, landscape

__all__ = ["Curvature", "Minimum", "RunLog", "__version__", "curvature", "landscape", "minimize", "report"]

# These import PyTorch, which NumPy's users may not have.
_LAZY = {"Curvature": "_curvature", "curvature": "_curvature", "landscape": "_curvature"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "torch":
        return import_module(".torch", __name__)
    if name in _LAZY:
        found = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
