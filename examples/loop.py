"""A training loop as people have one, and the two lines that find its batch size on the device at hand."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch

device = "cuda:0" if torch.cuda.is_available() else "cpu"
data = TensorDataset(torch.randn(1024, 256), torch.randint(10, (1024,)))
model = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 10)).to(device)
optimizer = torch.optim.AdamW(model.parameters())


def train_step(batch):
    inputs, targets = (part.to(device) for part in batch)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


found = autobatch.find(
    lambda n: train_step(next(iter(DataLoader(data, n)))), state=[model, optimizer], max_batch_size=len(data)
)

for batch in DataLoader(data, found.batch_size, shuffle=True):
    loss = train_step(batch)
print(f"trained with batches of {found.batch_size}, last loss {loss.item():.2f}")
