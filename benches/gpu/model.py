"""Predicts the time of a SAM step in f16 from counts and data sheets, so that the first measurement has something to be
held against. Prints the tables of docs/gpu-model.md, which explains the model.

    model.py
"""

import math

# From data sheets: multiprocessors, GHz (boost), TB/s, dense f16 multiply-adds with f32 sums per cycle and
# multiprocessor, f64 operations per cycle and multiprocessor.
CHIPS = {
    "A100": (108, 1.41, 2.04, 1024, 32),
    "H100": (132, 1.83, 3.35, 2048, 64),
    "RTX 4090": (128, 2.52, 1.01, 256, 2),
}
# Assumptions, which no GPU has confirmed.
NODE = 2.5e-6  # a kernel of a graph: its launch, the first loads, the wait for its last block
COPY = 0.9  # what a streaming kernel reaches of the bandwidth
MMA_SYNC = {"A100": 0.95, "H100": 0.62, "RTX 4090": 0.95}  # what `mma.sync` reaches of the tensor cores
LATENCY = 600  # cycles from a copy's start to its use: with S stages a tile needs LATENCY / (S - 1) for each
PROLOGUE = 1500  # cycles of a block before its first and after its last product

# Tiles of kernels/conv_tensor.cu: columns -> part of a warp, stages, and .ci/sass.py's instructions per mma.
TILES = {
    16: ((32, 16), 4, {"forward": 14.1, "dx": 16.4, "dw": 15.0}),
    32: ((32, 32), 4, {"forward": 7.6, "dx": 7.8, "dw": 8.1}),
    64: ((64, 32), 4, {"forward": 4.8, "dx": 4.8, "dw": 5.1}),
    128: ((64, 64), 3, {"forward": 3.1, "dx": 3.0, "dw": 3.3}),
}
BATCH, SIZE = 128, 2


def resnet(stem, widths, blocks, projected):
    """(channels in, channels out, kernel, stride, output's rows) of each convolution of a ResNet for 32 x 32 images."""
    layers, channels, side = [(3, stem, 3, 1, 32)], stem, 32
    for number, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if number > 0 and block == 0 else 1
            side //= stride
            if projected and (stride == 2 or channels != width):
                layers.append((channels, width, 1, stride, side))
            layers += [(channels, width, 3, stride, side), (width, width, 3, 1, side)]
            channels = width
    return layers


# The layers, and the launches of a step outside of convolutions and batch norm.
MODELS = {
    "ResNet-20": (resnet(16, [16, 32, 64], 3, False), 35),
    "ResNet-18": (resnet(64, [64, 128, 256, 512], 2, True), 35),
    "WRN-28-10": (resnet(16, [160, 320, 640], 4, True), 35),
}


class Chip:
    def __init__(self, name):
        self.name = name
        self.count, gigahertz, terabytes, self.fma, self.f64 = CHIPS[name]
        self.hertz, self.bandwidth = gigahertz * 1e9, terabytes * 1e12 * COPY

    def stream(self, size):
        return size / self.bandwidth

    def product(self, kind, rows, columns, depth, copies=1, traffic=0.0):
        """Seconds of a product by its fastest tile, with `copies` launched side by side."""
        times = []
        for wide, ((warp_rows, warp_columns), stages, ratios) in TILES.items():
            if wide > max(16, 2 ** math.ceil(math.log2(columns))) or 4 * wide < min(128, columns):
                continue
            tiles = math.ceil(rows / 128) * math.ceil(columns / wide) * copies
            mma = warp_rows // 16 * warp_columns // 8 * 2  # of one warp, in a stage of 32 numbers
            on_tensor_cores = mma * 2048 / (self.fma / 4 * MMA_SYNC[self.name])
            issued = mma * ratios[kind]
            steps = math.ceil(depth / 32)
            # Two blocks share a multiprocessor, if there are so many: they hide each other's latency, not the work.
            waves = math.ceil(tiles / self.count)
            busy = waves * steps * max(on_tensor_cores, issued)
            waiting = math.ceil(waves / 2) * (steps * LATENCY / (stages - 1) + PROLOGUE)
            times.append(max(busy, waiting) / self.hertz)
        return max(min(times), self.stream(traffic))


def passes(chip, layers):
    """Seconds of one forward and backward pass by part, and its launches."""
    parts = dict.fromkeys(["forward", "input gradient", "weight gradient", "batch norm", "its backward"], 0.0)
    launches = 0
    for number, (c_in, c_out, kernel, stride, side) in enumerate(layers):
        outputs, inputs = BATCH * side * side, BATCH * (side * stride) ** 2
        moved = SIZE * (inputs * c_in + outputs * c_out)
        taps = kernel * kernel
        parts["forward"] += chip.product("forward", outputs, c_out, taps * c_in, traffic=moved)
        if number > 0:
            classes = min(stride * stride, taps)  # a class without a tap is only cleared
            depth = math.ceil(taps / classes) * c_out
            pixels = inputs / (stride * stride)
            parts["input gradient"] += chip.product("dx", pixels, c_in, depth, classes, moved)
        rows = taps * c_in
        tiles = math.ceil(rows / 128) * math.ceil(c_out / min(128, max(16, c_out)))
        splits = max(1, min(math.ceil(264 / tiles), math.ceil(outputs / 128)))
        parts["weight gradient"] += chip.product("dw", rows, c_out, outputs / splits, splits, moved)
        # 4 and 6 bytes per element forward, 8 and 12 backward, without and with a residual. Half have one.
        activation = SIZE * outputs * c_out
        parts["batch norm"] += chip.stream(2.5 * activation)
        parts["its backward"] += chip.stream(5.0 * activation)
        launches += (3 if number > 0 else 2) + 3
    return parts, launches


def statistics_before(chip, layers):
    """What batch norm's statistics took with a chain of divisions in f64, and now: seconds of a pass."""
    before = after = 0.0
    for _, c_out, _, _, side in layers:
        # 128 threads of a block take a part of the tiles each, and then add up in seven levels. The latter is the work
        # of eight warps, because a level has half the threads of the one before.
        own, levels = math.ceil(BATCH * side * side / 128 / 128), 7
        warps = 4 * own + 8
        # Blocks of one multiprocessor share its f64 units, each of which does an operation of one lane per cycle.
        blocks = math.ceil(c_out / chip.count)
        cycles = lambda operations, latency: max(
            (own + levels) * latency, blocks * warps * operations * 32 / chip.f64)
        # A division, counted as 40 operations, and four others take some 77 cycles of latency; now there are four.
        before += cycles(44, 77) / chip.hertz
        after += cycles(4, 32) / chip.hertz
    return before, after


def main():
    print("| network | chip | launches | convolutions, ms | batch norm, ms | weights, ms | launching, ms | step, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for model, (layers, others) in MODELS.items():
        weights = sum(kernel * kernel * c_in * c_out for c_in, c_out, kernel, _, _ in layers)
        for name in CHIPS:
            chip = Chip(name)
            parts, launches = passes(chip, layers)
            launches = 2 * launches + others
            convolutions = 2 * sum(parts[part] for part in ("forward", "input gradient", "weight gradient"))
            norms = 2 * (parts["batch norm"] + parts["its backward"])
            # The norm, the perturbation with its rounded copy, and the update with its own.
            vectors = chip.stream(weights * (4 + 14 + 22))
            launching = launches * NODE
            total = convolutions + norms + vectors + launching
            cells = [f"{1e3 * value:.2f}" for value in (convolutions, norms, vectors, launching, total)]
            print(f"| {model} | {name} | {launches} | {' | '.join(cells)} |")
    print("\n| batch norm's statistics in a step, µs | before | now |\n|---|---|---|")
    for model, (layers, _) in MODELS.items():
        for name in CHIPS:
            before, after = statistics_before(Chip(name), layers)
            print(f"| {model}, {name} | {2e6 * before:.0f} | {2e6 * after:.0f} |")


main()
