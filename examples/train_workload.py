"""A training step of your own, for `autobatch probe examples/train_workload.py:build`.

Everything that a real run does and that takes memory belongs in the Workload: the model in training mode, its
optimizer, the loss, precision and clipping, and batches as large as the largest of the run.
"""

import torch
from torch import nn

from autobatch import Workload

VOCABULARY, LENGTH, WIDTH = 32_000, 512, 512


class Classifier(nn.Module):
    """Reads sequences of tokens and says which of ten classes they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=8, dim_feedforward=4 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=6)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.encoder(self.embedding(tokens))
        classes: torch.Tensor = self.head(hidden.mean(dim=1))
        return classes


def build(device: str) -> Workload:
    """The workload on ``device``: a torch device, or what a virtual GPU is called in its own process."""
    with torch.device(device):
        model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def sample(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(VOCABULARY, (n, LENGTH)), torch.randint(10, (n,))

    return Workload(model, optimizer, nn.functional.cross_entropy, sample, precision="bf16", max_grad_norm=1.0)
