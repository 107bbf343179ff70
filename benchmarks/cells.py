"""The workloads and cards on which answers are held against the truth. Random weights, made on the device."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GB_SIZES = (16, 24, 40, 80)
LLAMA_1B = {  # the shape of TinyLlama-1.1B
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def _texts(count: int, seed: int = 0) -> list[list[int]]:
    """Texts in tokens, their lengths lognormal: the median is 60, one in a thousand is cut at 512."""
    chance = random.Random(seed)
    return [[1] * min(512, max(3, round(chance.lognormvariate(math.log(60), 0.7)))) for _ in range(count)]


TEXTS = _texts(20_000)


def resnet50(device: str) -> Any:
    """fp16 autocast with a GradScaler, channels_last, SGD with momentum, 224 x 224."""
    import torch
    import torchvision

    from autobatch import Workload

    with torch.device(device):
        model = torchvision.models.resnet50().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def sample(n: int) -> tuple[Any, Any]:
        images = torch.empty(n, 3, 224, 224, device=device, memory_format=torch.channels_last)
        return images, torch.zeros(n, dtype=torch.long, device=device)

    return Workload(model, optimizer, torch.nn.functional.cross_entropy, sample, precision="fp16")


def vit_b_16(device: str) -> Any:
    """bf16 autocast, AdamW, 224 x 224."""
    import torch
    import torchvision

    from autobatch import Workload

    with torch.device(device):
        model = torchvision.models.vit_b_16()

    def sample(n: int) -> tuple[Any, Any]:
        return torch.zeros(n, 3, 224, 224, device=device), torch.zeros(n, dtype=torch.long, device=device)

    optimizer = torch.optim.AdamW(model.parameters())
    return Workload(model, optimizer, torch.nn.functional.cross_entropy, sample, precision="bf16")


def gpt2(device: str) -> Any:
    """124 M parameters at 1024 tokens, fp32, AdamW."""
    import transformers

    return _language_model(device, transformers.GPT2Config(use_cache=False), "AutoModelForCausalLM", 1024, None)


def bert(device: str) -> Any:
    """BERT-base, masked language model at 512 tokens, bf16 autocast, AdamW."""
    import transformers

    return _language_model(device, transformers.BertConfig(), "AutoModelForMaskedLM", 512, "bf16")


def bert_varlen(device: str) -> Any:
    """:func:`bert` on texts of 3 to 512 tokens, most of them short, padded to the longest of a batch."""
    import torch
    import transformers

    from autobatch import Workload

    with torch.device(device):
        model = transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig())
    optimizer = torch.optim.AdamW(model.parameters())
    return Workload(model, optimizer, sample=TEXTS, collate_fn=_padded, length=len, precision="bf16")


def _padded(texts: list[list[int]]) -> dict[str, Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def llama(device: str) -> Any:
    """1.1 B parameters at 2048 tokens, bf16 autocast, checkpointed, AdamW."""
    import transformers

    config = transformers.LlamaConfig(use_cache=False, **LLAMA_1B)
    workload = _language_model(device, config, "AutoModelForCausalLM", 2048, "bf16")
    workload.model.gradient_checkpointing_enable()
    return workload


def _language_model(device: str, config: Any, auto_class: str, tokens: int, precision: str | None) -> Any:
    import torch
    import transformers

    from autobatch import Workload

    with torch.device(device):
        model = getattr(transformers, auto_class).from_config(config)

    def sample(n: int) -> dict[str, Any]:
        ids = torch.zeros(n, tokens, dtype=torch.long, device=device)
        return {"input_ids": ids, "labels": ids}

    return Workload(model, torch.optim.AdamW(model.parameters()), sample=sample, precision=precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A workload on a card of a given size."""

    build: Callable[..., Any]
    gb: int

    @property
    def name(self) -> str:
        return f"{self.build.__name__}-{self.gb}"

    @property
    def card(self) -> str:
        """An A100's cores and capability with this much memory, all of it usable."""
        return f"memory={self.gb}GiB,capability=8.0,sms=108,outside=0"


CELLS = (
    *(Cell(build=build, gb=gb) for build in (resnet50, gpt2) for gb in GB_SIZES),
    *(Cell(build=build, gb=gb) for build in (vit_b_16, bert, llama) for gb in (24, 80)),
)

VARIABLE_CELLS = tuple(Cell(build=bert_varlen, gb=gb) for gb in (24, 80))
"""Cells whose samples are of different lengths, where the order of the batches decides too."""
