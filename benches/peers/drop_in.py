#!/usr/bin/env python3
"""What an optimizer adds to a training step of a PyTorch model: `polder.torch` and what people use otherwise, in turns.

    pip install ./bindings/python torch pytorch_optimizer
    python3 benches/peers/drop_in.py [--davda54 sam.py] [--batch 8] [--rounds 12]

ResNet-18 (11.2 M parameters) on the CPU. The share of the optimizer is the time of a step without that of the forward
and backward passes inside it. Every form takes its gradients from the same passes. Before anything is timed, one step
of each form is compared with that of ours. In each round all forms take a turn, in a new random order, and ratios are
taken within a round.

The forms: SAM with a loop over the tensors; SAM and CR-SAM with foreach, which subtract the perturbation or copy the
weights back, around PyTorch's fused SGD; pytorch_optimizer's SAM with foreach; and with --davda54 the class in that
file (github.com/davda54/sam, sam.py), over the fused SGD too.
"""

import argparse
import importlib.util
import random
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import common
import polder.torch

RHO, ALPHA, BETA = 0.05, 0.02, 0.01
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


class Form:
    """A way to take a step. `closure` computes the gradients anew."""

    def __init__(self, params):
        self.params = params
        self.sgd = torch.optim.SGD(params, **SGD, fused=True)

    def gradients(self, closure):
        with torch.enable_grad():
            loss = closure()
        return loss, [param.grad for param in self.params]


class PerTensorSam(Form):
    """As most scripts write it."""

    @torch.no_grad()
    def step(self, closure):
        _, gradients = self.gradients(closure)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        perturbation = [gradient * (RHO / (norm + 1e-12)) for gradient in gradients]
        for param, step in zip(self.params, perturbation):
            param.add_(step)
        self.gradients(closure)
        for param, step in zip(self.params, perturbation):
            param.sub_(step)
        self.sgd.step()


class ForeachSam(Form):
    """Adds and subtracts the perturbation, which leaves rounding errors in the weights."""

    @torch.no_grad()
    def step(self, closure):
        _, gradients = self.gradients(closure)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        perturbation = torch._foreach_mul(gradients, RHO / (norm + 1e-12))
        torch._foreach_add_(self.params, perturbation)
        self.gradients(closure)
        torch._foreach_sub_(self.params, perturbation)
        self.sgd.step()


class CopyingSam(Form):
    """Copies the weights and back into memory that it keeps, and reads the norm: the fewest bytes of foreach."""

    def __init__(self, params):
        super().__init__(params)
        self.kept = [torch.empty_like(param) for param in params]

    def perturb(self, gradients, scale):
        torch._foreach_copy_(self.kept, self.params)
        torch._foreach_add_(self.params, gradients, alpha=scale)

    @torch.no_grad()
    def step(self, closure):
        _, gradients = self.gradients(closure)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        self.perturb(gradients, RHO / (norm.item() + 1e-12))
        self.gradients(closure)
        torch._foreach_copy_(self.params, self.kept)
        self.sgd.step()


class ForeachCrSam(CopyingSam):
    """The three gradients of CR-SAM, combined into the last one."""

    @torch.no_grad()
    def step(self, closure):
        loss, g0 = self.gradients(closure)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g0)))
        scale = RHO / (norm.item() + 1e-12)
        self.perturb(g0, scale)
        above, g_plus = self.gradients(closure)
        torch._foreach_copy_(self.params, self.kept)
        torch._foreach_add_(self.params, g0, alpha=-scale)
        below, g_minus = self.gradients(closure)
        torch._foreach_copy_(self.params, self.kept)
        loss, above, below = (value.double().item() for value in (loss, above, below))
        a, b = above + below - 2 * loss, above - below
        error = 4e-7 * abs(loss)
        alpha = ALPHA / a if a > max(1e-8, error) else 0.0
        beta = BETA / b if b > max(1e-8, error) else 0.0
        torch._foreach_mul_(g_minus, alpha - beta)
        torch._foreach_add_(g_minus, g_plus, alpha=1 + alpha + beta)
        torch._foreach_add_(g_minus, g0, alpha=-2 * alpha)
        self.sgd.step()


class Davda54(Form):
    def __init__(self, params, module):
        self.params = params
        self.optimizer = module.SAM(params, torch.optim.SGD, rho=RHO, **SGD, fused=True)

    def step(self, closure):
        self.gradients(closure)
        self.optimizer.first_step(zero_grad=True)
        self.gradients(closure)
        self.optimizer.second_step()


class PytorchOptimizer(Form):
    def __init__(self, params):
        import pytorch_optimizer  # only here: the other forms run without it

        self.params = params
        self.optimizer = pytorch_optimizer.SAM(params, torch.optim.SGD, rho=RHO, foreach=True, **SGD)

    def step(self, closure):
        self.gradients(closure)
        self.optimizer.step(closure)


class Ours(Form):
    def __init__(self, params, cls, **options):
        self.params = params
        self.optimizer = cls(params, rho=RHO, **SGD, **options)

    def step(self, closure):
        self.optimizer.step(closure)


class Turn:
    """A form with a model of its own, all from the same weights."""

    def __init__(self, name, make, state):
        self.name, self.model = name, common.MODELS["resnet18"]()
        self.model.load_state_dict(state)
        self.params = list(self.model.parameters())
        self.form, self.inside, self.shares = make(self.params), 0.0, []

    def closure(self, batch):
        def evaluate():
            # An optimizer zeroes its gradients, so that is part of its share.
            for param in self.params:
                param.grad = None
            began = time.perf_counter()
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            loss.backward()
            self.inside += time.perf_counter() - began
            return loss.detach()

        return evaluate

    def step(self, batch):
        """The milliseconds that the optimizer takes."""
        self.inside = 0.0
        closure = self.closure(batch)
        began = time.perf_counter()
        self.form.step(closure)
        return 1e3 * (time.perf_counter() - began - self.inside)

    def moved(self, state):
        return torch.cat([(param.detach() - state[name]).flatten() for name, param in self.model.named_parameters()])


def compare(method, forms, arguments):
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in common.MODELS["resnet18"]().state_dict().items()}
    batch = torch.randn(arguments.batch, 3, 32, 32), torch.randint(0, 10, (arguments.batch,))
    turns = [Turn(name, make, state) for name, make in forms.items()]
    ours = turns[0]
    for turn in turns:
        turn.step(batch)
        difference = ((turn.moved(state) - ours.moved(state)).norm() / ours.moved(state).norm()).item()
        # ReLUs that switch within rounding: the limit of the timed batches in pytorch.py.
        if difference > 2e-2:
            sys.exit(f"{method}, {turn.name}: its first step differs from ours by {difference:.1e}")
    for number in range(arguments.rounds + 2):
        for turn in random.sample(turns, len(turns)):
            share = turn.step(batch)
            if number >= 2:
                turn.shares.append(share)
    print(f"\n{method}, the optimizer's share of a step")
    for turn in turns:
        ratios = [theirs / mine for theirs, mine in zip(turn.shares, ours.shares)]
        print(
            f"  {turn.name:28} {statistics.median(turn.shares):7.2f} ms   over ours"
            f" {statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )


def overhead():
    """Microseconds of a step of 1,000 parameters without its gradients."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((20, 40), (20,), (4, 20), (100,))]
    gradients, loss = [torch.randn_like(param) for param in params], torch.zeros(())

    def closure():
        for param, gradient in zip(params, gradients):
            param.grad = gradient
        return loss

    print("\na step of 1,000 parameters without its gradients")
    for name in ("SGD", "SAM", "CRSAM"):
        optimizer, times = getattr(polder.torch, name)(params, lr=1e-4, momentum=0.9), []
        for _ in range(2000):
            began = time.perf_counter()
            optimizer.step(closure)
            times.append(1e6 * (time.perf_counter() - began))
        print(f"  {name:28} {statistics.median(times):7.1f} us")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--davda54", help="the file sam.py of github.com/davda54/sam")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch [default: 8]")
    parser.add_argument("--rounds", type=int, default=12, help="[default: 12]")
    parser.add_argument("--skip-peers", action="store_true", help="leave out the forms of other packages")
    parser.add_argument("--threads", type=int, default=2, help="[default: 2]")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    forms = {
        "polder.torch": lambda params: Ours(params, polder.torch.SAM),
        "loop over tensors": PerTensorSam,
        "foreach, add and subtract": ForeachSam,
        "foreach, copy and back": CopyingSam,
        "pytorch_optimizer, foreach": PytorchOptimizer,
    }
    if arguments.skip_peers:
        del forms["pytorch_optimizer, foreach"]
    if arguments.davda54:
        spec = importlib.util.spec_from_file_location("davda54", arguments.davda54)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        forms["davda54/sam"] = lambda params: Davda54(params, module)
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch {arguments.batch}")
    compare("SAM", forms, arguments)
    ours = {"polder.torch": lambda params: Ours(params, polder.torch.CRSAM, alpha=ALPHA, beta=BETA)}
    compare("CR-SAM", {**ours, "foreach": ForeachCrSam}, arguments)
    overhead()


if __name__ == "__main__":
    main()
