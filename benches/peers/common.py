"""Shared by the comparisons with PyTorch: the models, the protocol of our programs, and paired statistics."""
import json
import os
import pathlib
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
CLASSES = 10

# The step that both sides run. Our programs have the same constants.
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
RHO, ALPHA, BETA, A_MIN, B_MIN = 0.05, 0.1, 0.01, 1e-8, 1e-8

# ---- Models: names and shapes as in torchvision ---------------------------------------------------


class PadShortcut(nn.Module):
    """Option A of He et al.: every second pixel; the new channels are zero, half of them before and half after."""

    def __init__(self, new_channels):
        super().__init__()
        self.before, self.behind = new_channels // 2, new_channels - new_channels // 2

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


class BasicBlock(nn.Module):
    def __init__(self, inputs, width, stride, projection):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.downsample = nn.Identity()
        if stride != 1 or inputs != width:
            if projection:
                conv = nn.Conv2d(inputs, width, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))
            else:
                self.downsample = PadShortcut(width - inputs)

    def forward(self, x):
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet of basic blocks with the CIFAR stem."""

    def __init__(self, widths, blocks, projection):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.stages = len(widths)
        inputs = widths[0]
        for stage, width in enumerate(widths):
            layer = []
            for block in range(blocks):
                layer.append(BasicBlock(inputs, width, 2 if stage > 0 and block == 0 else 1, projection))
                inputs = width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(inputs, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean(dim=(2, 3)))


MODELS = {
    "resnet8": lambda: ResNet((16, 32, 64), 1, projection=False),
    "resnet20": lambda: ResNet((16, 32, 64), 3, projection=False),
    "resnet56": lambda: ResNet((16, 32, 64), 9, projection=False),
    "resnet18": lambda: ResNet((64, 128, 256, 512), 2, projection=True),
}

# ---- Our side -------------------------------------------------------------------------------------


def find_binary(name, given):
    """`given`, or target/release/NAME, which `cargo build --release -p polder-peers` makes."""
    if given:
        return given
    root = pathlib.Path(__file__).resolve().parents[2]
    release = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", root / "target")) / "release"
    if (release / name).is_file():
        return release / name
    sys.exit(f"no {name} under {release}: run `cargo build --release -p polder-peers`, or give --binary")


class Peer:
    """A running program of ours: one command per line on its stdin, one JSON object per line on its stdout."""

    def __init__(self, binary, *arguments):
        command = [str(binary), *map(str, arguments)]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            sys.exit(f"cannot start {binary}: {error}")

    def ask(self, *command):
        line = " ".join(map(str, command))
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            sys.exit(f"the binary ended before `{line}` (exit status {self.process.wait()})")
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"the binary ended on `{line}` (exit status {self.process.wait()})")
        try:
            value = json.loads(answer)
        except json.JSONDecodeError:
            sys.exit(f"the binary answered `{line}` with something that is not JSON: {answer.rstrip()}")
        if "error" in value:
            sys.exit(f"the binary answered `{line}`: {value['error']}")
        return value

    def quit(self):
        self.process.stdin.write("quit\n")
        self.process.stdin.close()
        self.process.wait(timeout=60)


# ---- Measuring ------------------------------------------------------------------------------------


def prepare(device, threads, precision="f32"):
    """The same arithmetic as ours: TF32 only with --precision tf32. cuDNN may choose its algorithms."""
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device, threads):
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads"
    return f"PyTorch {torch.__version__} on {where}"


def spread(values):
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def relative_error(values, reference):
    """Relative L2 error over pairs of tensors, in float64."""
    squares = [((v.double() - r.double()) ** 2).sum() for v, r in zip(values, reference, strict=True)]
    return (sum(squares) / sum((r.double() ** 2).sum() for r in reference)).sqrt().item()


def peak_resident_bytes():
    """VmHWM of this process. getrusage would report the parent's peak for a new child process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
