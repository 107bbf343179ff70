"""A Trainer of transformers in little memory: ``plain`` with the whole batch, ``tuned`` with the one line."""

from __future__ import annotations

import sys

import torch
import transformers
from torch import Tensor, nn

import autobatch
from tests.integration.under_limit import EFFECTIVE, Witness, classes, classifier, leave


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = classifier()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collated(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, labels = zip(*rows, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(labels)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1:]
    rows, model = classes(), Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    witness = Witness(model.layers, optimizer)
    args = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=EFFECTIVE,
        per_device_eval_batch_size=2 * EFFECTIVE,
        num_train_epochs=2,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, args, collated, rows, rows if mode == "tuned" else None, optimizers=(optimizer, None)
    )
    leave(44)
    if mode == "tuned":
        autobatch.tune(trainer, effective_batch_size=EFFECTIVE, multiple_of="pow2")
    trainer.train()
    steps = len(witness.steps)
    if mode == "tuned":
        trainer.evaluate()
    numbers = [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.per_device_eval_batch_size]
    witness.tell(
        rows, nn.functional.cross_entropy, set=numbers, global_step=trainer.state.global_step, optimizer_steps=steps
    )
