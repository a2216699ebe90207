"""Made by tests/stubs.py."""

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

class SGD(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: Literal["sgd"] = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class AdamW(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: Literal["adamw"] = "adamw",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class Muon(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: Literal["muon"] = "muon",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class SAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.05,
        p_norm: Literal["2", "inf"] = "2",
        ascent_steps: int = 1,
        ascent_length: float | None = None,
        second_order: bool = False,
        perturb: Literal["all", "norm"] = "all",
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class ASAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.5,
        eta: float = 0.01,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class RandomSAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.05,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class RSAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.05,
        sigma: float = 0.05,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class GSAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.05,
        alpha: float = 0.1,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class LookSAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.05,
        alpha: float = 0.1,
        every: int = 5,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class FriendlySAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.05,
        sigma: float = 1.0,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class MSAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.3,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class WSAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.05,
        gamma: float = 0.9,
        sharpness: Literal["decoupled", "coupled"] = "decoupled",
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class CRSAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.1,
        alpha: float = 0.02,
        beta: float = 0.01,
        form: Literal["log", "released"] = "log",
        a_min: float = 1e-08,
        b_min: float = 1e-08,
        direction: Literal["gradient", "random"] = "gradient",
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class GNR(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.1,
        alpha: float = 0.1,
        hvp: Literal["exact", "difference"] = "exact",
        hvp_radius: float = 0.01,
        oracle: Literal["loss", "sam"] = "loss",
        oracle_rho: float = 0.05,
        every: int = 1,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class GAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.02,
        rho_norm: float = 0.2,
        beta0: float = 0.5,
        beta1: float = 0.6,
        gamma: float = 0.03,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class SASAM(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: Literal["sgd"] = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta: float = 0.02,
        eta0: float = 0.0001,
        theta0: float = ...,
        damping: float = 0.5,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class SASGD(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: Literal["sgd"] = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta: float = 0.02,
        eta0: float = 0.0001,
        theta0: float = ...,
        damping: float = 0.5,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class Sassha(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.2,
        every: int = 10,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...

class SAMPa(SharpnessAware):
    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
        base: _Base = "sgd",
        *,
        lr: float = 1e-3,
        momentum: float = ...,
        weight_decay: float = ...,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rho: float = 0.1,
        model: torch.nn.Module | None = None,
        seed: int = 0,
        loss_error: float | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        **base_options: Any,
    ) -> None: ...
