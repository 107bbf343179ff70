"""Trains a small GPT-2 through the Trainer of transformers."""

import torch
import transformers
from plain import parse

WIDTH, TOKENS = 128, 64


class Texts(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        ids = torch.zeros(TOKENS, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=WIDTH, n_head=4, vocab_size=1000, use_cache=False)
    return transformers.AutoModelForCausalLM.from_config(config)


if __name__ == "__main__":
    options = parse()
    arguments = transformers.TrainingArguments(
        output_dir=options.out,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation_steps,
        report_to="none",
        save_strategy="no",
        use_cpu=options.device == "cpu",
    )
    transformers.Trainer(gpt2(), arguments, train_dataset=Texts(options.samples)).train()
