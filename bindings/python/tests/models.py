"""A small ResNet as torchvision writes them, and images for it."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.activation = activation()
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.activation(out + (x if self.downsample is None else self.downsample(x)))


class ResNet8(nn.Module):
    """Three stages of one block."""

    def __init__(self, width=8, classes=10, activation=nn.ReLU):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.activation = activation()
        self.layer1 = Block(width, width, 1, activation)
        self.layer2 = Block(width, 2 * width, 2, activation)
        self.layer3 = Block(2 * width, 4 * width, 2, activation)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x):
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def images(count, seed=0, dtype=torch.float64, size=12):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, 10, (count,), generator=generator)


def resnet8(seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    return ResNet8(**settings).to(dtype)
