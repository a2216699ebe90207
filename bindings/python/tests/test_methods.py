"""Five steps of every method on a ResNet-8 against plain PyTorch code in double precision.

The reference is `tests/fixtures/methods.py`, which writes each method from its formula. The same code in single
precision says what error single precision has: the package's may be twice as large.
"""

import copy

import methods as reference
import pytest
import torch
from models import images, resnet8
from torch import nn
from torch.func import functional_call

import polder.torch
from polder import _polder

STEPS = 5

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False}
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.05}
MUON = {"lr": 1e-2, "momentum": 0.95, "weight_decay": 0.1}
# The reference's numbers for what is no matrix.
REST = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
SAM = {"rho": 0.05, "ascent_steps": 1, "second_order": False}
GNR = {"rho": 0.1, "alpha": 0.1, "every": 1, "oracle_rho": None}
WSAM = {"rho": 0.05, "gamma": 0.7}
OWN_RATE = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": False, "theta0": 1.0}

# Class, options of the package, base, settings of the reference.
RUNS = {
    "sgd": ("SGD", {}, SGD, {}),
    "sgd-nesterov": ("SGD", {}, {**SGD, "nesterov": True}, {}),
    "adamw": ("AdamW", {}, ADAMW, {}),
    "sam": ("SAM", {"rho": 0.05}, SGD, SAM),
    "sam-adamw": ("SAM", {"rho": 0.05}, ADAMW, SAM),
    "muon": ("Muon", {}, MUON, REST),
    "sam-muon": ("SAM", {"rho": 0.05}, MUON, {**SAM, **REST}),
    "sassha": (
        "Sassha",
        {"rho": 0.2, "every": 2, "seed": 6},
        {**SGD, "momentum": 0.0},
        {"rho": 0.2, "every": 2, "seed": _polder.direction_seed(6)},
    ),
    "sampa": ("SAMPa", {"rho": 0.1, "lambda": 0.2}, SGD, {"rho": 0.1, "lambda": 0.2}),
    "sam-3-steps": ("SAM", {"rho": 0.05, "ascent_steps": 3}, SGD, {**SAM, "ascent_steps": 3}),
    "sam-second-order": ("SAM", {"rho": 0.05, "second_order": True}, SGD, {**SAM, "second_order": True}),
    "sam-on": ("SAM", {"rho": 0.5, "perturb": "norm"}, SGD, {**SAM, "rho": 0.5, "perturb": "norm"}),
    "asam": ("ASAM", {"rho": 0.5, "eta": 0.01}, SGD, {"rho": 0.5, "eta": 0.01}),
    "random-sam": ("RandomSAM", {"rho": 1.0, "seed": 3}, SGD, {"rho": 1.0, "seed": 3}),
    "r-sam": ("RSAM", {"rho": 0.05, "sigma": 1.0, "seed": 4}, SGD, {"rho": 0.05, "sigma": 1.0, "seed": 4}),
    "gsam": ("GSAM", {"rho": 0.05, "alpha": 0.1}, SGD, {"rho": 0.05, "alpha": 0.1}),
    "looksam": ("LookSAM", {"rho": 0.05, "alpha": 0.7, "every": 2}, SGD, {"rho": 0.05, "alpha": 0.7, "every": 2}),
    "friendly-sam": ("FriendlySAM", {"rho": 0.2, "lambda": 0.9}, SGD, {"rho": 0.2, "sigma": 1.0, "lambda": 0.9}),
    "wsam": ("WSAM", {**WSAM, "sharpness": "decoupled"}, SGD, {**WSAM, "sharpness": "decoupled"}),
    "wsam-adamw": ("WSAM", {**WSAM, "sharpness": "decoupled"}, ADAMW, {**WSAM, "sharpness": "decoupled"}),
    "wsam-coupled": ("WSAM", {**WSAM, "sharpness": "coupled"}, SGD, {**WSAM, "sharpness": "coupled"}),
    "msam": ("MSAM", {"rho": 0.3}, SGD, {"rho": 0.3}),
    "msam-adamw": ("MSAM", {"rho": 1.0}, ADAMW, {"rho": 1.0}),
    "cr-sam": (
        "CRSAM",
        {"rho": 0.2, "alpha": 0.02, "beta": 0.01, "loss_error": 0.0},
        {**SGD, "lr": 0.02},
        {"rho": 0.2, "alpha": 0.02, "beta": 0.01, "a_min": 1e-8, "b_min": 1e-8, "form": "log"},
    ),
    "cr-sam-random": (
        "CRSAM",
        {"rho": 3.0, "alpha": 1.0, "beta": 1.0, "form": "released", "direction": "random", "seed": 5},
        SGD,
        {"rho": 3.0, "alpha": 1.0, "beta": 1.0, "form": "released", "direction": "random", "seed": 5},
    ),
    "gnr": ("GNR", {"rho": 0.1, "alpha": 0.1}, SGD, GNR),
    "gnr-difference": ("GNR", {"rho": 0.1, "alpha": 0.1, "hvp": "difference"}, SGD, {**GNR, "radius": 0.01}),
    "gam": (
        "GAM",
        {"rho": 0.02, "rho_norm": 0.2},
        SGD,
        {"rho": 0.02, "rho_norm": 0.2, "beta0": 0.5, "beta1": 0.6, "gamma": 0.03},
    ),
    "sa-sgd": ("SASGD", {"eta0": 0.03, "delta": 1.0, "theta0": 1.0}, OWN_RATE, {"eta0": 0.03, "delta": 1.0}),
    "sa-sam": ("SASAM", {"eta0": 0.1, "delta": 0.02, "theta0": 1.0}, OWN_RATE, {"eta0": 0.1, "delta": 0.02}),
}
NEEDS_GRAPH = {"sam-second-order", "gnr", "sassha"}
RANDOM = {"random-sam", "r-sam", "cr-sam-random"}


class Objective:
    """The loss of a batch as a function of named weights, as the reference calls it."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.first = True

    def loss(self, w):
        # The first pass updates the statistics of the model itself, later ones those of a copy.
        buffers = dict(self.model.named_buffers()) if self.first else copy.deepcopy(dict(self.model.named_buffers()))
        self.first = False
        logits = functional_call(self.model, {**w, **buffers}, (self.batch[0],))
        return nn.functional.cross_entropy(logits, self.batch[1])

    def __call__(self, w):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in w.items()}
        loss = self.loss(leaves)
        return loss.double().item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

    def hessian_vector(self, w, direction):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in w.items()}
        gradient = torch.autograd.grad(self.loss(leaves), list(leaves.values()), create_graph=True)
        product = torch.autograd.grad(gradient, list(leaves.values()), list(direction.values()))
        return dict(zip(leaves, product))


def drawn(w, draw):
    """As the reference's, in the order of the package: matrices first, each tensor at a multiple of 64."""
    order = sorted(w, key=lambda name: w[name].dim() < 2)
    places, end = {}, 0
    for name in order:
        start = -(-end // 64) * 64
        end = start + w[name].numel()
        places[name] = slice(start, end)
    z = draw(end)
    return {name: z[places[name]].reshape(w[name].shape).to(w[name].dtype) for name in w}


def random_direction(w, seed, step):
    """As the reference's, over the elements of the package alone."""
    key = _polder.direction_seed(seed)

    def draw(end):
        blocks = -(-end // 4)
        words = reference.philox(key, step * blocks, blocks).astype("f8").reshape(-1, 2)
        radius, angle = (-2 * torch.log(torch.from_numpy((words[:, 0] + 1) / 2**32))).sqrt(), words[:, 1] / 2**32
        angle = 2 * torch.pi * torch.from_numpy(angle)
        z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).ravel()[:end]
        return z / z.norm()

    return drawn(w, draw)


def run_reference(name, dtype, batches):
    _, _, base, settings = RUNS[name]
    method = name.removesuffix("-nesterov").removesuffix("-difference").removesuffix("-coupled")
    method = method.removesuffix("-adamw").removesuffix("-muon")
    method = "cr-sam" if method.startswith("cr-sam") else method
    method = "sam" if method.startswith("sam") and method != "sampa" else method
    model = resnet8(dtype=dtype)
    w = {key: value.detach().clone() for key, value in model.named_parameters()}
    run = {"lr": None, "decay_norm": True, "optimizer": method, **base, **settings}
    step_of = reference.METHODS.get(
        method, lambda objective, w, run, memory: reference.g.final_gradient(objective, w, run)
    )
    state, losses = {}, []
    memory = {"base": state}
    for inputs, targets in batches:
        objective = Objective(model, (inputs.to(dtype), targets))
        gradient, scalars = step_of(objective, w, run, memory)
        update = reference.g.BASES["adamw" if base is ADAMW else "muon" if base is MUON else "sgd"]
        w = update(w, gradient, state, {**run, "lr": scalars.get("eta", run["lr"])})
        if "beside" in memory:
            w = reference.along(w, -run["lr"], memory.pop("beside"))
        losses.append(scalars["loss"])
    return w, dict(model.named_buffers()), losses


def run_package(name, dtype, batches):
    cls, options, base, _ = RUNS[name]
    model = resnet8(dtype=dtype)
    base = dict(base)
    base.pop("theta0", None)
    kind = {}
    if base.get("beta1"):
        base["betas"] = (base.pop("beta1"), base.pop("beta2"))
        kind = {"base": "adamw"} if cls != "AdamW" else {}
    if base == MUON and cls != "Muon":
        kind = {"base": "muon"}
    optimizer = getattr(polder.torch, cls)(model.parameters(), **kind, **base, **options)
    losses = []
    for inputs, targets in batches:

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs.to(dtype)), targets)
            if name not in NEEDS_GRAPH:
                loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert optimizer.telemetry()["skipped"] == 0
    return dict(model.named_parameters()), dict(model.named_buffers()), losses


def error(found, expected):
    """The norm of the difference relative to that of the reference, over all tensors."""
    pairs = [(found[name].detach().double(), expected[name].double()) for name in expected]
    return (sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)).sqrt().item()


def moved(w, start):
    return {name: w[name].detach().double() - start[name].double() for name in start}


@pytest.mark.parametrize("name", RUNS)
def test_five_steps(name, monkeypatch):
    monkeypatch.setattr(reference, "random_direction", random_direction)
    monkeypatch.setattr(reference, "drawn", lambda w, draw: drawn(w, lambda end: draw(-(-end // 4) * 4)[:end]))
    # A closure knows its own batch alone, so both gradients of SAMPa are on that.
    batches = [images(8, seed=10 + (0 if name == "sampa" else step)) for step in range(STEPS)]
    start = {key: value.detach() for key, value in resnet8(dtype=torch.float64).named_parameters()}
    expected, buffers, losses = run_reference(name, torch.float64, batches)
    expected = moved(expected, start)

    found, found_buffers, found_losses = run_package(name, torch.float64, batches)
    # Differences of gradients and losses lose digits: CR-SAM and GNR divide by them. Normal numbers are computed in
    # single precision in either type.
    assert error(moved(found, start), expected) < (1e-7 if name in RANDOM else 1e-9)
    assert error(found_buffers, buffers) < (1e-7 if name in RANDOM else 1e-12)
    assert found_losses == pytest.approx(losses, rel=1e-7 if name in RANDOM else 1e-10)

    single_start = {key: value.detach() for key, value in resnet8(dtype=torch.float32).named_parameters()}
    ours, our_buffers, _ = run_package(name, torch.float32, batches)
    our_error, their_errors, buffer_errors = error(moved(ours, single_start), expected), [], []
    # Rounding is a matter of luck: the reference gets three orders of the images.
    for order in (torch.arange(8), torch.arange(8).flip(0), torch.arange(8).roll(3)):
        shuffled = [(inputs[order], targets[order]) for inputs, targets in batches]
        theirs, their_buffers, _ = run_reference(name, torch.float32, shuffled)
        their_errors.append(error(moved(theirs, single_start), expected))
        buffer_errors.append(error(their_buffers, buffers))
    their_error = max(their_errors)
    print(f"{name}: error {our_error:.1e}, of plain PyTorch {their_error:.1e}")
    assert our_error <= 2 * their_error, f"{our_error:.2e} against {their_error:.2e}"
    assert error(our_buffers, buffers) <= 2 * max(buffer_errors)
