#!/usr/bin/env python3
"""The vector algebra of a SAM or CR-SAM step (norm, perturb, combine, momentum and decay, update), without any network.

    cargo build --release -p polder-peers
    python3 benches/peers/vector.py
    python3 benches/peers/vector.py --self       # PyTorch's forms alone

PyTorch works on the 62 parameter tensors of ResNet-18 (CIFAR stem, 11,173,962 values), and on one flat tensor. Its
users rarely have one flat tensor, but it is PyTorch's best case. One step of every form, and of ours, is first checked
against float64. Then all take turns. A ratio is PyTorch's time over ours within a turn. Buffers are random. They rotate
through `--sets` sets, because one set fits in the last-level cache of a large GPU.

`vector_peer --method sam|cr-sam --device cpu|cuda:N --threads T --params N` is our side, with rotating buffers of its
own. Its source describes the commands.
"""
import argparse
import json
import math
import pathlib
import random
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file, save_file
from torch.optim.sgd import sgd

import common
from common import A_MIN, ALPHA, B_MIN, BETA, LR, MOMENTUM, RHO, WEIGHT_DECAY

LOSSES = {"l0": 2.3, "l_plus": 2.45, "l_minus": 2.2}
VECTORS = ("w", "g0", "g_plus", "g_minus", "momentum")
# A perturbation of 1.5e-5 added to a float32 weight of 0.05 is rounded by 1e-9 rms, 1e-4 of the move. Three times that
# is allowed. PyTorch's float32 norm of 11 million values in one tensor has an error of 4e-4 on a CPU, so its forms are
# allowed more.
OUR_MOVE_LIMIT, PYTORCH_MOVE_LIMIT = 3e-4, 1e-3
# Bytes per parameter that a step must move if each of norm, perturb and update is one pass over memory.
LEAST_BYTES = {"sam": 4 + 12 + 20, "cr-sam": 4 + 16 + 28}

# ---- Input and the float64 answer -----------------------------------------------------------------


def make_input(count, seed):
    """Flat float32 vectors with magnitudes as in training, and three losses whose differences are well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    scales = {"w": 0.05, "g0": 0.01, "g_plus": 0.01, "g_minus": 0.01, "momentum": 0.02}
    values = {name: scales[name] * torch.randn(count, generator=generator) for name in VECTORS}
    return values | {name: torch.tensor([value]) for name, value in LOSSES.items()}


def expected(method, given):
    """One step in float64."""
    v = {name: value.double() for name, value in given.items()}
    step = RHO * v["g0"] / (v["g0"].norm() + 1e-12)
    answer, gradient = {"w_plus": v["w"] + step}, v["g_plus"]
    if method == "cr-sam":
        answer["w_minus"] = v["w"] - step
        a, b = v["l_plus"] + v["l_minus"] - 2 * v["l0"], v["l_plus"] - v["l_minus"]
        assert a > A_MIN and b > B_MIN
        curvature = v["g_plus"] + v["g_minus"] - 2 * v["g0"]
        gradient = gradient + ALPHA / a * curvature + BETA / b * (v["g_plus"] - v["g_minus"])
    answer["momentum"] = MOMENTUM * v["momentum"] + gradient + WEIGHT_DECAY * v["w"]
    answer["w"] = v["w"] - LR * answer["momentum"]
    return answer


def check(who, given, answer, reference, move_limit):
    """Exits unless every vector is right. The error of weights is relative to how far they moved."""
    if missing := sorted(reference.keys() - answer.keys()):
        sys.exit(f"{who}: no {', '.join(missing)} in the answer")
    errors = {}
    for name, right in reference.items():
        if answer[name].numel() != right.numel():
            sys.exit(f"{who}: {name} has {answer[name].numel()} values, {right.numel()} expected")
        scale = right.norm() if name == "momentum" else (right - given["w"].double()).norm()
        errors[name] = ((answer[name].flatten().double().cpu() - right).norm() / scale).item()
        # Momentum has no rounding of a small move. 1e-5 allows for A, a difference of float32 losses.
        limit = 1e-5 if name == "momentum" else move_limit
        if not errors[name] < limit:
            sys.exit(f"{who}: {name} differs from float64 by {errors[name]:.2e} (limit {limit:.0e})")
    return errors


# ---- PyTorch's forms ------------------------------------------------------------------------------


class Buffers:
    """A set of vectors, each as a list of the model's tensors (or of the one flat tensor) that are views of it."""

    def __init__(self, given, shapes):
        self.tensors = {}
        for name in VECTORS:
            pieces = given[name].split([math.prod(shape) for shape in shapes])
            self.tensors[name] = [piece.view(shape) for piece, shape in zip(pieces, shapes)]
        self.losses = [given[name].double().squeeze() for name in LOSSES]


def log_factors(l0, l_plus, l_minus):
    a, b = l_plus + l_minus - 2 * l0, l_plus - l_minus
    zero = torch.zeros_like(a)
    return torch.where(a > A_MIN, ALPHA / a, zero).float(), torch.where(b > B_MIN, BETA / b, zero).float()


def update(buffers, gradient, **form):
    sgd(buffers["w"], gradient, buffers["momentum"], weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, lr=LR, dampening=0.0,
        nesterov=False, maximize=False, **form)


def per_tensor(method, buffers, losses):
    """The common SAM code: a loop over the tensors, moved in place and restored by swapping in a saved copy."""
    g0, w = buffers["g0"], buffers["w"]
    scale = RHO / (torch.norm(torch.stack([g.norm(p=2) for g in g0]), p=2) + 1e-12)
    moved = {}
    old = [p.clone() for p in w]
    for p, g in zip(w, g0):
        p.add_(g * scale)
    moved["w_plus"], gradient = w, buffers["g_plus"]
    if method == "cr-sam":
        moved["w_minus"] = [p - g * scale for p, g in zip(old, g0)]
        a, b = log_factors(*losses)
        triples = zip(g0, buffers["g_plus"], buffers["g_minus"])
        gradient = [p + a * (p + m - 2 * g) + b * (p - m) for g, p, m in triples]
    buffers["w"] = old
    update(buffers, gradient, foreach=False, fused=False)
    return moved


def with_lists(method, buffers, losses, read_back, **form):
    """torch._foreach_* throughout. Reading the scale back saves passes over memory, but waits for a GPU."""
    g0, w = buffers["g0"], buffers["w"]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g0)))
    scale = RHO / (norm + 1e-12)
    gradient, moved = buffers["g_plus"], {}
    if read_back:
        scale = scale.item()
        moved["w_plus"] = torch._foreach_add(w, g0, alpha=scale)
        if method == "cr-sam":
            moved["w_minus"] = torch._foreach_add(w, g0, alpha=-scale)
            a, b = (factor.item() for factor in log_factors(*losses))
            gradient = torch._foreach_mul(gradient, 1 + a + b)
            torch._foreach_add_(gradient, buffers["g_minus"], alpha=a - b)
            torch._foreach_add_(gradient, g0, alpha=-2 * a)
    else:
        step = torch._foreach_mul(g0, scale)
        moved["w_plus"] = torch._foreach_add(w, step)
        if method == "cr-sam":
            moved["w_minus"] = torch._foreach_sub(w, step)
            a, b = log_factors(*losses)
            gradient = torch._foreach_mul(gradient, 1 + a + b)
            torch._foreach_add_(gradient, torch._foreach_mul(buffers["g_minus"], a - b))
            torch._foreach_add_(gradient, torch._foreach_mul(g0, -2 * a))
    update(buffers, gradient, **form)
    return moved


def foreach(method, buffers, losses):
    return with_lists(method, buffers, losses, False, foreach=True, fused=False)


def foreach_read_back(method, buffers, losses):
    return with_lists(method, buffers, losses, True, foreach=True, fused=False)


def fused(method, buffers, losses):
    """foreach for norm and perturbation, PyTorch's fused SGD kernel for the update."""
    return with_lists(method, buffers, losses, False, foreach=False, fused=True)


def fused_read_back(method, buffers, losses):
    return with_lists(method, buffers, losses, True, foreach=False, fused=True)


def plain_vector(method, w, g0, g_plus, g_minus, momentum, losses):
    """The formulas on one flat vector, for torch.compile to fuse."""
    step = g0 * (RHO / (torch.linalg.vector_norm(g0) + 1e-12))
    moved, gradient = {"w_plus": w + step}, g_plus
    if method == "cr-sam":
        moved["w_minus"] = w - step
        a, b = log_factors(*losses)
        gradient = g_plus + a * (g_plus + g_minus - 2 * g0) + b * (g_plus - g_minus)
    momentum.mul_(MOMENTUM).add_(gradient + WEIGHT_DECAY * w)
    w.sub_(LR * momentum)
    return moved


def make_compiled():
    compiled_vector = torch.compile(plain_vector)

    def compiled(method, buffers, losses):
        moved = compiled_vector(method, *(buffers[name][0] for name in VECTORS), losses)
        return {name: [value] for name, value in moved.items()}

    return compiled


class Form:
    """A form over its rotating sets of buffers."""

    def __init__(self, name, method, step, shapes, sets, device):
        self.name, self.method, self.step, self.device = name, method, step, device
        self.shapes, self.turn = shapes, 0
        self.sets = [Buffers(given, shapes) for given in sets]

    @torch.no_grad()
    def run(self, count):
        common.synchronise(self.device)
        start = time.perf_counter()
        for _ in range(count):
            chosen = self.sets[self.turn]
            self.turn = (self.turn + 1) % len(self.sets)
            self.step(self.method, chosen.tensors, chosen.losses)
        common.synchronise(self.device)
        return time.perf_counter() - start

    @torch.no_grad()
    def answer(self, given):
        chosen = Buffers({name: value.to(self.device, copy=True) for name, value in given.items()}, self.shapes)
        moved = self.step(self.method, chosen.tensors, chosen.losses)
        values = moved | {"w": chosen.tensors["w"], "momentum": chosen.tensors["momentum"]}
        return {name: torch.cat([t.flatten() for t in tensors]) for name, tensors in values.items()}


def make_forms(method, shapes, sets, arguments, device):
    """All forms, over the same buffers."""
    flat = [(sum(math.prod(shape) for shape in shapes),)]
    forms = [
        ("per-tensor", per_tensor, shapes), ("foreach", foreach, shapes),
        ("foreach, scale read back", foreach_read_back, shapes), ("fused", fused, shapes),
        ("fused, scale read back", fused_read_back, shapes),
        ("flat, fused", fused, flat), ("flat, fused, scale read back", fused_read_back, flat),
    ]
    if arguments.compile:
        forms.append(("flat, torch.compile", make_compiled(), flat))
    return [Form(name, method, step, layout, sets, device) for name, step, layout in forms]


# ---- The comparison -------------------------------------------------------------------------------


def copy_bandwidth(device):
    """Bytes read plus bytes written per second by torch's copy of 256 MiB: best of ten."""
    source, target = torch.randn(2**26, device=device), torch.empty(2**26, device=device)
    best = math.inf
    for _ in range(10):
        common.synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        common.synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def compare(arguments, device, method):
    shapes = [tuple(p.shape) for p in common.MODELS["resnet18"]().parameters()]
    params = sum(math.prod(shape) for shape in shapes)
    sets = [{name: v.to(device) for name, v in make_input(params, seed).items()} for seed in range(arguments.sets)]
    forms = make_forms(method, shapes, sets, arguments, device)
    given = make_input(params, 99)
    reference = expected(method, given)
    for form in forms:
        check(form.name, given, form.answer(given), reference, PYTORCH_MOVE_LIMIT)
    result = {"method": method, "params": params}
    if not arguments.self:
        peer = common.Peer(
            arguments.binary, "--method", method, "--device", arguments.device, "--threads", arguments.threads,
            "--params", params,
        )
        with tempfile.TemporaryDirectory() as folder:
            source, target = pathlib.Path(folder) / "in.safetensors", pathlib.Path(folder) / "out.safetensors"
            save_file(given, source)
            peer.ask("check", source, target)
            result["errors"] = check("ours", given, load_file(target), reference, OUR_MOVE_LIMIT)
    contenders = {form.name: form.run for form in forms}
    if not arguments.self:
        contenders["ours"] = lambda count: peer.ask("steps", count)["seconds"]
    counts, times = {}, {name: [] for name in contenders}
    for name, run in contenders.items():
        run(arguments.sets)
        counts[name] = max(1, round(arguments.seconds / (run(3) / 3)))
    shuffled, order = list(contenders), random.Random(1)
    for _ in range(arguments.rounds):
        order.shuffle(shuffled)
        for name in shuffled:
            times[name].append(contenders[name](counts[name]) / counts[name])
    result["seconds"] = {name: common.spread(values) for name, values in times.items()}
    result["best_form"] = min((form.name for form in forms), key=lambda name: result["seconds"][name]["median"])
    if not arguments.self:
        peer.quit()
        ratios = {form.name: [t / o for t, o in zip(times[form.name], times["ours"])] for form in forms}
        result["ratios"] = {name: common.spread(values) for name, values in ratios.items()}
    return result


def show(result):
    method = result["method"]
    least = LEAST_BYTES[method] * result["params"]
    print(f"{method}: milliseconds per step; GB/s counts the least traffic, {LEAST_BYTES[method]} bytes per parameter")
    for name, seconds in result["seconds"].items():
        line = f"  {name:30} {1e3 * seconds['median']:8.3f} ({1e3 * seconds['min']:.3f}-{1e3 * seconds['max']:.3f})"
        line += f"  {least / seconds['median'] / 1e9:7.1f} GB/s"
        if name in result.get("ratios", {}):
            ratio = result["ratios"][name]
            line += f"   ours is {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) times as fast"
        print(line + ("   <- best of PyTorch" if name == result["best_form"] else ""), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sam", "cr-sam"], choices=LEAST_BYTES)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.3, help="approximate length of one turn of one form")
    parser.add_argument("--sets", type=int, default=3, help="sets of buffers to rotate through")
    parser.add_argument("--compile", action="store_true", help="also the flat vector under torch.compile")
    parser.add_argument("--binary", help="our side; default: vector_peer under target/release")
    parser.add_argument("--self", action="store_true", help="PyTorch alone")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    common.prepare(device, arguments.threads)
    if not arguments.self:
        arguments.binary = common.find_binary("vector_peer", arguments.binary)

    machine, bandwidth = common.describe(device, arguments.threads), copy_bandwidth(device)
    print(f"{machine}; {arguments.rounds} rounds; torch copies at {bandwidth / 1e9:.1f} GB/s (read plus write)")
    results = []
    for method in arguments.methods:
        results.append(compare(arguments, device, method))
        show(results[-1])
    if arguments.json:
        answer = {"machine": machine, "copy_bytes_per_s": bandwidth, "results": results}
        arguments.json.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
