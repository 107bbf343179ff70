"""Lightning: the largest micro-batch that fits, found when fit() begins. Runs on the CPU, under a limit of 200 MiB."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch.integrations.lightning import AutoBatch


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.GELU()) for _ in range(3)]
        self.net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *convolutions, nn.Flatten(), nn.LazyLinear(10))
        self.net(torch.zeros(1, 3, 32, 32))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


if __name__ == "__main__":
    images = TensorDataset(torch.randn(1024, 3, 32, 32), torch.randint(0, 10, (1024,)))
    loader = DataLoader(images, batch_size=4, shuffle=True)
    auto_batch = AutoBatch(effective_batch_size=256, memory_limit="200MiB", multiple_of="pow2", start=32)
    trainer = lightning.Trainer(
        callbacks=[auto_batch], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(Classifier(), loader)
    print(auto_batch.result)
