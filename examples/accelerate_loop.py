"""A loop around an Accelerator whose optimizer steps take 256 samples, in the micro-batches that fit."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch

torch.manual_seed(0)
accelerator = Accelerator()
data = TensorDataset(torch.randn(1024, 8), torch.randint(10, (1024,)))
model = nn.Sequential(nn.Linear(8, 16384), nn.ReLU(), nn.Linear(16384, 10))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=256, shuffle=True))

limits = {"memory_limit": "48MiB", "multiple_of": "pow2"}  # as if there were no more
result = autobatch.tune(
    accelerator, model, loader, optimizer=optimizer, loss_fn=loss_fn, effective_batch_size=256, **limits
)
print(result.notes[-2])
print(result.notes[-1])
for inputs, targets in loader:
    with accelerator.accumulate(model):
        loss = loss_fn(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        accelerator.print(f"a step of {len(inputs)} x {accelerator.gradient_accumulation_steps}, loss {loss:.2f}")
