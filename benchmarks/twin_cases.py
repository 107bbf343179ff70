"""The workloads of ``benchmarks/twins.py``: each builds itself on the GPU, then trains a few steps, a yield after each.

Modest ones: seven at a time, those with 12 GB among them, fit a GPU of 80 GB. Weights and data are random and made on
the device. No value decides anything, as a virtual GPU has none: no loss scale overflows, and texts are padded, which
a virtual GPU takes every mask for. ``gpt2-unmasked`` is the exception.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from autobatch.units import GIB
from benchmarks.cells import LLAMA_1B

DEVICE = "cuda"
STEPS = 4
_LOSS_SCALE = 256.0  # GradScaler's own 65536 overflows at first, and a skipped step makes no optimizer state
_LIMIT_BYTES = 3 * GIB
_LABELS = 1000
_LENGTHS = (128, 384, 64, 256, 320, 96)

Steps = Iterator[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload under one of torch's allocators."""

    workload: str
    run: Callable[[], Steps]
    """Yields once when all is built, and then after each step."""
    expandable: bool = False

    @property
    def allocator(self) -> str:
        return "expandable" if self.expandable else "native"

    @property
    def name(self) -> str:
        return f"{self.workload}-expandable" if self.expandable else self.workload


def _built(make: Callable[[], nn.Module], *, channels_last: bool = False) -> nn.Module:
    with torch.device(DEVICE):
        model = make()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _images(count: int, side: int = 224) -> torch.Tensor:
    return torch.randn(count, 3, side, side, device=DEVICE)


def _labels(*shape: int, below: int = _LABELS) -> torch.Tensor:
    return torch.randint(below, shape, device=DEVICE)


def _step(
    optimizer: Any, loss: Callable[[Any], torch.Tensor], size: Any, precision: torch.dtype | None, scaler: Any
) -> None:
    with torch.autocast(DEVICE, precision or torch.bfloat16, enabled=precision is not None):
        value = loss(size)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def _train(
    optimizer: Any,
    loss: Callable[[Any], torch.Tensor],
    sizes: Iterable[Any],
    *,
    precision: torch.dtype | None = None,
    scaled: bool = False,
) -> Steps:
    """Steps on the losses of ``sizes``, whatever a size is to ``loss``."""
    scaler = torch.amp.GradScaler(DEVICE, enabled=scaled, init_scale=_LOSS_SCALE)
    yield
    for size in sizes:
        _step(optimizer, loss, size, precision, scaler)
        yield


def _sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _adamw(model: nn.Module, **options: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, **options)


# ---- images


def _image_loss(model: nn.Module, *, channels_last: bool = False) -> Callable[[int], torch.Tensor]:
    kept = torch.channels_last if channels_last else torch.contiguous_format
    return lambda count: cross_entropy(model(_images(count).to(memory_format=kept)), _labels(count))


def resnet50(*, fp16: bool = False, benchmark: bool = False) -> Steps:
    """fp32, or fp16 with a GradScaler and channels_last; SGD with momentum."""
    import torchvision

    torch.backends.cudnn.benchmark = benchmark
    model = _built(torchvision.models.resnet50, channels_last=fp16)
    precision = torch.float16 if fp16 else None
    loss = _image_loss(model, channels_last=fp16)
    return _train(_sgd(model), loss, [32] * STEPS, precision=precision, scaled=fp16)


def resnet50_evaluation() -> Steps:
    """bf16 in eval mode, without gradients."""
    import torchvision

    model = _built(torchvision.models.resnet50).eval()
    yield
    for _ in range(STEPS):
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            model(_images(64)).argmax(dim=1)
        yield


def resnet18_compiled() -> Steps:
    import torchvision

    model: Any = torch.compile(_built(torchvision.models.resnet18))
    return _train(_sgd(model), _image_loss(model), [32] * STEPS, precision=torch.bfloat16)


def vit_b_16() -> Steps:
    import torchvision

    model = _built(torchvision.models.vit_b_16)
    return _train(_adamw(model), _image_loss(model), [32] * STEPS, precision=torch.bfloat16)


class UNet(nn.Module):
    """Four levels, two convolutions each; transposed convolutions back up, beside what the level had on the way down.

    Args:
        width: channels of the first level, doubled at each further one.
    """

    def __init__(self, width: int = 64, levels: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(_twice(before, after) for before, after in zip([3, *widths], widths, strict=False))
        pairs = list(itertools.pairwise(widths))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, stride=2) for above, below in pairs)
        self.join = nn.ModuleList(_twice(2 * above, above) for above, _ in pairs)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passed = []
        for level, convolve in enumerate(self.down):
            x = convolve(nn.functional.max_pool2d(x, 2) if level else x)
            passed.append(x)
        for up, join, beside in zip(self.up, self.join, passed[-2::-1], strict=True):
            x = join(torch.cat([up(x), beside], dim=1))
        head: torch.Tensor = self.head(x)
        return head


def _twice(before: int, after: int) -> nn.Sequential:
    first = (nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
    second = (nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
    return nn.Sequential(*first, *second)


def unet() -> Steps:
    """fp32, 256 x 256, a class for each pixel."""
    model = _built(UNet)
    return _train(
        _adamw(model),
        lambda count: cross_entropy(model(_images(count, 256)), _labels(count, 256, 256, below=2)),
        [8] * STEPS,
    )


# ---- texts


def _language_model(kind: str, config: Any, **options: Any) -> nn.Module:
    import transformers

    return _built(lambda: getattr(transformers, kind).from_config(config, **options))


def _text_loss(model: nn.Module, vocabulary: int, length: int, *, masked: bool = True) -> Callable[[int], torch.Tensor]:
    def loss(count: int) -> torch.Tensor:
        texts = _padded(count, length, vocabulary)
        if not masked:
            del texts["attention_mask"]
        value: torch.Tensor = model(**texts).loss
        return value

    return loss


def _padded(count: int, longest: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Texts of ``longest`` tokens and fewer, down to half of it."""
    lengths = torch.tensor([longest - longest * number // (2 * count) for number in range(count)], device=DEVICE)
    mask = (torch.arange(longest, device=DEVICE) < lengths[:, None]).long()
    ids = _labels(count, longest, below=vocabulary)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gpt2(optimizer: Callable[[nn.Module], Any], *, masked: bool = True) -> Steps:
    """124 M parameters at 1024 tokens, fp32.

    Without a mask, transformers asks the values of the positions whether texts are packed, and makes a mask if so.
    """
    import transformers

    config = transformers.GPT2Config(use_cache=False)
    model = _language_model("AutoModelForCausalLM", config)
    return _train(optimizer(model), _text_loss(model, config.vocab_size, 1024, masked=masked), [2] * STEPS)


def gpt2_compiled() -> Steps:
    """Four layers, bf16."""
    import transformers

    config = transformers.GPT2Config(use_cache=False, n_layer=4)
    model: Any = torch.compile(_language_model("AutoModelForCausalLM", config))
    loss = _text_loss(model, config.vocab_size, 512)
    return _train(_adamw(model), loss, [4] * STEPS, precision=torch.bfloat16)


def gpt2_8bit() -> Steps:
    import bitsandbytes  # asks for the GPU as it is imported, so not before the fork

    return gpt2(lambda model: bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4))


def llama() -> Steps:
    """1.1 B parameters in bf16, checkpointed, at 1024 tokens."""
    import transformers

    config = transformers.LlamaConfig(use_cache=False, **LLAMA_1B)
    model: Any = _language_model("AutoModelForCausalLM", config, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable()
    return _train(_adamw(model), _text_loss(model, config.vocab_size, 1024), [2] * STEPS)


def bert_lengths() -> Steps:
    """BERT-base, masked language model, bf16, another longest text in each step."""
    import transformers

    config = transformers.BertConfig()
    model = _language_model("AutoModelForMaskedLM", config)

    def loss(longest: int) -> torch.Tensor:
        return _text_loss(model, config.vocab_size, longest)(16)

    return _train(_adamw(model), loss, _LENGTHS, precision=torch.bfloat16)


class Recurrent(nn.Module):
    """Two layers of LSTM between an embedding and a linear layer."""

    def __init__(self, vocabulary: int = 10_000, width: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.LSTM(width, width, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layers(self.embedding(ids))[0])
        return logits


def lstm() -> Steps:
    """fp32, 128 tokens."""
    model = _built(Recurrent)

    def loss(count: int) -> torch.Tensor:
        ids = _labels(count, 129)
        return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    return _train(_adamw(model), loss, [64] * STEPS)


# ---- memory that runs out


def out_of_memory() -> Steps:
    """ResNet-50 in 3 GiB: a batch that fails, another one that fits, and so on.

    Raises:
        AssertionError: if every batch fitted.
    """
    import torchvision

    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, _LIMIT_BYTES / total_bytes))
    model = _built(torchvision.models.resnet50)
    optimizer, loss, scaler = _sgd(model), _image_loss(model), torch.amp.GradScaler(DEVICE, enabled=False)
    failures = 0
    yield
    for count in (16, 64, 16, 24, 48, 8):
        try:
            _step(optimizer, loss, count, None, scaler)
        except torch.OutOfMemoryError:
            failures += 1
        optimizer.zero_grad()  # outside the except block, where the traceback keeps the tensors
        yield
    assert failures, "all of it fitted"


_COMPILED = (
    Case(workload="gpt2-4-layers-compiled", run=gpt2_compiled),  # first, as they take longest
    Case(workload="resnet18-compiled", run=resnet18_compiled),
)
_PLAIN = (
    Case(workload="resnet50-fp32-benchmark", run=partial(resnet50, benchmark=True)),
    Case(workload="resnet50-fp16-benchmark", run=partial(resnet50, fp16=True, benchmark=True)),
    Case(workload="llama-1b-checkpointed", run=llama),
    Case(workload="resnet50-fp32", run=resnet50),
    Case(workload="resnet50-fp16", run=partial(resnet50, fp16=True)),
    Case(workload="vit-b-16-bf16", run=vit_b_16),
    Case(workload="bert-lengths-bf16", run=bert_lengths),
    Case(workload="gpt2-adamw-foreach", run=partial(gpt2, partial(_adamw, foreach=True))),
    Case(workload="gpt2-adamw-fused", run=partial(gpt2, partial(_adamw, fused=True))),
    Case(workload="gpt2-sgd", run=partial(gpt2, _sgd)),
    Case(workload="gpt2-unmasked", run=partial(gpt2, _adamw, masked=False)),
    Case(workload="lstm", run=lstm),
    Case(workload="unet", run=unet),
    Case(workload="resnet50-evaluation", run=resnet50_evaluation),
    Case(workload="gpt2-adamw-8bit", run=gpt2_8bit),
    Case(workload="resnet50-out-of-memory", run=out_of_memory),
)
_EXPANDABLE = tuple(replace(case, expandable=True) for case in (*_COMPILED, *_PLAIN))
_ALL = (*_COMPILED, *_EXPANDABLE[: len(_COMPILED)], *_PLAIN, *_EXPANDABLE[len(_COMPILED) :])
CASES = {case.name: case for case in _ALL}
