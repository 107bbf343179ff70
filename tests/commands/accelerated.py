"""Trains through accelerate."""

import torch
from accelerate import Accelerator
from plain import Rows, model_of, parse
from torch import nn

if __name__ == "__main__":
    options, accelerator = parse(), Accelerator()
    model = model_of(options.features, accelerator.device)
    rows = Rows(options.samples, options.features)
    loader = torch.utils.data.DataLoader(rows, options.batch_size, collate_fn=lambda batch: batch)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for inputs, labels in loader:
        accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
