"""CR-SAM in accelerate: the closure calls `accelerator.backward`."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polder.torch import CRSAM


def main():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    inputs = torch.randn(64, 20)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(dim=1)), batch_size=32)
    model, optimizer, loader = accelerator.prepare(model, CRSAM(model.parameters(), lr=0.1, rho=0.1), loader)
    losses = []
    for batch, targets in loader:

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch), targets)
            accelerator.backward(loss)
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
    assert len(losses) == 6, "two steps of three passes"
    print("losses of the passes:", [round(loss, 4) for loss in losses])


if __name__ == "__main__":
    main()
