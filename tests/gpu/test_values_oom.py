"""Memory that really runs out, in each part of a step: what a trial says of it, and what is left afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from autobatch import Outcome, Workload
from autobatch.device.cuda import CudaDevice
from autobatch.probe.state import preserved
from autobatch.probe.trial import TrialRequest, run_trial
from autobatch.units import MIB
from tests.gpu.values import DEVICE, bits, differing, seed_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu_values,
    pytest.mark.usefixtures("deterministic", "left_as_found"),
]
WIDTH, LAYERS = 4096, 3
WEIGHTS = LAYERS * WIDTH * WIDTH * 4  # 192 MiB, and so are the gradients; the rest is small
SMALL = 8


def run_of(optimizer: Any, *, scaled: bool) -> Workload:
    """Activations are made by the batch alone, gradients by backward alone, the optimizer's state by its step alone."""
    seed_all()
    with torch.device(DEVICE):
        body = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        model = nn.Sequential(nn.Linear(16, WIDTH), nn.Dropout(0.1), *body, nn.Linear(WIDTH, 16))
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=1) if scaled else None
    sample = lambda n: (torch.randn(n, 16), torch.randn(n, 16))  # noqa: E731
    return Workload(model, optimizer(model.parameters()), functional.mse_loss, sample, scaler=scaler)


class Place:
    """Where in a step the run is."""

    def __init__(self, work: Workload) -> None:
        self.now = "before"
        work.model.register_forward_pre_hook(lambda *_: self.enter("forward"))
        work.model.register_forward_hook(lambda model, inputs, output: self.watch(output))
        work.optimizer.register_step_pre_hook(lambda *_: self.enter("optimizer"))
        work.optimizer.register_step_post_hook(lambda *_: self.enter("after"))

    def enter(self, name: str) -> None:
        self.now = name

    def watch(self, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.enter("backward"))


def loss_of(work: Workload) -> torch.Tensor:
    """Of one batch, with the same units dropped each time."""
    with torch.random.fork_rng(devices=[DEVICE]), torch.no_grad():
        seed = torch.Generator().manual_seed(3)
        torch.manual_seed(3)
        x, y = (torch.randn(SMALL, 16, generator=seed).to(DEVICE) for _ in range(2))
        return functional.mse_loss(work.model(x), y).cpu()


@pytest.mark.parametrize(
    ("where", "optimizer", "options"),
    [
        # 256 MiB for the first activation
        ("forward", lambda p: torch.optim.AdamW(p, fused=True), {"batch": 1 << 14, "room": 128 * MIB, "trained": True}),
        # one gradient of 64 MiB and not two
        ("backward", torch.optim.AdamW, {"batch": SMALL, "room": 112 * MIB, "trained": True}),
        ("backward", torch.optim.AdamW, {"batch": SMALL, "room": 112 * MIB, "trained": True, "scaled": True}),
        # all gradients, and a part of what the optimizer creates
        ("optimizer", lambda p: torch.optim.AdamW(p, fused=True), {"batch": SMALL, "room": WEIGHTS + 144 * MIB}),
        ("optimizer", torch.optim.AdamW, {"batch": SMALL, "room": WEIGHTS + 144 * MIB, "scaled": True}),
        (
            "optimizer",
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
            {"batch": SMALL, "room": WEIGHTS + 144 * MIB},
        ),
    ],
    ids=["forward", "backward", "backward-scaled", "adamw-fused", "adamw-scaled", "sgd-loop"],
)
def test_running_out_is_told_and_leaves_nothing(where: str, optimizer: Any, options: dict[str, Any]) -> None:
    work, device = run_of(optimizer, scaled=options.get("scaled", False)), CudaDevice(DEVICE)
    if options.get("trained"):
        work.train_step(SMALL)
    work.begin()
    small = TrialRequest(batch_size=SMALL, steps=3)
    assert run_trial(work, device, small).trial.fits  # what cuBLAS keeps is there from here on
    place, loss, held = Place(work), loss_of(work), torch.cuda.memory_allocated(DEVICE)
    before = bits(*work.stateful)
    limit_bytes = torch.cuda.memory_reserved(DEVICE) + options["room"]
    place.enter("before")
    with preserved(work.stateful, DEVICE):
        request = TrialRequest(batch_size=options["batch"], steps=2, limit_bytes=limit_bytes)
        trial = run_trial(work, device, request).trial
        changed = differing(before, bits(*work.stateful))
    assert (trial.outcome, trial.steps, place.now) == (Outcome.OOM, 0, where)
    assert "CUDA out of memory" in trial.message
    assert "torch" in changed  # a batch was drawn
    # An optimizer that works through one parameter after the other had changed some when it ran out.
    assert any("weight" in name for name in changed) == (isinstance(work.optimizer, torch.optim.SGD))
    assert differing(before, bits(*work.stateful)) == []
    assert torch.equal(loss_of(work), loss)
    assert torch.cuda.memory_allocated(DEVICE) == held
    assert run_trial(work, device, small).trial.fits
