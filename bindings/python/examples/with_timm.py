"""ASAM over AdamW on a network of timm, with a schedule of timm."""

import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

import polder
from polder.torch import ASAM


def main():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    optimizer = ASAM(model, "adamw", lr=1e-3, weight_decay=0.05, rho=0.5)
    scheduler = CosineLRScheduler(optimizer, t_initial=2)
    inputs, targets = torch.randn(4, 3, 64, 64), torch.randint(0, 5, (4,))

    def loss():
        return nn.functional.cross_entropy(model(inputs), targets)

    losses = []
    for step in range(2):
        losses.append(optimizer.step(loss).item())
        scheduler.step(step + 1)
    print("losses:", [round(loss, 4) for loss in losses])
    rise = polder.curvature(model, nn.functional.cross_entropy, (inputs, targets)).sharpness(0.05, steps=2)
    print(f"sharpness within 0.05: {rise.one_step:.4f} by one step, {rise.largest:.4f} at most")


if __name__ == "__main__":
    main()
