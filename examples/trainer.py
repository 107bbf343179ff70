"""The whole loop: the largest micro-batch is found, an optimizer step takes 4096 samples, and a killed run goes on."""

import sys

import torch
from torch import nn
from torch.utils.data import TensorDataset

import autobatch

if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    images, labels = torch.randn(10_000, 3, 16, 16), torch.randint(10, (10_000,))
    train, held_out = TensorDataset(images[:9000], labels[:9000]), TensorDataset(images[9000:], labels[9000:])
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 16 * 16, 10),
    ).to(device)  # fmt: skip
    trainer = autobatch.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        nn.functional.cross_entropy,
        effective_batch_size=4096,
        checkpoint=sys.argv[1] if len(sys.argv) > 1 else None,  # a folder: start the script again to go on
        find_options={"memory_limit": "128MiB"} if device == "cpu" else {},
    )
    report = trainer.fit(train, epochs=2, eval_dataset=held_out)
    print(report.plan)
