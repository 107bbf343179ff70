"""Real trainers of other libraries around a workload: for their own finders, and for tune()."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from autobatch.probe.state import preserved
from autobatch.probe.workload.forward import forward
from benchmarks.measure import STEPS_AFTER, Task

START_OF_LANGUAGE_MODELS = 256
"""A power of two above every answer for the models of transformers (185)."""
_ENDLESS = 10**9


def lightning_trainer(task: Task, steps: int = STEPS_AFTER) -> Any:
    """A Trainer that ends after ``steps``, and writes nothing."""
    import lightning

    quiet("lightning.pytorch", "lightning.fabric")
    return lightning.Trainer(
        accelerator="cpu" if task.place.device == "cpu" else "gpu",
        devices=1,
        precision={"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(task.workload.precision or "", "32-true"),
        max_steps=steps,
        default_root_dir=".",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def lightning_module(task: Task, batch_size: int = 1) -> Any:
    import lightning
    import torch

    workload = task.workload

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size = workload.model, batch_size

        def training_step(self, batch: Any, index: int) -> Any:
            _, loss = forward(workload.model, workload.loss_fn, batch, precision=workload.precision, device=self.device)
            return loss

        def configure_optimizers(self) -> Any:
            return workload.optimizer

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                range(_ENDLESS), batch_size=self.batch_size, collate_fn=lambda items: workload.sample(len(items))
            )

        def on_train_start(self) -> None:
            task.attempt(self.batch_size)

        def on_train_batch_end(self, *_: Any) -> None:
            task.step()

    return Module()


def transformers_trainer(task: Task, batch_size: int = START_OF_LANGUAGE_MODELS, **arguments: Any) -> Any:
    """A Trainer whose ``arguments`` say how long it runs. That it seeds everything when it is made is not its finder's
    doing.
    """
    import transformers

    quiet("transformers")
    workload = task.workload

    class Counter(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            task.attempt(state.train_batch_size)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            task.step()

    with preserved((), task.place.device):
        return transformers.Trainer(
            model=workload.model,
            args=transformers.TrainingArguments(
                output_dir=".",
                per_device_train_batch_size=batch_size,
                bf16=workload.precision == "bf16",
                max_grad_norm=0,  # the workloads clip nothing
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=task.place.device == "cpu",
                **arguments,
            ),
            train_dataset=range(START_OF_LANGUAGE_MODELS * (STEPS_AFTER + 1)),  # type: ignore[arg-type]
            data_collator=lambda items: workload.sample(len(items)),
            optimizers=(workload.optimizer, None),
            callbacks=[Counter()],
        )


def quiet(*names: str) -> None:
    warnings.simplefilter("ignore")
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
