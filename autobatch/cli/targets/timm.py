"""``timm:NAME``: an image model of timm with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autobatch.cli.targets.common import ModelOptions, nearest, trained
from autobatch.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    import torch

    from autobatch.probe.workload import Workload


@dataclass(frozen=True, slots=True)
class TimmTarget:
    """``name`` is a model of timm, with or without the tag of its weights."""

    name: str
    options: ModelOptions

    @property
    def title(self) -> str:
        return f"timm:{self.name}"

    def import_modules(self) -> None:
        try:
            import timm
        except ModuleNotFoundError as exc:
            raise MissingDependencyError("timm: targets need timm: pip install 'autobatch-torch[vision]'") from exc
        architecture = self.name.partition(".")[0]
        if not timm.is_model(architecture):
            allowed = f"timm: followed by a model of timm; nearest: {nearest(architecture, timm.list_models())}"
            raise InvalidArgumentError("target", self.title, allowed)

    def __call__(self, device: str) -> Workload:
        self.import_modules()
        import timm
        import torch
        from torch.nn.functional import cross_entropy

        with torch.device(device):
            model = timm.create_model(self.name, pretrained=False, **self._arguments())
        channels, height, width = self._input_size(model)
        classes = model.num_classes

        def sample(n: int) -> tuple[torch.Tensor, torch.Tensor]:
            images = torch.rand(n, channels, height, width, device=device)
            return images, torch.randint(classes, (n,), device=device)

        name = f"{self.name}, images {channels}x{height}x{width}"
        return trained(model, sample, self.options, name=name, loss_fn=cross_entropy)

    def _arguments(self) -> dict[str, Any]:
        import timm

        described = timm.get_pretrained_cfg(self.name, allow_unregistered=True)
        if self.options.image_size is not None and described is not None and described.fixed_input_size:
            return {"img_size": self.options.image_size}
        return {}

    def _input_size(self, model: Any) -> tuple[int, int, int]:
        channels, height, width = model.pretrained_cfg["input_size"]
        size = self.options.image_size
        return (channels, size, size) if size is not None else (channels, height, width)
