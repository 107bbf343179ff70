"""Lightning: the largest micro-batch that fits, found when fit() begins. Runs on the CPU, under a limit of 150 MiB."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch.integrations.lightning import AutoBatch


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)) for _ in range(2)]
        self.net, self.head = nn.Sequential(*blocks), nn.Linear(64, 10)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.head(self.net(batch[0]).mean(1)), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


if __name__ == "__main__":
    sequences = TensorDataset(torch.randn(1024, 64, 64), torch.randint(0, 10, (1024,)))
    loader = DataLoader(sequences, batch_size=4, shuffle=True)
    auto_batch = AutoBatch(effective_batch_size=256, memory_limit="150MiB", multiple_of="pow2", start=32)
    trainer = lightning.Trainer(
        callbacks=[auto_batch], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(Classifier(), loader)
    print(auto_batch.result)
