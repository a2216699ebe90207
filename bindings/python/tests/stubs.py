"""Writes the type stub of `polder.torch`, whose classes are made from the methods of the library.

python bindings/python/tests/stubs.py [--check]
"""

import pathlib
import sys

import polder.torch

PATH = pathlib.Path(__file__).resolve().parents[1] / "python" / "polder" / "torch.pyi"

HEAD = '''"""Made by tests/stubs.py."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, overload

import torch

_Loss = TypeVar("_Loss")
_Base = Literal["sgd", "adamw", "muon"] | type[torch.optim.Optimizer]

class SharpnessAware(torch.optim.Optimizer):
    base_optimizer: torch.optim.Optimizer | None
    @overload
    def step(self, closure: Callable[[], _Loss], *, scaler: torch.amp.GradScaler | None = None) -> _Loss: ...
    @overload
    def step(self, closure: None = None, *, scaler: torch.amp.GradScaler | None = None) -> None: ...
    def first_step(self, zero_grad: bool = False) -> None: ...
    def second_step(self, zero_grad: bool = False) -> None: ...
    def telemetry(self) -> dict[str, float]: ...
'''

BASE = {
    "lr": "float = 1e-3",
    "momentum": "float = ...",
    "weight_decay": "float = ...",
    "nesterov": "bool = False",
    "betas": "tuple[float, float] = (0.9, 0.999)",
    "eps": "float = 1e-8",
}

TAIL = {
    "model": "torch.nn.Module | None = None",
    "seed": "int = 0",
    "loss_error": "float | None = None",
    "no_sync": "Callable[[], AbstractContextManager[Any]] | None = None",
    "**base_options": "Any",
}


def annotation(option):
    kind = {"bool": "bool", "int": "int", "float": "float", "str": "str"}[option["kind"]]
    if option["words"]:
        kind = "Literal[" + ", ".join(f'"{word}"' for word in option["words"]) + "]"
    default = option["default"]
    if default is None:
        return f"{kind} | None = None"
    if default == float("inf"):
        return f"{kind} = ..."
    return f"{kind} = {default!r}" if not isinstance(default, str) else f'{kind} = "{default}"'


def stub():
    parts = [HEAD]
    for name in polder.torch.__all__[1:]:
        cls = getattr(polder.torch, name)
        own = cls._method["base"]
        base = f'Literal["{own}"] = "{own}"' if own else '_Base = "sgd"'
        if cls._method["computes_rate"]:
            base = 'Literal["sgd"] = "sgd"'
        options = {
            # `lambda` is a keyword of Python: it is given as **{"lambda": ...}.
            option["name"]: annotation(option)
            for option in cls._method["options"]
            if option["name"] != "lambda"
        }
        lines = [f"        {key}: {value}," for key, value in {**BASE, **options, **TAIL}.items()]
        parts.append(
            f"\nclass {name}(SharpnessAware):\n    def __init__(\n        self,\n"
            "        params: torch.nn.Module | Iterable[Any],\n"
            f"        base: {base},\n        *,\n" + "\n".join(lines) + "\n    ) -> None: ...\n"
        )
    return "".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(None if PATH.read_text() == stub() else f"{PATH.name} differs: run {pathlib.Path(__file__).name}")
    PATH.write_text(stub())
