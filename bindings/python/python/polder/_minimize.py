"""The methods on arrays of NumPy, JAX and other libraries with DLPack."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _polder

_TYPES = {np.dtype(np.float32): (False, ctypes.c_float), np.dtype(np.float64): (True, ctypes.c_double)}


@dataclass
class Minimum:
    """The result of `minimize`."""

    x: Any
    """The last point, an array as ``x0``; ``x0`` itself where that was changed in place."""
    fun: float
    """The loss of the last step, before its update."""
    steps: int
    """Steps taken or skipped."""
    skipped: int
    """Steps skipped because a loss or a gradient was not finite."""
    telemetry: dict[str, float]
    """The numbers of the last step, as the method names them."""


def minimize(
    fun_and_grad: Callable[[Any], tuple[Any, Any]],
    x0: Any,
    method: str = "sam",
    *,
    steps: int = 100,
    lr: float | Callable[[int], float] = 1e-2,
    base: str = "sgd",
    momentum: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    hessp: Callable[[Any, Any], Any] | None = None,
    callback: Callable[[int, float], Any] | None = None,
    seed: int = 0,
    threads: int = 0,
    **options: Any,
) -> Minimum:
    """Minimises a function with a sharpness-aware method, in place.

    ``fun_and_grad(x)`` returns the loss and its gradient; ``hessp(x, p)`` the Hessian times p, which only methods with
    exact products need. ``x`` is an array of the library of ``x0`` (NumPy, JAX, PyTorch, any with DLPack) over the
    memory that the kernels work on, so nothing is copied. It changes after the call: a function that keeps it keeps a
    copy. ``x0`` is of float32 or float64 on the CPU.

    A NumPy array ``x0`` that is contiguous in C's order and can be written is changed in place, step by step. Others
    are copied once at the start: the result is a new array.

    ``method`` is a name such as "sam", "cr-sam" or "adamw", ``options`` are its own, such as ``rho``. Muon needs a
    matrix: an ``x0`` of two dimensions. ``lr`` is a
    number or a function of the step, which counts from 0. ``callback(step, loss)`` is called after each step; if it
    returns True, the minimisation ends. ``threads`` is the number of the CPU's threads, 0 for one per core.
    """
    known = {entry["name"]: entry for entry in _polder.methods()}
    if method not in known:
        raise ValueError(f"method: {method!r}, expected one of {', '.join(known)}")
    base = known[method]["base"] or base
    if base not in ("sgd", "adamw", "muon"):
        raise ValueError(f"base: {base!r}, expected 'sgd', 'adamw' or 'muon'")
    kinds = {option["name"]: option["kind"] for option in known[method]["options"]}
    texts = []
    for name, value in options.items():
        if name not in kinds:
            raise TypeError(f"{method} has no option {name!r}, expected one of {', '.join(kinds) or 'none'}")
        if value is not None:
            texts.append((name, option_text(value, kinds[name])))
    x, give = _open(x0)
    double, element = _TYPES[x.dtype]
    blocks: list[np.ndarray] = []

    def allocate(part: str, elements: int) -> int:
        blocks.append(aligned_zeros(elements, x.dtype))
        return blocks[-1].ctypes.data

    matrices = [(0, *x.shape)] if x.ndim == 2 else []
    engine = _polder.Engine(
        ("cpu", threads, 0), double, method, texts, base, [x.size], (x.size, 0), matrices, seed,
        0.0 if double else 1e-7, allocate,
    )  # fmt: skip
    given: dict[int, Any] = {}

    def vector_at(address: int) -> np.ndarray:
        """The vector at an address. It owns the block that it lies in, so it may be kept."""
        for block in (x, *blocks):
            start = (address - block.ctypes.data) // x.itemsize
            if 0 <= start and start + x.size <= block.size:
                return block.reshape(-1)[start : start + x.size].reshape(x.shape)
        # Memory of the compiled half, for the time of the call.
        return np.ctypeslib.as_array((element * x.size).from_address(address)).reshape(x.shape)

    def at(address: int) -> Any:
        """The vector at an address, as an array of the caller's library."""
        if address not in given:
            given[address] = give(vector_at(address))
        return given[address]

    keep: list[np.ndarray] = []
    losses: list[float] = []

    def taken(result: Any, what: str) -> int:
        array = np.asarray(_to_numpy(result), dtype=x.dtype, order="C")
        if array.shape != x.shape:
            raise ValueError(f"{what} has the shape {array.shape}, expected {x.shape}")
        keep[:] = [array]
        return array.ctypes.data

    def evaluate(weights: int, updates_statistics: bool, gradient: int) -> Any:
        loss, slope = fun_and_grad(at(weights))
        losses.append(float(loss))
        return (losses[-1], 0, [taken(slope, "the gradient")], 0, keep, False)

    def product(weights: int, direction: int) -> list[int]:
        if hessp is None:
            raise ValueError(f"{method} needs hessp, the product of the Hessian with a vector")
        return [taken(hessp(at(weights), give(vector_at(direction))), "the product")]

    group = {
        "start": 0, "end": x.size, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
        "betas": betas, "eps": eps,
    }  # fmt: skip
    done = 0
    for done in range(1, steps + 1):
        losses.clear()
        group["lr"] = float(lr(done - 1)) if callable(lr) else float(lr)
        engine.step(x.ctypes.data, evaluate, product, [group])
        if callback is not None and callback(done, losses[0]):
            break
    telemetry = engine.telemetry()
    return Minimum(
        x0 if give is _same and x is x0 else give(x),
        losses[0] if losses else float("nan"),
        done,
        int(telemetry["skipped"]),
        telemetry,
    )


def option_text(value: Any, kind: str) -> str:
    """An option as the compiled half reads it."""
    if kind == "bool":
        return "true" if value else "false"
    return repr(float(value)) if kind == "float" else str(value)


def _same(array: np.ndarray) -> np.ndarray:
    return array


def aligned_zeros(elements: int, dtype: np.dtype) -> np.ndarray:
    """Zeros at a multiple of 64 bytes, where other libraries take memory over without a copy."""
    memory = np.zeros(elements * dtype.itemsize + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + elements * dtype.itemsize].view(dtype)


def _to_numpy(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach"):
        array = array.detach()
    if hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    return np.asarray(array)


def _open(x0: Any) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
    """The array that is worked on, and what makes an array of the caller's library of memory."""
    array = _to_numpy(x0)
    if array.dtype not in _TYPES:
        raise TypeError(f"x0 is {array.dtype}, expected float32 or float64")
    if array.size == 0:
        raise ValueError("x0 is empty")
    if isinstance(x0, np.ndarray):
        if x0.flags.writeable and x0.flags.c_contiguous and x0.flags.aligned:
            return x0, _same
        give: Callable[[np.ndarray], Any] = _same
    elif hasattr(x0, "__array_namespace__"):
        give = x0.__array_namespace__().from_dlpack
    elif type(x0).__module__.partition(".")[0] == "torch":
        import torch

        give = torch.from_dlpack
    elif hasattr(x0, "__dlpack__"):
        raise TypeError(f"x0 is a {type(x0).__name__}, whose library has no from_dlpack that is known here")
    else:
        give = _same
    copy = aligned_zeros(array.size, array.dtype).reshape(array.shape)
    copy[...] = array
    return copy, give
