#!/usr/bin/env python3
"""The relative L2 error of a gradient to that in float64, in our precisions and in PyTorch's f32.

    cargo build --release -p polder-peers
    python3 benches/peers/errors.py

It uses a few images whose ReLU inputs are all clear of zero (pytorch.py says why). For each precision it prints the
error of the whole gradient, and of the tensor with the largest error of its own.
"""
import argparse
import pathlib
import tempfile

import torch
from safetensors.torch import load_file

import common
import pytorch


def gradient_in_double(problem):
    model = problem.model().double()
    loss = torch.nn.functional.cross_entropy(model(problem.x.double()), problem.y)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def errors(found, exact):
    """The error of all tensors together, and the largest one of a single tensor, with its name."""
    whole = common.relative_error([found[key].double() for key in exact], list(exact.values()))
    single = {key: common.relative_error([found[key].double()], [exact[key]]) for key in exact}
    worst = max(single, key=single.get)
    return f"{whole:.1e} | {single[worst]:.1e} ({worst})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet8", "resnet20", "resnet18"], choices=pytorch.FIRST_SEED)
    parser.add_argument("--ours", nargs="+", default=["f32", "bf16x6", "bf16x3", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--binary", help="our side; default: step_peer under target/release")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    device = torch.device("cpu")
    common.prepare(device, arguments.threads, "f32")
    arguments.binary = common.find_binary("step_peer", arguments.binary)
    print("| model | precision | all tensors | the worst tensor |\n|---|---|---|---|")
    for model in arguments.models:
        count = 2 if model == "resnet18" else 4
        seeds = range(pytorch.FIRST_SEED[model], 1000)
        problem = next(filter(pytorch.Problem.is_clear_of_kinks, (pytorch.Problem(model, count, device, s) for s in seeds)))
        exact = gradient_in_double(problem)
        print(f"| {model} | PyTorch f32 | {errors(problem.gradient()[1], exact)} |")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "gradient.safetensors"
            for precision in arguments.ours:
                peer = pytorch.start_peer(arguments, problem, "sgd", pathlib.Path(folder), precision)
                peer.ask("gradient", path)
                peer.quit()
                print(f"| {model} | {precision} | {errors(load_file(path), exact)} |", flush=True)


if __name__ == "__main__":
    main()
