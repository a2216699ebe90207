"""Curvature of the loss of any PyTorch model, and pictures of the loss around its weights."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _polder
from ._flat import Flat, Statistics, place_of
from .torch import _hessian_vector


class Estimate(NamedTuple):
    """A mean over random probes."""

    value: float
    standard_error: float | None
    """None for a single probe."""


class Eigenvalues(NamedTuple):
    """Eigenvalues of the Hessian, the largest first."""

    values: list[float]
    residuals: list[float]
    """``‖Hx − λx‖`` of each: some eigenvalue lies within this distance."""
    vectors: list[list[torch.Tensor]]
    """The eigenvectors, each as a tensor for each parameter; empty unless they were asked for."""


class Spectrum(NamedTuple):
    """The density of the Hessian's eigenvalues: peaks at nodes, with weights that add up to 1."""

    nodes: list[float]
    weights: list[float]

    def density(self, grid: Iterable[float], sigma: float) -> list[float]:
        """The density at each number of the grid, if each peak is a normal distribution with this deviation."""
        scale = 1.0 / (sigma * math.sqrt(2.0 * math.pi))
        return [
            sum(weight * scale * math.exp(-0.5 * ((x - node) / sigma) ** 2) for node, weight in zip(*self))
            for x in grid
        ]


class Rise(NamedTuple):
    """How far the loss rises within a ball around the weights."""

    one_step: float
    """After one step along the gradient: SAM's estimate."""
    largest: float
    """The largest rise that projected ascent found."""


class Curvature:
    """Measures the curvature of a loss at the weights of a model. Made by `polder.curvature`.

    Products with the Hessian are exact: PyTorch differentiates the gradient. The estimators and the algebra are
    polder's. Weights, gradients and running statistics are left as they were.
    """

    def __init__(self, losses: Sequence[tuple[float, Callable[[], torch.Tensor]]], flat: Flat, statistics: Statistics):
        self._losses, self._flat, self._statistics = losses, flat, statistics
        self._weights = flat.allocate(flat.len)
        self._keep: list[Any] = []
        self._running = False
        # Weak, because the garbage collector does not look into the probe.
        me = weakref.ref(self)
        self._probe = _polder.Probe(
            place_of(flat.device),
            flat.double,
            flat.lengths,
            self._weights.data_ptr(),
            lambda *given: me()._evaluate(*given),
            lambda *given: me()._loss(*given),
            lambda *given: me()._product(*given),
        )

    # ---- Passes, each the mean over the batches

    def _mean(self, of: Callable[[torch.Tensor], Sequence[torch.Tensor | None]]) -> list[torch.Tensor | None]:
        total: list[torch.Tensor | None] = [None] * len(self._flat.params)
        with torch.enable_grad(), self._same_numbers():
            for share, loss in self._losses:
                for number, part in enumerate(of(loss() * share)):
                    if part is not None:
                        total[number] = part if total[number] is None else total[number] + part
        return total

    def _evaluate(self, weights: int, updates_statistics: bool, gradient: int) -> Any:
        self._keep.clear()
        self._flat.point(weights)
        losses: list[torch.Tensor] = []

        def gradient_of(loss: torch.Tensor) -> Sequence[torch.Tensor | None]:
            losses.append(loss.detach().double())
            return torch.autograd.grad(loss, self._flat.params, allow_unused=True)

        addresses = self._flat.gradients(self._mean(gradient_of), self._keep)
        return (*self._flat.loss(sum(losses[1:], losses[0]), self._keep), addresses, 0, self._keep, False)

    def _loss(self, weights: int) -> tuple[float, int]:
        self._keep.clear()
        self._flat.point(weights)
        with torch.no_grad(), self._same_numbers():
            losses = [loss().double() * share for share, loss in self._losses]
        return self._flat.loss(sum(losses[1:], losses[0]), self._keep)

    def _product(self, weights: int, direction: int) -> list[int]:
        self._keep.clear()
        self._flat.point(weights)
        along = self._flat.views(direction)
        return self._flat.gradients(
            self._mean(lambda loss: _hessian_vector(loss, self._flat.params, along)), self._keep
        )

    @contextmanager
    def _same_numbers(self) -> Iterator[None]:
        """The same random numbers in each pass, so that dropout leaves one function of the weights."""
        devices = [self._flat.device] if self._flat.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield

    def _measure(self, measure: Callable[[], Any]) -> Any:
        if self._running:
            raise RuntimeError("a measurement is in progress: in another thread, or around this one")
        self._running = True
        original = [param.data for param in self._flat.params]
        self._statistics.keep()
        try:
            with torch.no_grad():
                for view, value in zip(self._flat.views(self._weights.data_ptr()), original):
                    view.copy_(value)
            return measure()
        finally:
            self._keep.clear()
            self._statistics.restore()
            for param, value in zip(self._flat.params, original):
                param.data = value
            self._flat.forget()
            self._running = False

    # ---- Measures

    def loss(self) -> float:
        """The mean loss."""

        def measure() -> float:
            number, address = self._loss(self._weights.data_ptr())
            return number if address == 0 else self._keep[-1].item()

        return self._measure(measure)

    def gradient_norm(self) -> float:
        """The norm of the gradient."""
        return self._measure(self._probe.gradient_norm)

    def along_gradient(self) -> float:
        """The curvature along the gradient: vᵀHv with v the gradient over its norm."""
        return self._measure(self._probe.along_gradient)

    def trace(
        self,
        probes: int = 100,
        *,
        seed: int = 0,
        method: str = "hutchinson",
        progress: Callable[[int], Any] | None = None,
    ) -> Estimate:
        """The trace of the Hessian. ``method`` is "hutchinson" (one product for each probe) or "hutch++"."""
        if method == "hutch++":
            return Estimate(*self._measure(lambda: self._probe.hutch_plus_plus(probes, seed)))
        if method != "hutchinson":
            raise ValueError(f"method: {method!r}, expected 'hutchinson' or 'hutch++'")
        return Estimate(*self._measure(lambda: self._probe.trace(probes, seed, progress)))

    def traces(self, probes: int = 100, *, seed: int = 0) -> list[Estimate]:
        """The traces of the diagonal blocks, one for each parameter that is trained, in their order."""
        return [Estimate(*found) for found in self._measure(lambda: self._probe.traces(probes, seed))]

    def normalized_trace(self, probes: int = 100, *, seed: int = 0) -> Estimate:
        """The trace over the norm of the gradient: CR-SAM's C(w)."""
        norm, trace = self.gradient_norm(), self.trace(probes, seed=seed)
        if norm == 0.0:
            raise ArithmeticError("normalized_trace: the gradient is zero")
        return Estimate(trace.value / norm, None if trace.standard_error is None else trace.standard_error / norm)

    def eigenvalues(
        self,
        count: int = 1,
        *,
        steps: int = 100,
        tolerance: float = 1e-3,
        seed: int = 0,
        method: str = "lanczos",
        vectors: bool = False,
    ) -> Eigenvalues:
        """The largest eigenvalues by Lanczos's method, or the largest in magnitude by power iteration.

        Fewer are returned if the Hessian has fewer distinct ones. Look at the residuals: without enough steps they are
        large.

        ``method`` is "lanczos" (``steps`` products and vectors at most) or "power" (``steps`` products for each). They
        are found when each residual is at most ``tolerance`` times the largest.
        """
        if method not in ("lanczos", "power"):
            raise ValueError(f"method: {method!r}, expected 'lanczos' or 'power'")
        made = [torch.zeros_like(self._weights) for _ in range(count if vectors else 0)]
        into = [vector.data_ptr() for vector in made]
        power = method == "power"
        pairs = self._measure(lambda: self._probe.eigenvalues(power, count, steps, tolerance, seed, into))
        parts = [self._flat.split(vector) for vector in made[: len(pairs)]]
        return Eigenvalues([value for value, _ in pairs], [residual for _, residual in pairs], parts)

    def spectrum(
        self, probes: int = 10, *, steps: int = 80, seed: int = 0, progress: Callable[[int], Any] | None = None
    ) -> Spectrum:
        """The density of the eigenvalues by stochastic Lanczos quadrature: ``probes`` times ``steps`` products."""
        return Spectrum(*self._measure(lambda: self._probe.spectrum(probes, steps, seed, progress)))

    def sharpness(self, rho: float = 0.05, *, steps: int = 20, seed: int = 0) -> Rise:
        """How far the loss rises within the ball of radius rho: by one step of SAM, and by projected ascent."""
        return Rise(*self._measure(lambda: self._probe.rise(rho, steps, seed)))

    def landscape(
        self,
        folder: str | os.PathLike[str],
        *,
        points: int = 21,
        reach: float = 1.0,
        dimensions: int = 2,
        directions: Sequence[Sequence[torch.Tensor]] | None = None,
        seed: int = 0,
        title: str | None = None,
        subject: str = "",
    ) -> list[Path]:
        """Evaluates the loss on a grid around the weights, writes it to a folder and draws it; the pictures' paths.

        The directions are random and filter-normalised (Li et al. 2018), or given: for each dimension a tensor for each
        trained parameter, such as those of `eigenvalues`. The grid has ``points`` numbers from −reach to reach in each
        dimension. ``polder picture FOLDER`` draws the same folder for print.
        """
        if dimensions not in (1, 2) or points < 2:
            raise ValueError(f"dimensions: {dimensions} of {points} points, expected 1 or 2 of at least 2 points")
        folder = Path(folder)
        if (folder / "landscape.csv").exists():
            raise FileExistsError(f"{folder}: holds a landscape already")
        folder.mkdir(parents=True, exist_ok=True)
        flat = self._flat
        random = directions is None
        along = []
        for number in (0, 1)[:dimensions]:
            vector = torch.zeros_like(self._weights)
            weights = [param.detach() for param in flat.params]
            parts = _filter_normalized(weights, seed, number) if random else directions[number]
            for view, part in zip(flat.split(vector), parts, strict=True):
                view.copy_(part)
            along.append(vector)
        # Symmetric, with the weights themselves in the middle of an odd number of points.
        values = [reach * (2 * index - (points - 1)) / (points - 1) for index in range(points)]
        names = [f"direction {number + 1}" for number in (0, 1)[:dimensions]]
        what = "filter-normalised random directions" if random else "given directions"
        described = {
            "title": title or f"Loss along {what}",
            "subject": subject,
            "axes": [{"name": name, "values": values} for name in names],
            "settings": {},
        }
        (folder / "landscape.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
        point, part = flat.allocate(flat.len), folder / "landscape.csv.part"

        def height(place: Sequence[float]) -> float:
            torch.add(self._weights, along[0], alpha=place[0], out=point)
            if dimensions == 2:
                point.add_(along[1], alpha=place[1])
            number, address = self._loss(point.data_ptr())
            return number if address == 0 else self._keep[-1].item()

        def measure() -> None:
            places = [(x,) for x in values] if dimensions == 1 else [(x, y) for y in values for x in values]
            # Under another name until it is whole.
            with part.open("w", encoding="utf-8") as file, torch.no_grad():
                file.write("x,loss,accuracy\n" if dimensions == 1 else "x,y,loss,accuracy\n")
                for place in places:
                    numbers = [*place, height(place), 0.0]
                    file.write(",".join(repr(number) for number in numbers) + "\n")

        self._measure(measure)
        part.replace(folder / "landscape.csv")
        pictures = _polder.landscape_pictures(folder)
        # The format has a column for the accuracy, which is not known here.
        for picture in pictures:
            if picture.stem.startswith("accuracy"):
                picture.unlink()
        return [picture for picture in pictures if picture.exists()]


def _filter_normalized(weights: Sequence[torch.Tensor], seed: int, number: int) -> list[torch.Tensor]:
    """Normal directions whose filters have the norms of the weights' filters; zero for vectors such as biases."""
    generator = torch.Generator(device="cpu").manual_seed(seed * 2 + number)
    found = []
    for weight in weights:
        if weight.dim() < 2:
            found.append(torch.zeros_like(weight))
            continue
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device, weight.dtype)
        norms = [part.flatten(1).norm(dim=1) for part in (weight, drawn)]
        scale = norms[0] / norms[1].clamp_min(1e-12)
        found.append(drawn * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    return found


def curvature(
    model: torch.nn.Module | Callable[[], torch.Tensor],
    criterion: Callable[[Any, Any], torch.Tensor] | None = None,
    data: Any = None,
    *,
    params: Iterable[torch.Tensor] | None = None,
) -> Curvature:
    """Measures of the curvature of a loss at the weights of a model.

    ::

        measured = polder.curvature(model.eval(), criterion, (inputs, targets))
        measured.trace(), measured.eigenvalues(5), measured.spectrum(), measured.sharpness(0.05)

    ``data`` is a batch ``(inputs, targets)`` or an iterable of batches, such as a ``DataLoader``, whose mean is taken;
    it is read once and kept, and its losses are weighted by ``len(targets)``. Or ``model`` is a function that returns the loss, without calling ``backward``, and
    ``params`` are its parameters. The model is used in the mode that it is in: batch norm in training mode normalises
    with the statistics of each batch.
    """
    if isinstance(model, torch.nn.Module):
        if criterion is None or data is None:
            raise TypeError("curvature: a model needs a criterion and data")
        batches = [data] if _is_batch(data) else list(data)
        if not batches:
            raise ValueError("curvature: the data has no batch")
        counts = [len(targets) for _, targets in batches]
        total = sum(counts)

        def loss_of(batch: tuple[Any, Any]) -> Callable[[], torch.Tensor]:
            return lambda: criterion(model(batch[0]), batch[1])

        losses = [(count / total, loss_of(batch)) for count, batch in zip(counts, batches)]
        params = list(model.parameters()) if params is None else list(params)
    else:
        if params is None:
            raise TypeError("curvature: a function needs params, its parameters")
        losses, params = [(1.0, model)], list(params)
    trained = [param for param in params if param.requires_grad]
    statistics = Statistics.of(trained, model if isinstance(model, torch.nn.Module) else None)
    return Curvature(losses, Flat(trained), statistics)


def _is_batch(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, torch.Tensor) for part in data)


def landscape(
    model: torch.nn.Module | Callable[[], torch.Tensor],
    criterion: Callable[[Any, Any], torch.Tensor] | None = None,
    data: Any = None,
    *,
    folder: str | os.PathLike[str],
    params: Iterable[torch.Tensor] | None = None,
    **settings: Any,
) -> list[Path]:
    """Draws the loss around the weights of a model: ``polder.curvature(…).landscape(folder, …)``."""
    return curvature(model, criterion, data, params=params).landscape(folder, **settings)
