"""Tensors of PyTorch as one flat vector.

The compiled half of the package works on one vector of weights. Here the tensors of a model become views of such a
vector, and back: a perturbed point is another vector, and a pass there needs no copy, because the parameters are
pointed at it.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from . import _polder
from ._minimize import aligned_zeros

DTYPES = {torch.float32: False, torch.float64: True}


@functools.cache
def openmp() -> int:
    """The address of `GOMP_parallel` in the OpenMP that PyTorch has loaded; 0 if there is none.

    The kernels run on its threads. After a pass of PyTorch they wait for work without sleeping, and would take the
    cores from threads of our own.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    except OSError:
        return 0
    found = [path for path in paths if re.search(r"/lib(gomp|iomp5|omp)[^/]*\.so[^/]*$", path)]
    # Another package may have one of its own.
    for path in sorted(found, key=lambda path: re.search(r"/torch(\.libs|/lib)?/[^/]*$", path) is None):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def place_of(device: torch.device) -> tuple[str, int, int]:
    """The device as the compiled half knows it, with the stream that PyTorch works on."""
    if device.type == "cpu":
        return ("cpu", torch.get_num_threads(), openmp())
    if device.type == "cuda":
        ordinal = device.index if device.index is not None else torch.cuda.current_device()
        return ("cuda", ordinal, torch.cuda.current_stream(ordinal).cuda_stream)
    raise ValueError(f"device {device}: expected cpu or cuda")


def check_tensors(tensors: Sequence[torch.Tensor]) -> tuple[torch.device, torch.dtype]:
    """Device and type of parameters that can be one flat vector."""
    if not tensors:
        raise ValueError("no parameter has requires_grad")
    first = tensors[0]
    for number, tensor in enumerate(tensors):
        what = f"parameter {number} of shape {tuple(tensor.shape)}"
        if tensor.layout != torch.strided:
            raise ValueError(f"{what} is {tensor.layout}, expected a dense one")
        if type(tensor.data) is not torch.Tensor:
            raise ValueError(f"{what} is a {type(tensor.data).__name__}, expected a plain tensor")
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{what} is {tensor.dtype}, expected float32 or float64: "
                "keep the parameters in float32 and use autocast"
            )
        if tensor.dtype != first.dtype:
            raise ValueError(f"{what} is {tensor.dtype}, others are {first.dtype}: make an optimizer for each type")
        if tensor.device != first.device:
            raise ValueError(
                f"{what} is on {tensor.device}, others on {first.device}: make an optimizer for each device"
            )
    if first.dtype == torch.float64 and first.device.type != "cpu":
        raise ValueError(f"parameters are float64 on {first.device}: double precision exists on the CPU only")
    starts: dict[int, int] = {}
    for number, tensor in enumerate(tensors):
        if tensor.numel() and starts.setdefault(tensor.data_ptr(), number) != number:
            other = starts[tensor.data_ptr()]
            raise ValueError(f"parameters {other} and {number} share memory but are two: register one of them twice")
    place_of(first.device)
    return first.device, first.dtype


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's strides if its elements fill a range of memory, else those of a contiguous tensor."""
    expected, whole = 1, True
    for size, stride in sorted(zip(tensor.shape, tensor.stride()), key=lambda pair: (pair[1], pair[0])):
        if size != 1:
            whole &= stride == expected
            expected *= size
    return tensor.stride() if whole else torch.empty(tensor.shape).stride()


class Flat:
    """The layout of parameters in a flat vector, and vectors of that layout."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self.params = list(params)
        self.device, self.dtype = check_tensors(self.params)
        self.double = DTYPES[self.dtype]
        self.lengths = [param.numel() for param in self.params]
        self.shapes = [(param.shape, dense_strides(param)) for param in self.params]
        self.places: list[tuple[int, int]] = []
        end = 0
        for length in self.lengths:
            start = -(-end // _polder.ALIGNMENT) * _polder.ALIGNMENT
            end = start + length
            self.places.append((start, end))
        self.len = end
        # One vector in a block of several begins at a multiple of the alignment.
        self.distance = -(-end // _polder.ALIGNMENT) * _polder.ALIGNMENT
        self.blocks: list[torch.Tensor] = []
        self._views: dict[int, list[torch.Tensor]] = {}
        self._at = 0

    def allocate(self, elements: int) -> torch.Tensor:
        """A block of zeros for one or several vectors, whose addresses `views` knows."""
        if self.device.type == "cpu":
            # NumPy asks for huge pages where an array is long, PyTorch does not.
            block = torch.from_numpy(aligned_zeros(elements, np.dtype("f8" if self.double else "f4")))
        else:
            block = torch.zeros(elements, dtype=self.dtype, device=self.device)
        self.blocks.append(block)
        return block

    def split(self, vector: torch.Tensor, start: int = 0) -> list[torch.Tensor]:
        """The tensors of the vector that begins at an element of a block."""
        if vector.device.type == "cpu":
            # Each with a storage of its own: programs that save models take tensors of one storage for one tensor.
            array = vector.detach().numpy()
            return [
                torch.from_numpy(array[start + first : start + last]).as_strided(shape, strides)
                for (shape, strides), (first, last) in zip(self.shapes, self.places)
            ]
        base = vector.storage_offset() + start
        return [
            vector.as_strided(shape, strides, base + place)
            for (shape, strides), (place, _) in zip(self.shapes, self.places)
        ]

    def views(self, address: int) -> list[torch.Tensor]:
        """The tensors of the vector at an address in one of the blocks."""
        found = self._views.get(address)
        if found is None:
            for block in self.blocks:
                start = (address - block.data_ptr()) // block.element_size()
                if 0 <= start and start + self.len <= block.numel():
                    found = self._views[address] = self.split(block, start)
                    break
            else:
                found = self.split(self._foreign(address))
        return found

    def _foreign(self, address: int) -> torch.Tensor:
        """A vector in memory of the compiled half, for the time of a call."""
        size = self.len * (8 if self.double else 4)
        if self.device.type == "cpu":
            return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=self.dtype, count=self.len)
        interface = {"shape": (self.len,), "typestr": "<f4", "data": (address, False), "version": 2}
        return torch.as_tensor(type("Foreign", (), {"__cuda_array_interface__": interface})(), device=self.device)

    def adopt(self, vector: torch.Tensor) -> None:
        """The parameters become views of a vector, which takes over the values of those that are none yet."""
        # Anew: `share_memory_` moves the storage of a view that somebody else holds too.
        views = self._views[vector.data_ptr()] = self.split(vector)
        with torch.no_grad():
            for param, view in zip(self.params, views):
                if param.data_ptr() != view.data_ptr():
                    view.copy_(param.data)
                param.data = view
        self._at = vector.data_ptr()
        self._places_at = [view.data_ptr() for view in views]

    def point(self, address: int) -> None:
        """Points the parameters at the vector at an address."""
        if self._at != address:
            # Autocast keeps casts of the parameters, which are of another point now.
            torch.clear_autocast_cache()
            for param, view in zip(self.params, self.views(address)):
                param.data = view
            self._at = address

    def forget(self) -> None:
        """Somebody else has pointed the parameters elsewhere."""
        self._at = 0

    def changed(self) -> None:
        """Tells autograd that the parameters have other values, for graphs that were made before."""
        for param in self.params:
            torch.autograd.graph.increment_version(param)

    def moved(self, address: int) -> bool:
        """Whether somebody has given a parameter other memory than that of the vector at this address."""
        self._at = address
        return any(param.data_ptr() != place for param, place in zip(self.params, self._places_at))

    def gradients(self, found: Iterable[torch.Tensor | None], keep: list[Any]) -> list[int]:
        """The addresses of gradients, in the memory order of their parameters; `keep` holds what has to stay alive."""
        addresses = []
        for number, (gradient, (shape, strides)) in enumerate(zip(found, self.shapes)):
            if gradient is None:
                addresses.append(0)
                continue
            if gradient.layout != torch.strided:
                raise ValueError(f"the gradient of parameter {number} is {gradient.layout}, expected a dense one")
            if gradient.dtype != self.dtype or gradient.device != self.device:
                gradient = gradient.to(self.device, self.dtype)
            if gradient.stride() != strides and gradient.numel() > 1:
                gradient = torch.empty_strided(shape, strides, dtype=self.dtype, device=self.device).copy_(gradient)
            if gradient.requires_grad:
                gradient = gradient.detach()
            if gradient.is_neg():
                gradient = gradient.resolve_neg()
            keep.append(gradient)
            addresses.append(gradient.data_ptr())
        return addresses

    def loss(self, found: Any, keep: list[Any]) -> tuple[float, int]:
        """A loss as a number, or on a GPU as the address of one in double precision, so that nothing waits."""
        if isinstance(found, torch.Tensor):
            if found.numel() != 1:
                raise ValueError(f"the closure returned a tensor of shape {tuple(found.shape)}, expected one loss")
            if found.device.type == "cpu":
                return (found.item(), 0)
            number = found.detach().to(self.device, torch.float64).reshape(1)
            keep.append(number)
            return (0.0, number.data_ptr())
        if isinstance(found, (int, float, np.number)):
            return (float(found), 0)
        raise TypeError(f"the closure returned a {type(found).__name__}, expected the loss")


class Statistics:
    """Buffers that a forward pass changes, such as batch norm's running statistics, kept over later passes."""

    _NAMES = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self.modules = list(modules)
        # Each buffer with the memory for its copy, by the buffer's id.
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._kept: list[torch.Tensor] | None = None

    @staticmethod
    def of(params: Sequence[torch.Tensor], module: torch.nn.Module | None) -> Statistics:
        """Those of a module, and of every module that some of the parameters belong to."""
        # A module alone may be the part of a larger one that is trained, such as its head.
        return Statistics([*([] if module is None else [module]), *owners(params)])

    def _buffers(self) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        seen, todo = set(), list(self.modules)
        # In each step: `Module.modules` and `getattr` take several times as long.
        while todo:
            module = todo.pop()
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            todo.extend(module._modules.values())
            buffers = module._buffers
            if buffers:
                for name in self._NAMES:
                    buffer = buffers.get(name)
                    if buffer is not None:
                        found[id(buffer)] = buffer
        return list(found.values())

    def keep(self) -> None:
        """Remembers the statistics, once until `restore`."""
        if self._kept is None:
            self._kept = self._buffers()
            known = self._copies
            self._copies = {}
            for buffer in self._kept:
                old = known.get(id(buffer))
                fits = (
                    old is not None
                    and old[0] is buffer
                    and (
                        old[1].shape == buffer.shape and old[1].dtype == buffer.dtype and old[1].device == buffer.device
                    )
                )
                self._copies[id(buffer)] = old if fits else (buffer, torch.empty_like(buffer))
            self._copy(self._kept, [copy for _, copy in self._copies.values()])

    def restore(self) -> None:
        """Puts back what `keep` remembered."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._copy([self._copies[id(buffer)][1] for buffer in kept], kept)

    @staticmethod
    def _copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
        if sources:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)


def owners(params: Sequence[torch.Tensor]) -> list[torch.nn.Module]:
    """The outermost modules that hold some of the parameters, among all that are alive."""
    import gc

    wanted = {id(param) for param in params}
    parents: dict[int, list[torch.nn.Module]] = {}
    holders = []
    for found in gc.get_objects():
        # type() instead of isinstance: a proxy may run code when it is asked for its class.
        if not issubclass(type(found), torch.nn.Module):
            continue
        contents = vars(found)
        for child in (contents.get("_modules") or {}).values():
            if child is not None:
                parents.setdefault(id(child), []).append(found)
        if any(id(param) in wanted for param in (contents.get("_parameters") or {}).values()):
            holders.append(found)
    roots, seen, todo = [], set(), holders
    while todo:
        module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        above = parents.get(id(module), [])
        if above:
            todo.extend(above)
        else:
            roots.append(module)
    return roots
