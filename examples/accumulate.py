"""Training with batches beyond memory: an optimizer step of 4096 samples, run in micro-batches that fit."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch

torch.manual_seed(0)
device = "cuda:0" if torch.cuda.is_available() else "cpu"
data = TensorDataset(torch.randn(10_000, 256), torch.randint(10, (10_000,)))
model = nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 10)).to(device)
optimizer = torch.optim.AdamW(model.parameters())

plan = autobatch.plan_accumulation(effective_batch_size=4096, micro_batch_size=1500)
print(plan)
accumulator = autobatch.Accumulator(
    model, optimizer, nn.functional.cross_entropy, micro_batch_size=plan.micro_batch_size, max_grad_norm=1.0
)
for batch in DataLoader(data, plan.effective_batch_size, shuffle=True):
    window = accumulator.step(batch)
    print(f"{window.samples} samples in {window.micro_batches} micro-batches, loss {float(window.loss):.2f}")
