#!/usr/bin/env python3
"""Whole training steps (SGD, SAM, CR-SAM) of residual networks and vision transformers: PyTorch and ours take turns.

    cargo build --release -p polder-peers
    python3 benches/peers/pytorch.py
    python3 benches/peers/pytorch.py --self --models resnet8      # PyTorch's forms alone

For each model and method the gradients of both sides are compared first. If they differ, nothing is timed (exit
status 1). A ReLU input that is zero within float32 rounding can fall on either side, and each such input changes the
gradient: on the timed batches PyTorch's two memory formats differ from each other by 1e-3 to 4e-3. So the sharp
comparison (1e-3) uses a few images whose ReLU inputs are all clear of zero, and the timed batch has a wider limit
(2e-2). ResNet-56 has too many ReLU inputs to find such images. With --precision f16 or bf16 PyTorch runs under
autocast, in f16 with a scaled loss, and the limits are wider for the same reason.

All of PyTorch's forms are tried: contiguous or channels_last, per-parameter or foreach SAM, each of its SGD
implementations, eager or with the model compiled; on a GPU also with the whole step as one CUDA graph. With --precision
f32 on a CPU, PyTorch also runs in bf16 and TF32 inside its convolutions alone, and in bf16 under autocast. A form that
PyTorch refuses is left out and named. Four go on to the comparison: the fastest of those that people usually write
(per-parameter SAM, eager), the fastest eager form, the fastest in our precision, which runs twice to show the noise,
and the fastest of all. In each round all of them and ours take a turn on the same batch, in a new random order. Ratios
are taken within a round, so that other load on the machine affects both sides.

`step_peer` is our side; its source describes the options and the commands.
"""
import argparse
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import common
from common import A_MIN, ALPHA, B_MIN, BETA, RHO

# Largest relative L2 error of the gradient: on the images without kinks, and on the timed batch.
SHARP_LIMIT, TIMED_LIMIT = 1e-3, 2e-2
LOSS_LIMIT = 1e-4
# In 16 bits the share of ReLUs that switch is about the rounding error; the gradient's error is about its square root.
NARROW_LIMIT = {"f16": 0.05, "bf16": 0.2, "tf32": 0.05, "bf16x3": 0.02}
# Our bf16 against PyTorch's f32: its own bf16 autocast is 0.28 away on two images of a ResNet-18.
ACROSS_LIMIT = {**NARROW_LIMIT, "bf16": 0.4}
AUTOCAST = {"f16": torch.float16, "bf16": torch.bfloat16}
LOSS_SCALE = 65536.0
# Float32 noise at the input of the k-th ReLU is about 1.25e-7 k (rms) in these networks. This is six times that.
KINK_MARGIN = 7.5e-7
# The search for images without kinks starts here: the first seed that works with PyTorch 2.11's generator.
FIRST_SEED = {"resnet8": 100, "resnet20": 109, "resnet18": 163}


class Step:
    """One training step in PyTorch, as its users write it. Subclasses compute the gradient."""

    def __init__(self, model, optimizer, precision="f32"):
        self.model, self.parameters = model, list(model.parameters())
        self.device_type, self.dtype = self.parameters[0].device.type, AUTOCAST.get(precision)
        self.scale_of_loss = LOSS_SCALE if precision == "f16" else 1.0
        self.norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        # Graphs that torch.compile records refer to the weights by address, and reuse the memory of their results in
        # the next pass. So weights are moved in place, and gradients that are needed later are copied.
        self.in_place = False
        self.optimizer = torch.optim.SGD(
            self.parameters, common.LR, common.MOMENTUM, weight_decay=common.WEIGHT_DECAY, **optimizer
        )

    def backward(self, x, y):
        """Returns the loss of a pass; its gradients replace those in `.grad`."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.in_place:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            loss = F.cross_entropy(self.model(x).float(), y)
        (loss * self.scale_of_loss).backward()
        if self.scale_of_loss != 1.0:
            torch._foreach_mul_([p.grad for p in self.parameters], 1.0 / self.scale_of_loss)
        return loss.detach().clone() if self.in_place else loss.detach()

    def weights(self):
        """The weights, to which `move_to` returns."""
        values = [p.data for p in self.parameters]
        return [value.clone() for value in values] if self.in_place else values

    def move_to(self, weights):
        if self.in_place:
            with torch.no_grad():
                torch._foreach_copy_([p.data for p in self.parameters], weights)
            return
        for p, value in zip(self.parameters, weights):
            p.data = value

    def gradients(self):
        """The gradients, which outlast the next pass."""
        gradients = [p.grad for p in self.parameters]
        return [gradient.clone() for gradient in gradients] if self.in_place else gradients

    def freeze_running_statistics(self, frozen):
        for norm in self.norms:
            norm.momentum = 0.0 if frozen else 0.1


class Sgd(Step):
    def __call__(self, x, y):
        self.backward(x, y)
        self.optimizer.step()


class SamPerParameter(Step):
    """The common implementation: a loop over the parameters, which are moved and restored."""

    @torch.no_grad()
    def scale(self):
        norms = torch.stack([p.grad.norm(p=2) for p in self.parameters])
        return RHO / (torch.norm(norms, p=2) + 1e-12)

    def __call__(self, x, y):
        self.backward(x, y)
        scale, old = self.scale(), []
        with torch.no_grad():
            for p in self.parameters:
                old.append(p.data.clone())
                p.add_(p.grad * scale)
        self.freeze_running_statistics(True)
        self.backward(x, y)
        self.freeze_running_statistics(False)
        for p, value in zip(self.parameters, old):
            p.data = value
        self.optimizer.step()


def foreach_direction(gradients):
    """rho g / (|g| + 1e-12), in a few calls for all tensors."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return torch._foreach_mul(gradients, RHO / (norm + 1e-12))


class SamForeach(Step):
    def __call__(self, x, y):
        self.backward(x, y)
        with torch.no_grad():
            old, direction = self.weights(), foreach_direction([p.grad for p in self.parameters])
            if self.in_place:
                torch._foreach_add_([p.data for p in self.parameters], direction)
            else:
                self.move_to(torch._foreach_add(old, direction))
        self.freeze_running_statistics(True)
        self.backward(x, y)
        self.freeze_running_statistics(False)
        self.move_to(old)
        self.optimizer.step()


def log_factors(l0, l_plus, l_minus):
    """alpha/A and beta/B without reading anything back to the host; zero where the term is dropped."""
    l0, l_plus, l_minus = l0.double(), l_plus.double(), l_minus.double()
    a, b = l_plus + l_minus - 2 * l0, l_plus - l_minus
    zero = torch.zeros_like(a)
    return torch.where(a > A_MIN, ALPHA / a, zero).float(), torch.where(b > B_MIN, BETA / b, zero).float()


class CrSam(Step):
    """The three passes of CR-SAM (log form). Subclasses do the algebra on the parameters."""

    def __call__(self, x, y):
        l0 = self.backward(x, y)
        old, g0 = self.weights(), self.gradients()
        with torch.no_grad():
            plus, minus = self.perturbed(old, g0)
        self.freeze_running_statistics(True)
        l_plus, g_plus = self.pass_at(plus, x, y)
        l_minus, g_minus = self.pass_at(minus, x, y)
        self.freeze_running_statistics(False)
        with torch.no_grad():
            combined = self.combined(g0, g_plus, g_minus, *log_factors(l0, l_plus, l_minus))
        self.move_to(old)
        for p, gradient in zip(self.parameters, combined):
            p.grad = gradient
        self.optimizer.step()

    def pass_at(self, weights, x, y):
        self.move_to(weights)
        return self.backward(x, y), self.gradients()


class CrSamPerParameter(CrSam):
    def perturbed(self, w, g0):
        scale = RHO / (torch.norm(torch.stack([g.norm(p=2) for g in g0]), p=2) + 1e-12)
        directions = [g * scale for g in g0]
        return [p + e for p, e in zip(w, directions)], [p - e for p, e in zip(w, directions)]

    def combined(self, g0, g_plus, g_minus, a, b):
        return [p + a * (p + m - 2 * g) + b * (p - m) for g, p, m in zip(g0, g_plus, g_minus)]


class CrSamForeach(CrSam):
    def perturbed(self, w, g0):
        direction = foreach_direction(g0)
        return torch._foreach_add(w, direction), torch._foreach_sub(w, direction)

    def combined(self, g0, g_plus, g_minus, a, b):
        # (1 + a + b) g+ + (a - b) g- - 2a g0
        result = torch._foreach_mul(g_plus, 1 + a + b)
        torch._foreach_add_(result, torch._foreach_mul(g_minus, a - b))
        torch._foreach_add_(result, torch._foreach_mul(g0, -2 * a))
        return result


OPTIMIZERS = {
    "loop SGD": {"foreach": False}, "foreach SGD": {"foreach": True}, "fused SGD": {"fused": True},
}
STEPS = {
    "sgd": {"": Sgd},
    "sam": {"per-parameter SAM, ": SamPerParameter, "foreach SAM, ": SamForeach},
    "cr-sam": {"per-parameter CR-SAM, ": CrSamPerParameter, "foreach CR-SAM, ": CrSamForeach},
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


# How a step is run: the mode of torch.compile, and whether the step is captured. Only a GPU has graphs.
WAYS = {
    "eager": (None, False), "compiled": ("default", False), "graph": (None, True),
    "reduce-overhead": ("reduce-overhead", False), "max-autotune": ("max-autotune-no-cudagraphs", False),
    "max-autotune-graph": ("max-autotune-no-cudagraphs", True),
}
USUAL_WAYS = {
    "cpu": ["eager", "compiled", "max-autotune"],
    "cuda": ["eager", "graph", "reduce-overhead", "max-autotune", "max-autotune-graph"],
}
# On a CPU with f32 weights, PyTorch can compute convolutions in bf16 or TF32, or run the whole model under autocast.
INSIDE = {"bf16 inside": "bf16", "tf32 inside": "tf32"}
AUTOCASTED = "bf16 autocast"


def arithmetics(device, precision):
    """What PyTorch computes in where our side has this precision; the first is the same."""
    return [precision, *INSIDE, AUTOCASTED] if (device, precision) == ("cpu", "f32") else [precision]


def forms(method, ways, computed):
    """(name, memory format, step class, SGD options, mode of torch.compile, captured, arithmetic) of every form
    tried."""
    for format_name, memory_format in FORMATS.items():
        for step_name, step in STEPS[method].items():
            for optimizer_name, options in OPTIMIZERS.items():
                for way in ways:
                    for arithmetic in computed:
                        name = f"{step_name}{optimizer_name}, {format_name}, {arithmetic}, {way}"
                        # The plainest forms are tried in eager mode and in our precision alone. On a CPU, where
                        # compiling takes longest, compiled and bf16 forms have one SGD.
                        plain = "per-parameter" in name or "loop SGD" in name
                        is_other = way != "eager" or arithmetic != computed[0]
                        if is_other and (plain or "compiled" in ways and "fused" not in name):
                            continue
                        yield name, memory_format, step, options, *WAYS[way], arithmetic


def is_eager(name):
    return name.endswith(", eager")


def is_narrow_instead(name):
    """Whether it computes in fewer bits although the comparison is in f32."""
    return any(word in name for word in [*INSIDE, AUTOCASTED])


def is_as_written(name):
    """Whether it is the usual code: a loop over the parameters, around SGD in the form that PyTorch chooses."""
    return is_eager(name) and not any(word in name for word in ("foreach SAM", "foreach CR-SAM", "fused"))


def make_batch(batch_size, seed):
    """Smooth u8 images (N, H, W, C) and labels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 120 + 50 * torch.randn(batch_size, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, size=(32, 32), mode="bilinear").round().clamp(0, 255).to(torch.uint8)
    labels = torch.randint(0, common.CLASSES, (batch_size,), generator=generator)
    return images.permute(0, 2, 3, 1).contiguous(), labels


class Problem:
    """A model's initial weights and one batch, normalised and on the device."""

    def __init__(self, model_name, batch_size, device, seed=5, precision="f32"):
        torch.manual_seed(1)
        self.precision = precision
        self.device, self.batch_size = device, batch_size
        self.model_name, model = model_name, common.MODELS[model_name]()
        self.weights = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
        self.images, self.labels = make_batch(batch_size, seed)
        x = self.images.permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(common.MEAN)[:, None, None]) / torch.tensor(common.STD)[:, None, None]
        self.x, self.y = x.contiguous().to(device), self.labels.to(device)

    def model(self, memory_format=torch.contiguous_format):
        model = common.MODELS[self.model_name]()
        model.load_state_dict(self.weights, strict=False)
        return model.to(self.device, memory_format=memory_format).train()

    def is_clear_of_kinks(self):
        """Whether every ReLU input is further from zero than float32 noise."""
        margins = []

        def measure(module, inputs):
            margins.append(inputs[0].abs().min().item() / (KINK_MARGIN * (len(margins) + 1)))

        model = self.model()
        for module in model.modules():
            if isinstance(module, torch.nn.ReLU):
                module.register_forward_pre_hook(measure)
        with torch.no_grad():
            model(self.x)
        return min(margins) > 1

    def gradient(self):
        model = self.model()
        loss = Sgd(model, {}, self.precision).backward(self.x, self.y)
        return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}

    def write(self, folder):
        weights, images = folder / f"{self.model_name}.safetensors", folder / f"images-{self.batch_size}.safetensors"
        save_file(self.weights, weights)
        save_file({"images": self.images, "labels": self.labels}, images)
        return weights, images


class Runner:
    """A form of a method, ready to run: `run(n)` takes n steps and returns the seconds."""

    def __init__(self, problem, memory_format, step, options, compiled=None, captured=False, arithmetic="f32"):
        self.device, self.inside = problem.device, INSIDE.get(arithmetic, "ieee")
        x, y = problem.x.contiguous(memory_format=memory_format), problem.y
        precision = {AUTOCASTED: "bf16"}.get(arithmetic, "f32" if arithmetic in INSIDE else arithmetic)
        step = step(problem.model(memory_format), options, precision)
        if compiled:
            # All forms share the code of their model's class, and behind this limit it would run in eager mode.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
            step.model = torch.compile(step.model, mode=compiled)
            step.in_place = compiled == "reduce-overhead"
        self.step = lambda: step(x, y)
        if captured:
            # The first calls allocate the momentum, compile, and choose algorithms. This must come before the capture.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(x, y)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(x, y)
            self.step = graph.replay

    def run(self, count):
        # This setting is the process's. It says what f32 convolutions compute in.
        torch.backends.mkldnn.conv.fp32_precision = self.inside
        common.synchronise(self.device)
        start = time.perf_counter()
        for _ in range(count):
            self.step()
        common.synchronise(self.device)
        return time.perf_counter() - start


def contenders(problem, method, ways, seconds, pattern):
    """Tries every form whose name matches the pattern, twice for about `seconds`. Returns those that go on as
    {role: (name, runner)}, and the images per second of all forms."""
    runners, best = {}, {}
    computed = arithmetics(problem.device.type, problem.precision)
    tried = {name: form for name, *form in forms(method, ways, computed) if re.search(pattern, name)}
    for name, form in tried.items():
        try:
            runner = Runner(problem, *form)
            runner.run(2)
        except Exception as error:  # the other forms may still work
            print(f"left out: {name}: {(str(error).strip() or repr(error)).splitlines()[0]}", file=sys.stderr)
            continue
        runners[name] = runner
    for _ in range(2):
        for name, runner in runners.items():
            once = runner.run(1)
            count = max(1, round(seconds / once))
            best[name] = min(best.get(name, once), runner.run(count) / count)
    roles = {}
    belongs_to = {
        "fastest": lambda name: True,
        "same precision": lambda name: not is_narrow_instead(name),
        "eager": lambda name: is_eager(name) and not is_narrow_instead(name),
        "as written": is_as_written,
    }
    for role, belongs in belongs_to.items():
        names = [name for name in best if belongs(name)]
        if names:
            name = min(names, key=best.get)
            roles[role] = (name, runners[name])
    if "same precision" not in roles:
        sys.exit(f"PyTorch has no form in our precision that it accepts and that matches {pattern!r}")
    name = roles["same precision"][0]
    roles["again"] = (name, Runner(problem, *tried[name]))
    return roles, {key: problem.batch_size / value for key, value in best.items()}


def memory_of(arguments, model, method, form):
    """Peak memory of PyTorch's form, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", form, "--models", model, "--methods", method]
    command += ["--batch-size", str(arguments.batch_size), "--device", arguments.device]
    command += ["--threads", str(arguments.threads), "--precision", arguments.precision, "--ways", *arguments.ways]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def report_memory(arguments, device):
    """The child's side of `memory_of`."""
    imported = common.peak_resident_bytes()
    problem = Problem(arguments.models[0], arguments.batch_size, device, precision=arguments.precision)
    computed = arithmetics(device.type, arguments.precision)
    form = {name: rest for name, *rest in forms(arguments.methods[0], arguments.ways, computed)}[arguments.memory_of]
    Runner(problem, *form).run(3)
    answer = {"peak_rss_bytes": common.peak_resident_bytes(), "after_import_bytes": imported}
    if device.type == "cuda":
        answer["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    print(json.dumps(answer))


def start_peer(arguments, problem, method, folder, precision):
    weights, images = problem.write(folder)
    return common.Peer(
        arguments.binary, "--model", problem.model_name, "--method", method, "--batch-size", problem.batch_size,
        "--device", arguments.device, "--threads", arguments.threads, "--weights", weights, "--images", images,
        "--precision", precision,
    )


def gradient_error(problem, peer, folder, limit, precision):
    """Relative L2 error of our gradient to PyTorch's. Exits if the gradient or the loss differs by too much."""
    loss, gradient = problem.gradient()
    path = folder / "gradient.safetensors"
    our_loss = peer.ask("gradient", path)["loss"]
    ours, name = load_file(path), f"{problem.model_name}, {problem.batch_size} images"
    if missing := sorted(gradient.keys() ^ ours.keys()):
        sys.exit(f"{name}: gradients of one side only: {', '.join(missing)}")
    for key, value in gradient.items():
        if value.shape != ours[key].shape:
            sys.exit(f"{name}: {key} is {tuple(value.shape)} in PyTorch, {tuple(ours[key].shape)} in ours")
    error = common.relative_error([ours[key] for key in gradient], list(gradient.values()))
    # A NaN fails these comparisons too.
    limits = NARROW_LIMIT if precision == problem.precision else ACROSS_LIMIT
    loss_limit = limits.get(precision, LOSS_LIMIT)
    if not (error < limits.get(precision, limit) and abs(our_loss - loss) < loss_limit * abs(loss)):
        sys.exit(
            f"{name}, {precision}: not the same computation: gradient differs by {error:.2e}, "
            f"losses {our_loss} (ours), {loss}"
        )
    return error


def sharp_gradient_error(arguments, model, method, device, folder, precision):
    """The comparison on a few images without kinks, with a process of our side for it alone."""
    if model not in FIRST_SEED:
        return None
    count = 2 if model == "resnet18" else 4
    seeds = range(FIRST_SEED[model], 1000)
    problems = (Problem(model, count, device, seed, arguments.precision) for seed in seeds)
    problem = next(filter(Problem.is_clear_of_kinks, problems), None)
    if problem is None:
        sys.exit(f"{model}: found no images without kinks")
    peer = start_peer(arguments, problem, method, folder, precision)
    error = gradient_error(problem, peer, folder, SHARP_LIMIT, precision)
    peer.quit()
    return error


def compare(arguments, device, model, method, folder):
    problem = Problem(model, arguments.batch_size, device, precision=arguments.precision)
    result = {"model": model, "method": method, "batch_size": arguments.batch_size, "ours": {}}
    peers = {}
    for precision in arguments.ours:
        peers[precision] = peer = start_peer(arguments, problem, method, folder, precision)
        result["ours"][precision] = {
            "gradient_error": sharp_gradient_error(arguments, model, method, device, folder, precision),
            "timed_gradient_error": gradient_error(problem, peer, folder, TIMED_LIMIT, precision),
        }
    seconds, pattern = arguments.seconds / 4, arguments.forms
    roles, result["forms"] = contenders(problem, method, arguments.ways, seconds, pattern)
    fastest, runner = roles["same precision"]
    count = max(1, round(arguments.seconds / runner.run(1)))
    # A form may have several roles. It takes one turn for all of them.
    size = count * problem.batch_size
    turns = {id(runner): (lambda runner=runner: size / runner.run(count)) for _, runner in roles.values()}
    for precision, peer in peers.items():
        peer.ask("steps", 2)
        turns[precision] = lambda peer=peer: peer.ask("steps", count)["images_per_s"]
    rates = {key: [] for key in turns}
    shuffled, order = list(turns), random.Random(1)
    for _ in range(arguments.rounds):
        order.shuffle(shuffled)
        for key in shuffled:
            rates[key].append(turns[key]())
    result["pytorch"] = {}
    for role, (name, runner) in roles.items():
        theirs = rates[id(runner)]
        ratios = {ours: common.spread([a / b for a, b in zip(rates[ours], theirs)]) for ours in peers}
        result["pytorch"][role] = {"form": name, "images_per_s": common.spread(theirs), "ratios": ratios}
    again = rates[id(roles["again"][1])]
    result["noise"] = common.spread([a / b for a, b in zip(again, rates[id(roles["same precision"][1])])])
    result["pytorch_memory"] = memory_of(arguments, model, method, fastest)
    for precision, peer in peers.items():
        result["ours"][precision] |= {"images_per_s": common.spread(rates[precision]), "memory": peer.ask("memory")}
        peer.quit()
    return result


def show(result):
    name, memory = f"{result['model']} {result['method']}", result["pytorch_memory"]
    print(f"{name}:")
    for precision, ours in result["ours"].items():
        error = ours["gradient_error"] or ours["timed_gradient_error"]
        rate, mebibytes = ours["images_per_s"]["median"], ours["memory"]["peak_rss_bytes"] / 2**20
        print(f"  ours, {precision:8} {rate:9.1f} images/s, {mebibytes:.0f} MiB; gradient differs by {error:.1e}")
    for role, contender in result["pytorch"].items():
        if role == "again":
            continue
        print(f"  {role:14} {contender['images_per_s']['median']:9.1f} images/s   {contender['form']}")
        for precision, ratio in contender["ratios"].items():
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
            print(f"    ours in {precision} is {spread} times as fast")
    noise = result["noise"]
    peak, imported = (memory[key] / 2**20 for key in ("peak_rss_bytes", "after_import_bytes"))
    itself = f"{noise['median']:.2f} ({noise['min']:.2f}-{noise['max']:.2f})"
    print(f"  the fastest in this precision against itself: {itself}; "
          f"{peak:.0f} MiB, {imported:.0f} of them after import", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet8", "resnet20", "resnet18"],
                        choices=common.MODELS)
    parser.add_argument("--methods", nargs="+", default=["sgd", "sam", "cr-sam"], choices=STEPS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="f32", choices=["f32", "tf32", "f16", "bf16"])
    parser.add_argument("--ours", nargs="+", choices=["f32", "tf32", "bf16x3", "bf16x6", "f16", "bf16"],
                        help="the precisions of our side; default: that of --precision")
    parser.add_argument("--ways", nargs="+", choices=WAYS,
                        help="how PyTorch runs; default: eager, compiled and max-autotune, on a GPU also graphs")
    parser.add_argument("--forms", default="", metavar="REGEX",
                        help="only those of PyTorch's forms whose name matches, "
                        "as in 'foreach SAM, fused SGD, channels_last'; default: all")
    parser.add_argument("--rounds", type=int, default=30, help="number of turns of each side")
    parser.add_argument("--seconds", type=float, default=0.5, help="approximate length of one turn")
    parser.add_argument("--binary", help="our side; default: step_peer under target/release")
    parser.add_argument("--self", action="store_true", help="PyTorch alone")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    arguments.ways = arguments.ways or USUAL_WAYS[device.type]
    common.prepare(device, arguments.threads, arguments.precision)
    if arguments.memory_of:
        return report_memory(arguments, device)
    arguments.ours = [] if arguments.self else arguments.ours or [arguments.precision]
    if arguments.ours:
        arguments.binary = common.find_binary("step_peer", arguments.binary)

    machine = common.describe(device, arguments.threads)
    turns = f"{arguments.rounds} rounds of about {arguments.seconds} s"
    print(f"{machine}; {arguments.precision}; batch {arguments.batch_size}, {turns}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            for method in arguments.methods:
                results.append(compare(arguments, device, model, method, pathlib.Path(folder)))
                show(results[-1])
    if arguments.json:
        written = {"machine": machine, "precision": arguments.precision, "results": results}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
