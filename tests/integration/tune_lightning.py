"""What the tests of Lightning train; and ``tune_lightning.py FOLDER NAME ...``, what they run in other processes."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

import autobatch
import autobatch.errors
from autobatch.units import MIB

FEATURES, WIDTH, LAYERS = 64, 4096, 32
"""1 MiB of weights, and 0.5 MiB of activations for each sample."""


class Rows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, count: int = 64) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((FEATURES,), (index % 64) / 64), torch.tensor([index % 7 / 7])


class Wide(nn.Module):
    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.first, self.last, self.layers = nn.Linear(FEATURES, width), nn.Linear(width, 1), layers

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(self.layers):
            hidden = torch.relu(hidden)
        return self.last(hidden)


class Module(lightning.LightningModule):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.net = Wide(width)
        self.steps: list[int] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps.append(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def loader_of(count: int = 64, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(count), batch_size, **options)


def trainer_of(package: Any = lightning, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return package.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_model_summary": False} | quiet | options
    )


def weights_of(module: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


def settle() -> None:
    """Makes forks cheap: what the imports have left is not looked through for garbage in each of them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    gc.collect()
    gc.freeze()


def limit(more: int) -> None:
    import resource

    with open("/proc/self/status") as status:
        (data,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + more, resource.RLIM_INFINITY))


def in_fork(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, in JSON, or the message of its error: this process is left as if it had not been."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            said = json.dumps(work())
        except RuntimeError as exc:
            said = json.dumps(str(exc))
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    with os.fdopen(reading) as answer:
        return json.load(answer)


def trained(trainer: Any, module: Module, loader: DataLoader[Any]) -> dict[str, Any]:
    torch.manual_seed(1)
    trainer.fit(module, loader)
    return {"global_step": trainer.global_step, "steps": module.steps, "weights": weights_of(module)}


def train_under_a_limit() -> dict[str, Any]:
    """256 samples at once need 128 MiB; 110 are allowed."""
    limit(110 * MIB)
    torch.manual_seed(0)
    module, trainer, loader = Module(), trainer_of(), loader_of(1024, 256, shuffle=True)
    without = in_fork(lambda: trained(trainer, module, loader))
    result = autobatch.tune(trainer, module, loader, effective_batch_size=256, multiple_of=16, start=16)
    plan = result.environment["accumulation"]
    other = trainer_of(accumulate_grad_batches=plan["steps"])
    by_hand = in_fork(lambda: trained(other, module, loader_of(1024, plan["micro_batch_size"], shuffle=True)))
    tuned = trained(trainer, module, loader)
    return {"without": without, "tuned": tuned, "by hand": by_hand, "plan": plan, "fits": result.batch_size}


def train_on_two_ranks() -> dict[str, Any]:
    """One of the two can have less memory than the other."""
    from lightning.pytorch.strategies import DDPStrategy

    from autobatch.integrations.lightning import AutoBatch

    rank = int(os.environ["RANK"])
    options = {"memory_limit": f"{(40, 80)[rank]}MiB", "multiple_of": "pow2", "start": 8}
    found = {}
    for name in ("tune", "callback"):
        torch.manual_seed(rank)
        module, loader = Module(), loader_of(256, 4)
        callback = AutoBatch(128, **options)
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer = trainer_of(strategy=strategy, devices=2, callbacks=[callback] if name == "callback" else [])
        result = None
        if name == "tune":
            result = autobatch.tune(trainer, module, loader, effective_batch_size=128, **options)
        trainer.fit(module, loader)
        result = result or callback.result
        found[name] = {
            "fits": result.batch_size,
            "plan": result.environment["accumulation"],
            "where": result.environment["trials_in"],
            "accumulate": trainer.accumulate_grad_batches,
            "batch": trainer.train_dataloader.batch_size,
            "batches": trainer.num_training_batches,
            "global_step": trainer.global_step,
            "steps": module.steps,
            "weights": weights_of(module),
            "trials": [(t.batch_size, t.outcome.value) for t in result.trials],
        }
    return found


class Gathering(Module):
    """Compares its samples with those of other ranks."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.all_gather(super().training_step(batch, index), sync_grads=True).mean()


def refuse_on_two_ranks() -> dict[str, Any]:
    from lightning.pytorch.strategies import DDPStrategy

    loader, trainer = loader_of(), trainer_of(strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    try:
        autobatch.tune(trainer, Gathering(), loader, effective_batch_size=128, memory_limit="60MiB", start=8)
    except autobatch.errors.UnsupportedTrainerError as exc:
        message = str(exc)
    return {"message": message, "accumulate": trainer.accumulate_grad_batches, "batch": loader.batch_size}


if __name__ == "__main__":
    settle()
    folder, *names = sys.argv[1:]
    said = {name: globals()[name]() for name in names}
    with open(os.path.join(folder, f"said-{os.environ.get('RANK', '0')}.json"), "w") as file:
        json.dump(said, file)
