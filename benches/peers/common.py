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
        start(self)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean(dim=(2, 3)))


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu1, self.relu2, self.relu3 = (nn.ReLU(inplace=True) for _ in range(3))
        self.downsample = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu3(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """torchvision's ResNet-50 with the CIFAR stem."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        inputs = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            layer = []
            for block in range(blocks):
                layer.append(Bottleneck(inputs, 64 << stage, 2 if stage > 0 and block == 0 else 1))
                inputs = 256 << stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(inputs, CLASSES)
        start(self)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """Batch norm and ReLU come before each convolution; where the width changes, also before the shortcut."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if inputs != width:
            self.convShortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x):
        y = self.relu1(self.bn1(x))
        if hasattr(self, "convShortcut"):
            x = self.convShortcut(y)
        return x + self.conv2(self.relu2(self.bn2(self.conv1(y))))


class WideStage(nn.Module):
    def __init__(self, inputs, width, blocks, stride):
        super().__init__()
        widths = [inputs] + [width] * blocks
        layer = [WideBlock(widths[n], width, stride if n == 0 else 1) for n in range(blocks)]
        self.layer = nn.Sequential(*layer)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """xternalz/WideResNet-pytorch."""

    def __init__(self, blocks, widening):
        super().__init__()
        widths = [16] + [(16 << stage) * widening for stage in range(3)]
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        for stage in range(3):
            block = WideStage(widths[stage], widths[stage + 1], blocks, 1 if stage == 0 else 2)
            setattr(self, f"block{stage + 1}", block)
        self.bn1, self.relu = nn.BatchNorm2d(widths[3]), nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], CLASSES)
        start(self)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.relu(self.bn1(x)).mean(dim=(2, 3)))


class TransformerBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        samples, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(samples, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(samples, tokens, width)
        x = x + self.attn["proj"](y)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(nn.Module):
    """timm's VisionTransformer for images of 32x32."""

    def __init__(self, patch, width, heads):
        super().__init__()
        tokens = (32 // patch) ** 2 + 1
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(12)])
        self.norm = nn.LayerNorm(width, 1e-6)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))


def start(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


MODELS = {
    "resnet8": lambda: ResNet((16, 32, 64), 1, projection=False),
    "resnet20": lambda: ResNet((16, 32, 64), 3, projection=False),
    "resnet56": lambda: ResNet((16, 32, 64), 9, projection=False),
    "resnet18": lambda: ResNet((64, 128, 256, 512), 2, projection=True),
    "resnet50": ResNet50,
    "wrn-16-8": lambda: WideResNet(2, 8),
    "vit-ti-4": lambda: VisionTransformer(4, 192, 3),
    "vit-s-4": lambda: VisionTransformer(4, 384, 6),
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
