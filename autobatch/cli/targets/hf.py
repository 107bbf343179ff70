"""``hf:NAME``: an architecture of transformers with its default or a local configuration, and random weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.targets.common import ModelOptions, nearest, refuse, trained
from autobatch.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from torch import nn

    from autobatch.probe.workload import Workload

# The auto class of a task and the configurations it knows. The task of an architecture that knows several is the first
# of these.
_TASKS: Mapping[str, tuple[str, str]] = {
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "masked-lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING"),
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "image-classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    "sequence-classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "token-classification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    "question-answering": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
}
TASKS = tuple(_TASKS)

_DEFAULT_SEQ_LEN = 1024
_DEFAULT_IMAGE_SIZE = 224
_MAX_GRAD_NORM = 1.0  # what transformers.Trainer clips to unless told otherwise


@dataclass(frozen=True, slots=True)
class HFTarget:
    """``name`` is a model type of transformers, or the path of a ``config.json`` or of the folder that has it."""

    name: str
    options: ModelOptions

    @property
    def title(self) -> str:
        return f"hf:{self.name}"

    def import_modules(self) -> None:
        self._resolve()

    def __call__(self, device: str) -> Workload:
        import torch

        config, task = self._resolve()
        _prepare(config, task, self.options.image_size)
        with torch.device(device):
            # Weights in fp32, as mixed precision keeps them, whatever the configuration was saved with.
            model = _auto_class(task).from_config(config, dtype=torch.float32)
        sample, shape = _sample(task, model, config, self.options, device)
        return trained(
            model,
            sample,
            self.options,
            name=f"{config.model_type}, {task}, {shape}",
            max_grad_norm=_MAX_GRAD_NORM,
        )

    def _resolve(self) -> tuple[Any, str]:
        """The configuration and the task, their modules imported."""
        os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it never asks the hub
        try:
            import transformers
        except ModuleNotFoundError as exc:
            raise MissingDependencyError("hf: targets need transformers: pip install 'autobatch-torch[hf]'") from exc
        transformers.logging.set_verbosity_error()
        config = _config(self.name)
        tasks = [task for task in TASKS if type(config) in _mapping(task)]
        if not tasks:
            allowed = f"hf: with an architecture for one of {', '.join(TASKS)}; write a function for others"
            raise InvalidArgumentError("target", self.title, allowed)
        task = self.options.task or tasks[0]
        if task not in tasks:
            raise InvalidArgumentError("task", task, f"one that {self.title} knows: {', '.join(tasks)}")
        if task == "image-classification":
            refuse(self.options, "seq_len", f"{self.title}, which takes images")
        else:
            refuse(self.options, "image_size", f"{self.title}, which takes text")
        _mapping(task)[type(config)]  # imports the model's own module
        return config, task


def _auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, _TASKS[task][0])


def _mapping(task: str) -> Any:
    import transformers

    return getattr(transformers, _TASKS[task][1])


def _config(name: str) -> Any:
    """The default configuration of the model type ``name``, or the one in the file or folder of that name."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if Path(name).exists():
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as exc:
            message = f"a transformers configuration ({_first_line(exc)})"
            raise InvalidArgumentError("target", f"hf:{name}", message) from exc
    known = list(CONFIG_MAPPING.keys())
    if name not in known:
        message = f"hf: with a model type of transformers or a local path; nearest: {nearest(name, known)}"
        raise InvalidArgumentError("target", f"hf:{name}", message)
    return CONFIG_MAPPING[name]()


def _first_line(exc: Exception) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)


def _prepare(config: Any, task: str, image_size: int | None) -> None:
    """Fills in what a checkpoint's configuration would say about training."""
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache of keys and values is for generating
    if task == "seq2seq-lm" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    if task == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # decoders look for the last token that is not padding
    if image_size is not None and hasattr(config, "image_size"):  # without it the model takes any size
        config.image_size = image_size


def _sample(
    task: str, model: nn.Module, config: Any, options: ModelOptions, device: str
) -> tuple[Callable[[int], dict[str, Any]], str]:
    """What makes batches for ``task``, and their shape for a person."""
    import torch

    if task == "image-classification":
        size = options.image_size or getattr(config, "image_size", None) or _DEFAULT_IMAGE_SIZE
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)

        def images(n: int) -> dict[str, Any]:
            return {
                "pixel_values": torch.rand(n, channels, height, width, device=device),
                "labels": torch.randint(config.num_labels, (n,), device=device),
            }

        return images, f"images {channels}x{height}x{width}"

    length = _sequence_length(model, config, options.seq_len)
    vocabulary = config.get_text_config().vocab_size

    def sequences(n: int) -> dict[str, Any]:
        ids = torch.randint(vocabulary, (n, length), device=device)
        batch = {"input_ids": ids, **_labels(task, ids, config.num_labels)}
        if task != "causal-lm":
            # One padded token, because sequences differ in length: an all-ones mask is dropped, and with it the
            # masked attention that training meets. Causal pre-training packs its blocks full and needs no mask.
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][-1, -1] = 0
        return batch

    return sequences, f"{length} tokens"


def _labels(task: str, ids: Any, classes: int) -> dict[str, Any]:
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


def _sequence_length(model: nn.Module, config: Any, wanted: int | None) -> int:
    """``wanted``, or what the configuration allows up to 1024 tokens."""
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
