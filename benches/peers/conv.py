#!/usr/bin/env python3
"""Convolutions alone: each pass of the layers of CIFAR's ResNet-20 and ResNet-18, PyTorch (cuDNN on a GPU) and ours.

    cargo build --release -p polder-peers
    python3 benches/peers/conv.py
    python3 benches/peers/conv.py --device cuda:0 --precision f16

PyTorch uses channels_last tensors and `cudnn.benchmark`. Before a layer is timed, y, dx and dw of both sides are
compared with PyTorch's in float32, without TF32, on operands that are already rounded to the precision. A difference
ends the comparison (exit status 1). Then the two sides take turns. A turn is the pass on every set of activations;
there are more sets than fit in a cache. On a GPU both sides replay a recorded graph of the pass. Ours also does work
for the batch norm and the step that follow; the times do not show what this saves.

`conv_peer --device cpu|cuda:N --threads T --precision P` is our side. Its source describes the commands.
"""
import argparse
import json
import math
import pathlib
import random
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import common

# Rows and columns of the image, channels in and out, kernel, stride; the same as in benches/conv.rs.
LAYERS = {
    "resnet20": [
        (32, 3, 16, 3, 1), (32, 16, 16, 3, 1), (32, 16, 32, 3, 2), (16, 32, 32, 3, 1), (16, 32, 64, 3, 2),
        (8, 64, 64, 3, 1),
    ],
    "resnet18": [
        (32, 3, 64, 3, 1), (32, 64, 64, 3, 1), (32, 64, 128, 3, 2), (32, 64, 128, 1, 2), (16, 128, 128, 3, 1),
        (16, 128, 256, 3, 2), (8, 256, 256, 3, 1), (8, 256, 512, 3, 2), (4, 512, 512, 3, 1),
    ],
}
PASSES = ("forward", "input-gradient", "weight-gradient")
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Largest relative L2 errors: float32 sums in any order; operands rounded to TF32's 11 bits; results rounded to 11 and
# 8 bits.
LIMITS = {"f32": 1e-5, "tf32": 1e-3, "f16": 1e-3, "bf16": 5e-3}
# The sets of a layer's activations take at least this much together, more than the last cache of a CPU or a GPU holds.
ROTATED_BYTES = 192 << 20


class Layer:
    """A layer's operands in PyTorch: sets of x and y. Gradients use y as dy."""

    def __init__(self, layer, batch, precision, device, sets):
        size, self.inputs, self.outputs, self.kernel, self.stride = layer
        self.padding, out = self.kernel // 2, -(-size // self.stride)
        self.dtype, self.device = DTYPES[precision], device
        self.weight = self.noise(self.outputs, self.inputs, self.kernel, self.kernel)
        x, y = (batch, self.inputs, size, size), (batch, self.outputs, out, out)
        self.sets = [(self.noise(*x), self.noise(*y)) for _ in range(sets)]

    def noise(self, *shape):
        values = torch.randn(shape, device=self.device).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last)

    def run(self, which, x, y, weight):
        if which == "forward":
            return F.conv2d(x, weight, stride=self.stride, padding=self.padding)
        mask = [which == "input-gradient", which == "weight-gradient", False]
        both = [self.stride] * 2, [self.padding] * 2, [1, 1]
        gradients = torch.ops.aten.convolution_backward(y, x, weight, None, *both, False, [0, 0], 1, mask)
        return gradients[1 if mask[1] else 0]

    def results(self, dtype):
        """y, dx and dw of the first set, in our side's layout."""
        x, y, weight = (value.to(dtype) for value in (*self.sets[0], self.weight))
        found = [self.run(which, x, y, weight).float() for which in PASSES]
        return dict(zip(("y", "dx", "dw"), map(ours, found[:2]))) | {"dw": ours_weight(found[2])}

    def turns(self, which):
        """A function that takes `count` turns and returns their time in seconds."""
        def turn():
            for x, y in self.sets:
                self.run(which, x, y, self.weight)

        replay = turn
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                turn()  # cuDNN chooses its algorithm here, which a graph cannot record
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                turn()
            replay = graph.replay

        def timed(count):
            common.synchronise(self.device)
            start = time.perf_counter()
            for _ in range(count):
                replay()
            common.synchronise(self.device)
            return time.perf_counter() - start

        return timed


def ours(value):
    """NCHW to NHWC."""
    return value.permute(0, 2, 3, 1).contiguous()


def ours_weight(value):
    """OIHW to HWIO."""
    return value.permute(2, 3, 1, 0).contiguous()


def check(who, found, expected, limit):
    for name, right in expected.items():
        error = common.relative_error([found[name].flatten().cpu()], [right.flatten().cpu()])
        if not error < limit:
            sys.exit(f"{who}: {name} differs from float32 by {error:.2e} (limit {limit:.0e})")


def compare(arguments, device, peer, layer):
    size, inputs, outputs, kernel, stride = layer
    out = -(-size // stride)
    elements = arguments.batch * (size * size * inputs + out * out * outputs)
    width = 2 if arguments.precision in ("f16", "bf16") else 4
    sets = math.ceil(ROTATED_BYTES / (elements * width))
    theirs, limit = Layer(layer, arguments.batch, arguments.precision, device, sets), LIMITS[arguments.precision]
    peer.ask("layer", arguments.batch, *layer, sets)
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    expected = theirs.results(torch.float32)
    torch.backends.cudnn.allow_tf32 = allowed
    check("PyTorch", theirs.results(theirs.dtype), expected, limit)
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder) / "in.safetensors", pathlib.Path(folder) / "out.safetensors"
        x, dy = (ours(value.float()).cpu() for value in theirs.sets[0])
        save_file({"x": x, "weight": ours_weight(theirs.weight.float()).cpu(), "dy": dy}, source)
        peer.ask("check", source, target)
        check("ours", load_file(target), expected, limit)
    result = {"layer": layer, "sets": sets, "passes": {}}
    for which in PASSES:
        contenders = {"pytorch": theirs.turns(which), "ours": lambda count: peer.ask("run", which, count)["seconds"]}
        counts, times = {}, {name: [] for name in contenders}
        for name, run in contenders.items():
            run(1)
            counts[name] = max(1, round(arguments.seconds / run(1)))
        shuffled, order = list(contenders), random.Random(1)
        for _ in range(arguments.rounds):
            order.shuffle(shuffled)
            for name in shuffled:
                times[name].append(contenders[name](counts[name]) / (counts[name] * sets))
        ratios = [t / o for t, o in zip(times["pytorch"], times["ours"])]
        seconds = {name: common.spread(values) for name, values in times.items()}
        result["passes"][which] = {"seconds": seconds, "ratio": common.spread(ratios)}
        operations = 2 * arguments.batch * out * out * outputs * inputs * kernel * kernel
        show(layer, which, seconds, result["passes"][which]["ratio"], operations)
    return result


def show(layer, which, seconds, ratio, operations):
    size, inputs, outputs, kernel, stride = layer
    name = f"{size}x{size} {inputs}-{outputs} k{kernel} s{stride}"
    theirs, ours = seconds["pytorch"]["median"], seconds["ours"]["median"]
    line = f"  {name:24} {which:16} {1e6 * theirs:10.1f} {1e6 * ours:10.1f} us {operations / ours / 1e12:8.3f} Tflop/s"
    print(line + f"   ours is {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) times as fast", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--precision", default="f32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.1, help="approximate length of one side's turn")
    parser.add_argument("--binary", help="our side; default: conv_peer under target/release")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    common.prepare(device, arguments.threads, arguments.precision)
    binary = common.find_binary("conv_peer", arguments.binary)
    settings = ("--device", arguments.device, "--threads", arguments.threads, "--precision", arguments.precision)
    peer = common.Peer(binary, *settings)

    machine = common.describe(device, arguments.threads)
    settings = f"{arguments.precision}, batch {arguments.batch}, {arguments.rounds} rounds"
    print(f"{machine}; {settings}; PyTorch's time and ours")
    results = {}
    with torch.no_grad():
        for model in arguments.models:
            print(model)
            results[model] = [compare(arguments, device, peer, layer) for layer in LAYERS[model]]
            for which in PASSES:
                ratios = [result["passes"][which]["ratio"]["median"] for result in results[model]]
                print(f"  {which}: ours is {statistics.geometric_mean(ratios):.2f} times as fast in the geometric mean")
    peer.quit()
    if arguments.json:
        given = {"precision": arguments.precision, "batch": arguments.batch, "results": results}
        arguments.json.write_text(json.dumps({"machine": machine} | given, indent=1) + "\n")


if __name__ == "__main__":
    main()
