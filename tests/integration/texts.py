"""Trainers that derive from transformers' own, with tiny models and a tokenizer made here: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("sentence_transformers")
pytest.importorskip("trl")

import datasets
import torch
import transformers
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "one", "grey", "cat", "sleeps"]
SPECIAL = {name: f"[{name[:3].upper()}]" for name in ("unk_token", "pad_token", "eos_token", "cls_token", "sep_token")}
LONGEST = 40
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number + place) % len(WORDS)] for place in range(words))


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **options,
    }


def sft(folder: Path, **options: Any) -> SFTTrainer:
    """trl's: texts of 4 to 40 words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **SMALL)
    rows = datasets.Dataset.from_dict({"text": [text(number, 4 + number % (LONGEST - 3)) for number in range(64)]})
    return SFTTrainer(
        transformers.LlamaForCausalLM(config),
        SFTConfig(**arguments(folder, bf16=False, **options)),
        train_dataset=rows,
        eval_dataset=rows.select(range(16)),
        processing_class=tokenizer(),
    )


def sentences(folder: Path, **options: Any) -> SentenceTransformerTrainer:
    """That of sentence-transformers: pairs of texts, with in-batch negatives."""
    torch.manual_seed(0)
    path = str(folder / "bert")
    transformers.BertModel(transformers.BertConfig(vocab_size=32, **SMALL)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    model = SentenceTransformer(modules=[Transformer(path), Pooling(SMALL["hidden_size"])], device="cpu")
    pairs = {
        "anchor": [text(number, 4 + number % (LONGEST - 3)) for number in range(64)],
        "positive": [text(number + 1, 4 + number % 9) for number in range(64)],
        "label": [number % 8 for number in range(64)],
    }
    if options.get("batch_sampler") != "group_by_label":
        del pairs["label"]
    rows = datasets.Dataset.from_dict(pairs)
    return SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(**arguments(folder, **options)),
        train_dataset=rows,
        eval_dataset=rows.select(range(16)),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
