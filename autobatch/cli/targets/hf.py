"""``hf:NAME``: an architecture of transformers with its default or a local configuration, and random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.targets.common import ModelOptions, nearest, refuse, trained
from autobatch.cli.targets.hf_batches import image_batches, sequence_length, text_batches
from autobatch.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
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

_FULL_BLOCKS = "autobatch_full_blocks"
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
        if task == "image-classification":
            sample, shape = image_batches(config, self.options.image_size, device)
        else:
            length = sequence_length(model, config, self.options.seq_len)
            sample, shape = text_batches(task, config, length, device), f"{length} tokens"
            if task == "causal-lm":
                _attend_to_full_blocks(model, length)
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
            allowed = f"hf: followed by an architecture for one of {', '.join(TASKS)}; write a function for others"
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
        message = f"hf: followed by a transformers model type or a local path; nearest: {nearest(name, known)}"
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


def _attend_to_full_blocks(model: Any, length: int) -> None:
    """Causal attention without a mask, as blocks that are packed full get it.

    transformers finds that out by reading values, which on a virtual GPU are zero and look like padding: attention with
    a mask, which keeps a copy of it in every layer. Its extension point for attention without masks reads nothing.
    """
    import transformers

    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if model.config._attn_implementation != "sdpa" or any(window and window <= length for window in windows):
        return
    transformers.AttentionInterface.register(_FULL_BLOCKS, transformers.AttentionInterface()["sdpa"])
    model.set_attn_implementation(_FULL_BLOCKS)
