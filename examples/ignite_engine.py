"""An engine of Ignite whose optimizer steps take 256 samples, run in the micro-batches that fit."""

import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.integrations.ignite import update

torch.manual_seed(0)
device = "cuda:0" if torch.cuda.is_available() else "cpu"
data = TensorDataset(torch.randn(1024, 8), torch.randint(10, (1024,)))
model = nn.Sequential(nn.Linear(8, 16384), nn.ReLU(), nn.Linear(16384, 10)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loader = DataLoader(data, batch_size=256, shuffle=True)

accumulator = autobatch.Accumulator(model, optimizer, nn.CrossEntropyLoss(), micro_batch_size=1)
engine = Engine(update(accumulator))
limits = {"memory_limit": "48MiB", "multiple_of": "pow2"}  # as if there were no more
result = autobatch.tune(engine, model, loader, optimizer=optimizer, effective_batch_size=256, **limits)
print(result.notes[-2])
print(result.notes[-1])


@engine.on(Events.ITERATION_COMPLETED)
def tell(engine: Engine) -> None:
    print(f"a step of {loader.batch_size}, loss {engine.state.output:.2f}")


engine.run(loader)
