"""A loop around an Accelerator in little memory: ``plain`` with the whole batch, ``tuned`` with the one line."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import autobatch
from tests.integration.under_limit import EFFECTIVE, Witness, classes, classifier, leave

torch.set_num_threads(1)
rows, model, loss_fn = classes(), classifier(), nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
witness = Witness(model, optimizer)
accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, EFFECTIVE, shuffle=True))
leave(30)
if sys.argv[1] == "tuned":
    autobatch.tune(
        accelerator,
        model,
        loader,
        optimizer=optimizer,
        loss_fn=loss_fn,
        effective_batch_size=EFFECTIVE,
        multiple_of="pow2",
    )
for _ in range(2):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_fn(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
witness.tell(rows, loss_fn, set=[loader.batch_sampler.batch_size, accelerator.gradient_accumulation_steps])
