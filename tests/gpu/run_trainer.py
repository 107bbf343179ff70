"""Trains a model of ``benchmarks/cells.py`` with a Trainer on a virtual card: ``python run_trainer.py CELL EFFECTIVE``.

Prints a line of JSON: the micro-batch found, the micro-batches that its windows took, and what the allocator said.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import autobatch
from benchmarks import cells

model, _, gb = sys.argv[1].rpartition("-")
cell = cells.Cell(build=getattr(cells, model), gb=int(gb))
effective = int(sys.argv[2])
autobatch.VirtualGPU(cell.card).attach()

import torch  # noqa: E402 - after the card is there

warnings.simplefilter("ignore")
workload = cell.build("cuda")
example: Any = workload.sample(1)
rows = [{name: tensor[0].cpu() for name, tensor in example.items()}] * effective
events: list[Any] = []
ooms: list[int] = []
taken: list[int] = []


def callback(event: Any) -> None:
    ooms.append(torch.cuda.memory_stats()["num_ooms"])
    if event.window is not None:
        taken.append(event.window.micro_batches)
    if event.kind == "recovered":
        events.append(event)


trainer = autobatch.Trainer(
    workload.model,
    workload.optimizer,
    effective_batch_size=effective,
    precision=workload.precision,
    callbacks=[callback],
    progress=False,
)
report = trainer.fit(rows, epochs=3)
print(
    json.dumps(
        {
            "found": report.batch_size.batch_size if report.batch_size else None,
            "plan": str(report.plan),
            "windows": report.windows,
            "micro_batches": taken,
            "recovered": len(events),
            "ooms_after_the_probe": ooms[-1] - ooms[0],
        }
    )
)
