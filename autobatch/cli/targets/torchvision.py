"""``torchvision:NAME``: a classification or segmentation model of torchvision with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.cli.targets.common import ModelOptions, nearest, trained
from autobatch.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    import torch

    from autobatch.probe.workload import Workload

_DEFAULT_IMAGE_SIZE = 224
_SEGMENTATION_IMAGE_SIZE = 520  # torchvision's own training scripts
_IMAGE_SIZES = {"inception_v3": 299}  # fixed by the architecture
_AUXILIARY_WEIGHT = 0.4
_CLASSES, _SEGMENTATION_CLASSES = 1000, 21


@dataclass(frozen=True, slots=True)
class TorchvisionTarget:
    """``name`` is a model of ``torchvision.models`` or ``torchvision.models.segmentation``."""

    name: str
    options: ModelOptions

    @property
    def title(self) -> str:
        return f"torchvision:{self.name}"

    def import_modules(self) -> None:
        self._segments()

    def __call__(self, device: str) -> Workload:
        segments = self._segments()
        import torch
        from torchvision import models

        default_size = _SEGMENTATION_IMAGE_SIZE if segments else _IMAGE_SIZES.get(self.name, _DEFAULT_IMAGE_SIZE)
        size = self.options.image_size or default_size
        with torch.device(device):
            model = models.get_model(self.name, weights=None, **self._arguments(size, segments))

        def sample(n: int) -> tuple[torch.Tensor, torch.Tensor]:
            images = torch.rand(n, 3, size, size, device=device)
            if segments:
                return images, torch.randint(_SEGMENTATION_CLASSES, (n, size, size), device=device)
            return images, torch.randint(_CLASSES, (n,), device=device)

        return trained(model, sample, self.options, name=f"{self.name}, images 3x{size}x{size}", loss_fn=_loss)

    def _segments(self) -> bool:
        """Whether the model segments, rather than classifies. Checks its name."""
        try:
            from torchvision import models
        except ModuleNotFoundError as exc:
            message = "torchvision: targets need torchvision: pip install 'autobatch-torch[vision]'"
            raise MissingDependencyError(message) from exc
        classifying, segmenting = models.list_models(module=models), models.list_models(module=models.segmentation)
        if self.name not in (*classifying, *segmenting):
            near = nearest(self.name, [*classifying, *segmenting])
            allowed = f"torchvision: followed by a classification or segmentation model; nearest: {near}"
            raise InvalidArgumentError("target", self.title, allowed)
        return self.name in segmenting

    def _arguments(self, size: int, segments: bool) -> dict[str, Any]:
        """What the builder must be told: transformers have a fixed image size, and two models warn without a flag."""
        if segments:
            return {"weights_backbone": None}
        if self.name.startswith("vit_"):
            return {"image_size": size}
        if self.name.startswith("maxvit"):
            return {"input_size": (size, size)}
        return {"init_weights": True} if self.name in ("googlenet", "inception_v3") else {}


def _loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the output, and of auxiliary heads where the model trains with them."""
    from torch.nn.functional import cross_entropy

    if isinstance(output, Mapping):
        outputs = [output["out"], *(value for key, value in output.items() if key != "out")]
    else:
        outputs = [value for value in output if value is not None] if isinstance(output, tuple) else [output]
    loss = cross_entropy(outputs[0], target)
    for auxiliary in outputs[1:]:
        loss = loss + _AUXILIARY_WEIGHT * cross_entropy(auxiliary, target)
    return loss
