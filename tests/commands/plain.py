"""A training script as many are: argparse, a DataLoader with workers, a loop. It knows nothing of autobatch."""

import argparse

import torch
from torch import nn


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--accumulation-steps", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--out", default=None)
    return parser.parse_args()


class Rows(torch.utils.data.Dataset):
    def __init__(self, count, features):
        self.count, self.features = count, features

    def __len__(self):
        return self.count

    def __getitems__(self, indices):  # whole batches at once, so that the data costs no time
        return torch.zeros(len(indices), self.features), torch.zeros(len(indices), dtype=torch.long)


def model_of(features, device):
    layers = (layer for _ in range(4) for layer in (nn.Linear(features, features), nn.ReLU()))
    return nn.Sequential(*layers, nn.Linear(features, 10)).to(device)


def train(options):
    rows = Rows(options.samples, options.features)
    loader = torch.utils.data.DataLoader(
        rows, options.batch_size, num_workers=options.workers, collate_fn=lambda batch: batch
    )
    model = model_of(options.features, options.device)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(10):
        for number, (inputs, labels) in enumerate(loader, 1):
            loss = nn.functional.cross_entropy(model(inputs.to(options.device)), labels.to(options.device))
            (loss / options.accumulation_steps).backward()
            if number % options.accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    options = parse()
    try:
        train(options)
    finally:
        if options.out:
            torch.save({}, f"{options.out}/last.pt")
