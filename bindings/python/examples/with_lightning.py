"""SAM in Lightning: its closure computes loss and gradients, and each pass of the method calls it."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from polder.torch import SAM


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
        self.losses = []

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return SAM(self.model, lr=0.1, momentum=0.9, rho=0.05)


def main():
    torch.manual_seed(0)
    inputs = torch.randn(64, 20)
    data = TensorDataset(inputs, inputs[:, :3].argmax(dim=1))
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(classifier, DataLoader(data, batch_size=32))
    assert len(classifier.losses) == 4, "two steps of two passes"
    assert classifier.model[1].num_batches_tracked == 2, "batch norm follows the first pass of a step"
    print("losses of the passes:", [round(loss, 4) for loss in classifier.losses])


if __name__ == "__main__":
    main()
