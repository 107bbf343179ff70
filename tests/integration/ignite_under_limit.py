"""An engine of Ignite in little memory: ``plain`` with the whole batch, ``tuned`` with one line, or ``attached``."""

from __future__ import annotations

import sys

import torch
from ignite.engine import Engine, create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader

import autobatch
from autobatch.integrations.ignite import AutoBatch, update
from tests.integration.under_limit import EFFECTIVE, Witness, classes, classifier, leave

torch.set_num_threads(1)
rows, model, loss_fn = classes(), classifier(), nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
witness = Witness(model, optimizer)
loader = DataLoader(rows, EFFECTIVE, shuffle=True)
accumulator = autobatch.Accumulator(model, optimizer, loss_fn, micro_batch_size=1)
engine = Engine(update(accumulator))
leave(30)
if sys.argv[1] == "plain":
    engine = create_supervised_trainer(model, optimizer, loss_fn)
elif sys.argv[1] == "tuned":
    autobatch.tune(engine, model, loader, effective_batch_size=EFFECTIVE, multiple_of="pow2")
else:
    loader = DataLoader(rows, 8, shuffle=True)
    AutoBatch(model, optimizer, loader, EFFECTIVE, multiple_of="pow2").attach(engine)
engine.run(loader, max_epochs=2)
witness.tell(rows, loss_fn, set=[loader.batch_size, accumulator.micro_batch_size], iterations=engine.state.iteration)
