"""Trains through Lightning."""

import lightning
import torch
from plain import Rows, model_of, parse
from torch import nn


class Module(lightning.LightningModule):
    def __init__(self, features):
        super().__init__()
        self.model = model_of(features, "cpu")

    def training_step(self, batch, index):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


if __name__ == "__main__":
    options = parse()
    rows = Rows(options.samples, options.features)
    loader = torch.utils.data.DataLoader(rows, options.batch_size, collate_fn=lambda batch: batch)
    trainer = lightning.Trainer(max_epochs=1, devices=1, default_root_dir=options.out, enable_progress_bar=False)
    trainer.fit(Module(options.features), loader)
