"""Scripts that behave as one would rather not see: ``odd.py HOW BATCH_SIZE``."""

import subprocess
import sys
import time

import torch
from torch import nn

how, batch_size = sys.argv[1], int(sys.argv[2])
device = "cuda" if torch.cuda.is_available() else "cpu"
KIB_A_SAMPLE = 1024


class Still(torch.optim.Optimizer):
    """Changes nothing. The constructors of torch's own import torch._dynamo, which takes longer than all else here."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def add_param_group(self, param_group):
        self.param_groups.append(param_group)

    def step(self, closure=None):
        pass


def step(model, optimizer, n):
    (torch.zeros(n, KIB_A_SAMPLE * 256, device=device) * model.weight).mean().backward()
    optimizer.step()


def train(_rank=0, n=batch_size, steps=100, optimizer=Still):
    model = nn.Linear(1, 1, bias=False).to(device)
    optimizer = optimizer(model.parameters())
    for _ in range(steps):
        step(model, optimizer, n)
        time.sleep(0.01)


def swallow():
    while True:
        try:
            train()
        except:  # noqa: E722 - that is the point
            print("went on", flush=True)


def shrink():
    n = batch_size
    while True:
        try:
            return train(n=n)
        except RuntimeError:  # torch.OutOfMemoryError is one
            n //= 2


def give_up():
    try:
        train()
    except RuntimeError:
        print("too large")
        sys.exit(1)


def leave():
    """As one that tells its reader, and nobody else."""
    try:
        train()
    except RuntimeError:
        print("too large", flush=True)


def fail_otherwise():
    try:
        train()
    except RuntimeError:
        raise ValueError("no luck") from None


def skip():
    while True:
        try:
            train()
        except RuntimeError:
            continue


def raise_key_error():
    if batch_size > 2:
        raise KeyError("column 7")
    train()


def in_holes():
    """Each sample in pieces that malloc keeps on its heap, which is mostly free, and cannot shrink."""
    pieces = [torch.ones(16 * 1024, dtype=torch.uint8) for _ in range(12800)]
    kept = pieces[::64]
    del pieces
    model = nn.Linear(1, 1, bias=False)
    optimizer = Still(model.parameters())
    for _ in range(10):
        loss = model(torch.ones(1, 1))
        kept += [torch.ones(16 * 1024, dtype=torch.uint8) for _ in range(64 * batch_size)]
        loss.backward()
        optimizer.step()
        del kept[200:]


def leave_a_child():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print("child started", flush=True)
    train(steps=100_000)


def spawn():
    torch.multiprocessing.spawn(train, nprocs=1)


def gan():
    models = [nn.Linear(1, 1, bias=False).to(device) for _ in range(2)]
    optimizers = [Still(model.parameters()) for model in models]
    for turn in range(100):
        print("turn", turn, flush=True)
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, batch_size)


HOWS = {
    "ignore": lambda: train(n=2),
    "train": train,
    "train_with_adam": lambda: train(optimizer=torch.optim.Adam),
    "swallow": swallow,
    "shrink": shrink,
    "give_up": give_up,
    "leave": leave,
    "fail_otherwise": fail_otherwise,
    "skip": skip,
    "key_error": raise_key_error,
    "two_steps": lambda: train(steps=2),
    "leave_a_child": leave_a_child,
    "spawn": spawn,
    "gan": gan,
    "in_holes": in_holes,
}

if __name__ == "__main__":
    HOWS[how]()
