"""A training script that may be killed: started again, it goes on. Prints a hash of its weights at the end."""

import hashlib
import random
import sys
import time
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import TensorDataset

import autobatch

torch.manual_seed(1)
random.seed(1)
numpy.random.seed(1)
chance = torch.Generator().manual_seed(5)
rows = TensorDataset(torch.randn(203, 16, generator=chance), torch.randn(203, 4, generator=chance))
model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def told(event: Any) -> None:
    if event.kind == "window" and event.windows == 3:
        print("window 3", flush=True)
        time.sleep(0.5)  # the signal comes amid a window


trainer = autobatch.Trainer(
    model,
    optimizer,
    nn.MSELoss(),
    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
    effective_batch_size=32,
    micro_batch_size=10,
    max_grad_norm=1.0,
    checkpoint=sys.argv[1],
    checkpoint_every=int(sys.argv[2]),
    progress=False,
    workers=int(sys.argv[3]) if len(sys.argv) > 3 else 0,
    callbacks=[told] if len(sys.argv) > 3 else [],
)
report = trainer.fit(rows, epochs=6, eval_dataset=rows)
digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values()))
print(digest.hexdigest(), report.losses, [found.loss for found in report.evaluations])
