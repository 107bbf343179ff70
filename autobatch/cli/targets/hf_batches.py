"""Batches for models of transformers, in the dtypes and with the masks that a data loader gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autobatch.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor, nn

_DEFAULT_SEQ_LEN = 1024
_DEFAULT_IMAGE_SIZE = 224

Sampler = Callable[[int], "dict[str, Tensor]"]


def image_batches(config: Any, image_size: int | None, device: str) -> tuple[Sampler, str]:
    """What makes batches of labelled images, and the shape of one for a person."""
    import torch

    size = image_size or getattr(config, "image_size", None) or _DEFAULT_IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)

    def sample(n: int) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.rand(n, channels, height, width, device=device),
            "labels": torch.randint(config.num_labels, (n,), device=device),
        }

    return sample, f"images {channels}x{height}x{width}"


def text_batches(task: str, config: Any, length: int, device: str) -> Sampler:
    """What makes batches of sequences of ``length`` tokens for ``task``."""
    import torch

    vocabulary = config.get_text_config().vocab_size

    def sample(n: int) -> dict[str, Tensor]:
        ids = torch.randint(vocabulary, (n, length), device=device)
        batch = {"input_ids": ids, **_labels(task, ids, config.num_labels)}
        if task != "causal-lm":
            # One padded token, because sequences differ in length: an all-ones mask is dropped, and with it the
            # masked attention that training meets. Causal pre-training packs its blocks full and needs no mask.
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][-1, -1] = 0
        return batch

    return sample


def _labels(task: str, ids: Tensor, classes: int) -> dict[str, Tensor]:
    import torch

    n, length = ids.shape
    if task == "sequence-classification":
        return {"labels": torch.randint(classes, (n,), device=ids.device)}
    if task == "token-classification":
        return {"labels": torch.randint(classes, (n, length), device=ids.device)}
    if task == "question-answering":
        positions = torch.randint(length, (2, n), device=ids.device)
        return {"start_positions": positions[0], "end_positions": positions[1]}
    return {"labels": ids.clone()}


def sequence_length(model: nn.Module, config: Any, wanted: int | None) -> int:
    """``wanted``, or what the configuration allows up to 1024 tokens.

    Raises:
        InvalidArgumentError: if the model has fewer positions than are wanted.
    """
    limit = _longest(model, config)
    if wanted is None:
        return min(limit or _DEFAULT_SEQ_LEN, _DEFAULT_SEQ_LEN)
    if limit is not None and wanted > limit:
        allowed = f"at most {limit}, the positions of this configuration; give a local config.json with more"
        raise InvalidArgumentError("seq_len", wanted, allowed)
    return wanted


def _longest(model: nn.Module, config: Any) -> int | None:
    """Tokens that fit the positions of the model; None where it knows no such limit."""
    from torch import nn

    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin begin to count after the padding index, and lose that many positions.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return min(positions, module.num_embeddings - module.padding_idx - 1)
    return positions
