"""Sharpness-aware optimizers for PyTorch, with fused kernels.

::

    from polder.torch import SAM

    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.05)
    for inputs, targets in loader:
        def closure():
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

``step`` calls the closure once for each pass of the method and returns the first loss, the one at the weights. Each
class is a ``torch.optim.Optimizer``: parameter groups, schedulers, hooks and ``state_dict`` work as in PyTorch.

The parameters become views of one flat vector in the first step. Each perturbed point is another vector, at which the
parameters are pointed for a pass: the weights are never moved and restored, so nothing drifts.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from . import _polder
from ._flat import Flat, Statistics, place_of
from ._minimize import option_text

_METHODS = {method["name"]: method for method in _polder.methods()}

_SPELLING = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "muon": "Muon",
    "sam": "SAM",
    "asam": "ASAM",
    "random-sam": "RandomSAM",
    "r-sam": "RSAM",
    "gsam": "GSAM",
    "looksam": "LookSAM",
    "friendly-sam": "FriendlySAM",
    "msam": "MSAM",
    "wsam": "WSAM",
    "cr-sam": "CRSAM",
    "gnr": "GNR",
    "gam": "GAM",
    "sa-sam": "SASAM",
    "sa-sgd": "SASGD",
    "sampa": "SAMPa",
}

_FUSED: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "muon": {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1},
}

# The relative error of the mean loss of a mini-batch, which CR-SAM compares its differences with.
_LOSS_ERROR = {torch.float32: 1e-7, torch.float64: 2e-16}

# Names of the vectors of the state, as PyTorch's own optimizers have them.
_MOMENTS = {
    "sgd": {"momentum": "momentum_buffer"},
    "adamw": {"momentum": "exp_avg", "second_moment": "exp_avg_sq"},
    "muon": {"momentum": "momentum_buffer", "second_moment": "exp_avg_sq"},
}

# The layers whose parameters SAM-ON perturbs.
_NORMALISATION = (
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.LayerNorm,
    torch.nn.GroupNorm,
    *([torch.nn.RMSNorm] if hasattr(torch.nn, "RMSNorm") else []),
)

# Methods that follow the gradient of their last pass alone, so that replicas may differ in the first one.
_FOLLOWS_LAST = ("sam", "asam", "r-sam", "friendly-sam")


class _Suspended(Exception):
    """Ends a step at its second pass."""


class _Keep(list):
    """What has to stay alive for a pass."""


class _Memory:
    """Whether the gradients of each pass have memory of their own, and so may stay there until the step ends.

    They have, unless a closure or a hook puts all of them into the same tensors, as DistributedDataParallel does. The
    first step finds out.
    """

    def __init__(self) -> None:
        self._own: bool | None = None
        self._passes: list[tuple[weakref.ref[_Keep], set[int]]] = []
        self._held: list[_Keep] = []

    def begin(self) -> None:
        self._passes.clear()
        self._held.clear()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._own = False

    def holds(self, addresses: list[int], keep: _Keep) -> bool:
        """Whether the gradients of this pass may stay."""
        if self._own is False:
            return False
        found = set(addresses) - {0}
        if any(keep() is not None and not found.isdisjoint(other) for keep, other in self._passes):
            known, self._own = self._own, False
            if known:
                # From the next step on they are copied.
                raise RuntimeError("two passes of the step left their gradients in the same memory, unlike before")
        self._passes.append((weakref.ref(keep), found))
        if self._own is None:
            # While it is alive, no other gradient has the same address by chance.
            self._held.append(keep)
        return self._own is True

    def end(self) -> None:
        self._held.clear()
        if self._own is None:
            self._own = True


def _is_vector(param: torch.Tensor) -> bool:
    """Whether it is a bias or belongs to a normalisation."""
    return param.dim() < 2


def _check_numbers(groups: list[dict[str, Any]]) -> None:
    """Fails for numbers of the base that have no meaning, as PyTorch's optimizers do."""
    for group in groups:
        for name in ("lr", "momentum", "weight_decay", "eps"):
            number = float(group.get(name, 0.0))
            if not (number >= 0.0 and math.isfinite(number)):
                raise ValueError(f"{name}: {number}, expected a finite number, 0 or more")
        if group.get("nesterov") and not group.get("momentum"):
            raise ValueError("nesterov: needs a momentum above 0")


def _matrices(flat: Flat) -> int:
    """The elements of the flat vector in front of the biases and the normalisation."""
    return max((end for param, (_, end) in zip(flat.params, flat.places) if not _is_vector(param)), default=0)


def _normalisation(flat: Flat, modules: Iterable[torch.nn.Module], needed: bool) -> int:
    """The elements of the normalisation, if all of it lies in front of the biases; fails otherwise if it is needed."""
    inside = (module for root in modules for module in root.modules() if isinstance(module, _NORMALISATION))
    wanted = {id(param) for module in inside for param in module.parameters(recurse=False)}
    if needed and any(id(param) in wanted and not _is_vector(param) for param in flat.params):
        raise ValueError("perturb: 'norm' needs parameters of normalisation that are vectors")
    vectors = [(place, id(param) in wanted) for param, place in zip(flat.params, flat.places) if _is_vector(param)]
    first = [place for place, found in itertools.takewhile(lambda vector: vector[1], vectors)]
    if sum(found for _, found in vectors) > len(first):
        if needed:
            raise ValueError(
                "perturb: 'norm' needs the parameters of normalisation in front of all biases: give them in a group of "
                "their own, before the other groups"
            )
        return 0
    return first[-1][1] - first[0][0] if first else 0


def _hidden(
    flat: Flat, modules: Iterable[torch.nn.Module], groups: Iterable[dict[str, Any]]
) -> list[tuple[int, int, int]]:
    """The matrices for Muon: first element, rows and columns as they lie in memory.

    These are the parameters of two dimensions and more, but for embeddings, the last linear layer, and groups with
    ``muon=False``.
    """
    inside = [module for root in modules for module in root.modules()]
    left_out = {id(param) for group in groups if not group.get("muon", True) for param in group["params"]}
    left_out |= {id(module.weight) for module in inside if isinstance(module, torch.nn.Embedding)}
    linear = {id(module.weight) for module in inside if isinstance(module, torch.nn.Linear)}
    left_out |= {id(param) for param in [param for param in flat.params if id(param) in linear][-1:]}
    found = []
    for param, (start, end), (shape, strides) in zip(flat.params, flat.places, flat.shapes):
        if _is_vector(param) or id(param) in left_out or start == end:
            continue
        outputs, others = shape[0], (end - start) // shape[0]
        # A matrix and its transpose have the same update.
        if strides[0] == others:
            found.append((start, outputs, others))
        elif strides[0] == 1:
            found.append((start, others, outputs))
    return found


class SharpnessAware(torch.optim.Optimizer):
    """What the optimizers of this module have in common. Use one of its subclasses."""

    _method: dict[str, Any]

    # `GradScaler.step` must not unscale gradients by itself: those of every pass are scaled.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: str | type[torch.optim.Optimizer] = "sgd",
        *,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            model, params = params if model is None else model, params.parameters()
        own = self._method["base"]
        if own is not None and base not in ("sgd", own):
            raise ValueError(f"base: {type(self).__name__} has no other than {own}")
        base = own if own is not None else base
        if not (base in _FUSED or (isinstance(base, type) and issubclass(base, torch.optim.Optimizer))):
            raise ValueError(f"base: {base!r}, expected 'sgd', 'adamw', 'muon' or a class of torch.optim")
        if self._method["computes_rate"] and base != "sgd":
            raise ValueError(f"base: {type(self).__name__} computes the step size itself, so its base is 'sgd'")
        if no_sync is not None and (self._method["name"] not in _FOLLOWS_LAST or options.get("second_order")):
            raise ValueError(f"no_sync: {type(self).__name__} follows more than the gradient of its last pass")
        methods_own = {option["name"]: option["default"] for option in self._method["options"]}
        if options.pop("adaptive", False):
            raise ValueError("adaptive: use ASAM (with eta=0 for the form without an offset)")
        chosen = {name: options.pop(name) for name in list(options) if name in methods_own}
        fused = _FUSED[base] if isinstance(base, str) else {}
        for name in options:
            if isinstance(base, str) and name not in fused:
                known = ", ".join([*fused, *methods_own])
                raise TypeError(f"{type(self).__name__} has no option {name!r}, expected one of {known}")
        self._base = base if isinstance(base, str) else "external"
        self._model = model
        self._seed, self._loss_error, self._no_sync = seed, loss_error, no_sync
        self._busy = False
        self._clear()
        super().__init__(params, {**fused, **(options if fused else {}), **methods_own, **chosen})
        self.base_optimizer: torch.optim.Optimizer | None = None
        if not isinstance(base, str):
            if issubclass(base, torch.optim.LBFGS):
                raise ValueError("base: LBFGS needs a closure of its own, expected an optimizer that follows gradients")
            # Both see the same groups, so a scheduler of either changes both.
            self.base_optimizer = base(self.param_groups, **options)
            self.param_groups = self.base_optimizer.param_groups
            both = sorted(methods_own.keys() & self.base_optimizer.defaults.keys())
            if both:
                names = f"{type(self).__name__} and {base.__name__}"
                raise ValueError(f"base: {names} both have an option {both[0]}, which would be one number for both")
            self.defaults.update(self.base_optimizer.defaults)
        _check_numbers(self.param_groups)
        _polder.check_options(self._method["name"], self._options(), self._base == "external")

    def _clear(self) -> None:
        """Nothing is built."""
        self._engine: Any = None
        self._memory = _Memory()
        self._flat: Flat | None = None
        self._statistics: Statistics | None = None
        self._suspended: int | None = None
        self._blocks: list[tuple[str, torch.Tensor]] = []
        self._state_views: list[tuple[int, str, torch.Tensor, int, torch.Tensor, int]] = []

    # ---- Options and groups

    def _options(self) -> list[tuple[str, str]]:
        """The method's options as texts. All groups have the same."""
        options = []
        for option in self._method["options"]:
            name = option["name"]
            values = [group.get(name, option["default"]) for group in self.param_groups]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name}: {values[0]} and others, expected the same in all parameter groups")
            if values[0] is not None:
                value = values[0].item() if isinstance(values[0], torch.Tensor) else values[0]
                options.append((name, option_text(value, option["kind"])))
        return options

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuses a second use at the same time: the parameters may be at a perturbed point."""
        if self._busy:
            raise RuntimeError("the optimizer is in use: by another thread, or by its own closure")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._busy:
            raise RuntimeError("the optimizer is in use: by another thread, or by its own closure")
        self._leave_point()
        if self._engine is not None:
            if any(part == "memory" for part, _ in self._blocks):
                name = type(self).__name__
                raise ValueError(f"{name} compares with earlier steps, so no parameters can be added after the first")
            self._release()
        super().add_param_group(param_group)

    # ---- What is built in the first step

    def _trained(self) -> list[torch.Tensor]:
        """The parameters in the order of the flat vector: those of two dimensions and more first."""
        trained = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
        return sorted(trained, key=_is_vector)

    def _build(self) -> None:
        """Makes the flat vectors and the engine. The state of before is taken over."""
        flat, blocks = Flat(self._trained()), []
        error = self._loss_error if self._loss_error is not None else _LOSS_ERROR[flat.dtype]

        def allocate(part: str, elements: int) -> int:
            block = flat.allocate(elements)
            blocks.append((part, block))
            return block.data_ptr()

        place, options = place_of(flat.device), self._options()
        statistics = Statistics.of(flat.params, self._model)
        needed = ("perturb", "norm") in options
        shape = flat.lengths, (_matrices(flat), _normalisation(flat, statistics.modules, needed))
        matrices = _hidden(flat, statistics.modules, self.param_groups) if self._base == "muon" else []
        engine = _polder.Engine(
            place, flat.double, self._method["name"], options, self._base, *shape, matrices, self._seed, error, allocate
        )
        self._take_state(flat, blocks, engine)
        self._weights = flat.allocate(flat.len)
        flat.adopt(self._weights)
        self._direction = flat.allocate(flat.len) if self._base == "external" else None
        self._statistics = statistics
        self._place, self._given, self._passes = place, options, engine.passes()
        self._flat, self._blocks, self._engine = flat, blocks, engine

    def _take_state(self, flat: Flat, blocks: list[tuple[str, torch.Tensor]], engine: Any) -> None:
        """Copies the state per parameter to the flat vectors, of which it becomes views."""
        self._state_views = []
        with torch.no_grad():
            for part, block in blocks:
                if part == "work":
                    continue
                for number in range(-(-block.numel() // flat.distance)):
                    name = _MOMENTS.get(self._base, {}).get(part, f"{part}_{number}")
                    for tensor, view in enumerate(flat.split(block, number * flat.distance)):
                        state = self.state[flat.params[tensor]]
                        if state.get(name) is not None:
                            view.copy_(state[name])
                        state[name] = view
                        self._state_views.append((tensor, name, view, view.data_ptr(), block, number))
        small = self.state.get("polder")
        if small is None and self._base == "adamw":
            # The state of PyTorch's own AdamW counts steps for each parameter.
            steps = [int(self.state[param].pop("step", 0)) for param in flat.params]
            scalars, counters, attempts = engine.state()
            engine.set_state((scalars, [max(steps), *counters[1:]], attempts))
        if small is not None:
            if small["method"] != self._method["name"]:
                raise ValueError(f"the state is that of {small['method']}, not of {self._method['name']}")
            engine.set_state((small["scalars"], small["counters"], small["attempts"]))

    def _check_state(self) -> None:
        """Takes over state that somebody has replaced or removed since the last step."""
        flat = self._flat
        for number, (tensor, name, view, address, block, vector) in enumerate(self._state_views):
            state = self.state.get(flat.params[tensor])
            found = None if state is None else state.get(name)
            if found is view and found.data_ptr() == address:
                continue
            fresh = flat.split(block, vector * flat.distance)[tensor]
            if found is None:
                fresh.zero_()
            else:
                fresh.copy_(found)
            self.state[flat.params[tensor]][name] = fresh
            self._state_views[number] = (tensor, name, fresh, fresh.data_ptr(), block, vector)

    def _store_numbers(self) -> None:
        """Puts the numbers of the state beside the vectors."""
        if self._engine is not None:
            scalars, counters, attempts = self._engine.state()
            self.state["polder"] = {
                "method": self._method["name"], "scalars": scalars, "counters": counters, "attempts": attempts,
            }  # fmt: skip

    def _leave_point(self) -> None:
        """Drops a step that `first_step` has begun: the parameters are at the weights again."""
        if self._suspended is not None:
            self._suspended = None
            self._flat.point(self._weights.data_ptr())
            self._statistics.restore()

    def _release(self) -> None:
        """Forgets what was built; the next step builds it again and takes over the state."""
        self._store_numbers()
        self._clear()

    def _prepare(self) -> None:
        """Everything that may have changed since the last step."""
        flat = self._flat
        if self._engine is not None:
            trained = self._trained()
            if len(trained) != len(flat.params) or any(a is not b for a, b in zip(trained, flat.params)):
                self._release()
            elif flat.moved(self._weights.data_ptr()):
                if all(param.device == flat.device and param.dtype == flat.dtype for param in flat.params):
                    flat.adopt(self._weights)
                else:
                    self._release()
        if self._engine is None:
            self._build()
            return
        self._check_state()
        if place_of(flat.device)[1:] != self._place[1:] and flat.device.type == "cuda":
            raise RuntimeError("the optimizer was first used on another CUDA stream: use it on one stream")
        options = self._options()
        if options != self._given:
            self._engine.set_options(options)
            self._passes, self._given = self._engine.passes(), options

    def _groups(self) -> list[dict[str, Any]]:
        """The groups as the compiled half takes them."""
        groups, tensor, flat = [], 0, self._flat
        names = [name for name in _FUSED[self._base] if name != "lr"]
        for vectors in (False, True):
            for group in self.param_groups:
                count = sum(1 for param in group["params"] if param.requires_grad and _is_vector(param) == vectors)
                if count == 0:
                    continue
                start, end = flat.places[tensor][0], flat.places[tensor + count - 1][1]
                tensor += count
                numbers = {name: group[name] for name in names}
                groups.append({"start": start, "end": end, "lr": float(group["lr"]), **numbers})
        return groups

    # ---- Passes

    def _run(self, evaluate: Callable[..., Any], product: Callable[..., Any] | None) -> None:
        """A step of the compiled half. Whatever happens, the parameters are at the weights afterwards."""
        flat, weights = self._flat, self._weights.data_ptr()
        try:
            if self._direction is None:
                self._engine.step(weights, evaluate, product, self._groups())
            else:
                self._engine.direction(weights, self._direction.data_ptr(), evaluate, product)
        finally:
            flat.point(weights)
            self._statistics.restore()
        flat.changed()
        if self._direction is not None and not self._engine.skipped():
            for param, direction in zip(flat.params, flat.views(self._direction.data_ptr())):
                param.grad = direction
            self.base_optimizer.step()

    def _found_gradients(self, loss: Any, keep: list[Any]) -> tuple[list[int], bool]:
        """The gradients that the closure left, or those of the loss if it left none; and whether it left none."""
        flat = self._flat
        left_none = all(param.grad is None for param in flat.params)
        if left_none:
            if not (isinstance(loss, torch.Tensor) and loss.requires_grad):
                raise RuntimeError("the closure neither called backward nor returned a loss with a graph")
            # Not autograd.grad: DistributedDataParallel averages what backward finds.
            loss.backward()
        return flat.gradients([param.grad for param in flat.params], keep), left_none

    def _clear_gradients(self) -> None:
        for param in self._flat.params:
            param.grad = None

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, scaler: Any = None) -> Any:
        """One step. Calls the closure once for each pass, and returns what it answered at the weights.

        The closure computes the loss and its gradients: it zeroes the gradients, calls ``backward`` and returns the
        loss. It may call ``backward`` several times to accumulate gradients. Or it only returns the loss, and the
        gradients are taken here; methods with exact products of the Hessian need this form.

        With a ``torch.amp.GradScaler`` as ``scaler`` the closure calls ``scaler.scale(loss).backward()``, and
        ``scaler.update()`` follows this step.

        If a loss or a gradient of any pass is not finite, the step is skipped: weights and state keep their bits.
        """
        if getattr(self, "grad_scale", None) is not None:
            del self.grad_scale, self.found_inf
            raise RuntimeError("call step(closure, scaler=scaler) instead of scaler.step(optimizer, closure)")
        if self._suspended is not None:
            raise RuntimeError("first_step was called: call second_step, or first_step again")
        with self._alone():
            return self._step(closure, scaler)

    def _step(self, closure: Callable[[], Any] | None, scaler: Any) -> Any:
        self._prepare()
        if closure is None and self._passes != (1, 0):
            name = type(self).__name__
            raise RuntimeError(f"{name} needs a closure: step(closure), or first_step and second_step")
        answers: list[Any] = []
        memory = self._memory
        memory.begin()
        flat = self._flat

        def evaluate(weights: int, updates_statistics: bool, gradient: int) -> Any:
            keep = _Keep()
            flat.point(weights)
            if not updates_statistics:
                self._statistics.keep()
            if closure is None:
                if weights != self._weights.data_ptr():
                    raise RuntimeError(f"{type(self).__name__} takes no gradient at the weights: use step(closure)")
                return (0.0, 0, flat.gradients([param.grad for param in flat.params], keep), 0, keep, True)
            self._clear_gradients()
            first = not answers
            with torch.enable_grad(), self._no_sync() if first and self._no_sync is not None else nullcontext():
                loss = closure()
                answers.append(loss)
                number = flat.loss(loss, keep)
                addresses, unscaled = self._found_gradients(loss, keep)
            scale = 0 if unscaled else self._scale(scaler, keep)
            return (*number, addresses, scale, keep, memory.holds(addresses, keep))

        products: list[Any] = []

        def product(weights: int, direction: int) -> list[int]:
            products.clear()
            flat.point(weights)
            self._statistics.keep()
            self._clear_gradients()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                if torch.distributed.get_world_size() > 1:
                    raise RuntimeError("exact products with the Hessian are not averaged over several processes")
            with torch.enable_grad():
                loss = closure()
                if any(param.grad is not None for param in flat.params):
                    name = type(self).__name__
                    raise RuntimeError(
                        f"{name}'s exact products with the Hessian need a closure that returns the loss without "
                        "calling backward" + ("; or pass hvp='difference'" if self._method["name"] == "gnr" else "")
                    )
                return flat.gradients(_hessian_vector(loss, flat.params, flat.views(direction)), products)

        self._run(evaluate, product)
        memory.end()
        if scaler is not None and scaler.is_enabled():
            self._tell_scaler(scaler)
        return answers[0] if answers else None

    # ---- Mixed precision

    def _scale(self, scaler: Any, keep: list[Any]) -> int:
        """The address of the scale in double precision, or 0."""
        if scaler is None or not scaler.is_enabled() or scaler._scale is None:
            return 0
        scale = scaler._scale.detach().to(self._flat.device, torch.float64).reshape(1)
        keep.append(scale)
        return scale.data_ptr()

    def _tell_scaler(self, scaler: Any) -> None:
        """Tells the scaler whether something overflowed, so that its update lowers the scale."""
        state = scaler._per_optimizer_states[id(self)]
        found = torch.full((), float(self._engine.skipped()), dtype=torch.float32, device=self._flat.device)
        state["found_inf_per_device"] = {self._flat.device: found}

    # ---- Two calls instead of a closure

    def _two_passes(self) -> None:
        self._prepare()
        if self._passes != (2, 0):
            gradients, products = self._passes
            counted = f"{gradients} gradient{'s' if gradients > 1 else ''}" + (
                f" and {products} products with the Hessian" if products else ""
            )
            raise RuntimeError(f"{type(self).__name__} takes {counted} in a step: use step(closure)")

    @torch.compiler.disable
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Moves the parameters to the perturbed point, from the gradients that ``backward`` left at the weights.

        For methods of two gradients. The next ``backward`` is taken there, and ``second_step`` ends the step.
        """
        self._leave_point()
        with self._alone():
            self._first_step()
        if zero_grad:
            self.zero_grad()

    def _first_step(self) -> None:
        self._two_passes()
        flat, points = self._flat, []

        def evaluate(weights: int, updates_statistics: bool, gradient: int) -> Any:
            points.append(weights)
            if len(points) > 1:
                raise _Suspended
            if weights != self._weights.data_ptr():
                raise RuntimeError(f"{type(self).__name__} takes no gradient at the weights: use step(closure)")
            keep = _Keep()
            # The next backward may overwrite them, so they are copied.
            return (0.0, 0, flat.gradients([param.grad for param in flat.params], keep), 0, keep, False)

        try:
            self._run(evaluate, None)
        except _Suspended:
            self._statistics.keep()
            flat.point(points[1])
        # Without a second pass, as in most steps of LookSAM, the step is done.
        self._suspended = points[-1]

    @torch.compiler.disable
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Ends a step that ``first_step`` began, with the gradients at the perturbed point."""
        if self._suspended is None:
            raise RuntimeError("second_step without first_step")
        point, self._suspended = self._suspended, None
        flat = self._flat

        def evaluate(weights: int, updates_statistics: bool, gradient: int) -> Any:
            keep = _Keep()
            if weights != point:
                # The first gradient is still where it was gathered.
                return (0.0, 0, None, 0, keep, False)
            return (0.0, 0, flat.gradients([param.grad for param in flat.params], keep), 0, keep, True)

        if point != self._weights.data_ptr():
            with self._alone():
                self._run(evaluate, None)
        if zero_grad:
            self.zero_grad()

    # ---- State

    def telemetry(self) -> dict[str, float]:
        """The numbers of the newest step: loss, norm of the gradient, and those of the method. Waits for the device."""
        if self._engine is None:
            raise RuntimeError("there was no step yet")
        return self._engine.telemetry()

    def state_dict(self) -> dict[str, Any]:
        self._store_numbers()
        state = super().state_dict()
        if self.base_optimizer is not None:
            state["base_optimizer"] = self.base_optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        small = state_dict.get("state", {}).get("polder")
        if small is not None and small["method"] != self._method["name"]:
            raise ValueError(f"the state is that of {small['method']}, not of {self._method['name']}")
        if self._busy:
            raise RuntimeError("the optimizer is in use: by another thread, or by its own closure")
        self._leave_point()
        self._engine = None
        # Options that the state does not have, as that of another optimizer, stay as they are.
        groups = [
            {**{name: value for name, value in own.items() if name != "params"}, **loaded}
            for own, loaded in zip(self.param_groups, state_dict["param_groups"])
        ]
        if len(groups) == len(state_dict["param_groups"]):
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict({name: state_dict[name] for name in state_dict if name != "base_optimizer"})
        if self.base_optimizer is not None:
            self.base_optimizer.load_state_dict(state_dict["base_optimizer"])
            self.param_groups = self.base_optimizer.param_groups
        self._clear()

    def __getstate__(self) -> dict[str, Any]:
        self._store_numbers()
        own = {name: vars(self)[name] for name in ("_base", "_model", "_seed", "_loss_error", "_no_sync")}
        return {**super().__getstate__(), **own, "base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._busy = False
        self._clear()


def _hessian_vector(
    loss: torch.Tensor, params: list[torch.Tensor], direction: Iterable[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The product of the Hessian with a direction, by differentiating the gradient."""
    first = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    pairs = [
        (gradient, along)
        for gradient, along in zip(first, direction)
        if gradient is not None and gradient.requires_grad
    ]
    if not pairs:
        return [None] * len(params)
    outputs, along = zip(*pairs)
    return list(torch.autograd.grad(outputs, params, grad_outputs=along, allow_unused=True))


def _define(method: dict[str, Any]) -> type[SharpnessAware]:
    name = _SPELLING.get(method["name"]) or "".join(part.capitalize() for part in method["name"].split("-"))
    lines = [f"{method['summary']}, as a ``torch.optim.Optimizer``.", "", "Options of the method:", ""]
    for option in method["options"]:
        default = option["default"] if option["default"] is not None else option["otherwise"]
        words = f" ({', '.join(option['words'])})" if option["words"] else ""
        lines.append(f"- ``{option['name']}``: {option['help']}{words}; default {default}")
    gradients, products = method["gradients"], method["products"]
    passes = f"{gradients} gradient{'s' if gradients > 1 else ''}"
    passes += f" and {products} exact products with the Hessian" if products else ""
    lines += ["", f"A step takes {passes}."]
    return type(name, (SharpnessAware,), {"__doc__": "\n".join(lines), "__module__": __name__, "_method": method})


_CLASSES = {(made := _define(method)).__name__: made for method in _METHODS.values()}
globals().update(_CLASSES)

__all__ = ["SharpnessAware", *_CLASSES]
