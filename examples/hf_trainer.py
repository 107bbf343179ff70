"""One line before ``train()``: an optimizer step takes 256 samples, in the largest micro-batches that fit."""

import sys
import tempfile

import torch
import transformers
from torch import nn

import autobatch


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 512

    def __getitem__(self, index):
        return {"pixels": torch.full((3, 64, 64), index / 512), "labels": index % 10}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64 * 64, 10)
        )  # fmt: skip

    def forward(self, pixels, labels):
        logits = self.layers(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


if __name__ == "__main__":
    args = transformers.TrainingArguments(
        output_dir=sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(),
        num_train_epochs=2,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(Classifier(), args, train_dataset=Images())
    limit = {} if torch.cuda.is_available() else {"memory_limit": "120MiB", "multiple_of": "pow2"}
    result = autobatch.tune(trainer, effective_batch_size=256, **limit)
    trainer.train()
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    print(f"256 = {size} samples x {steps} steps")
    print(f"trained {trainer.state.global_step} steps of {size * steps} samples")
