"""A training script that knows nothing of autobatch: `autobatch probe -- python train.py --batch-size {batch_size}`."""

import argparse
from pathlib import Path

import torch
import torchvision

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--accumulation-steps", type=int, default=1)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--samples", type=int, default=100_000)
parser.add_argument("--out", type=Path, default=Path())


def main() -> None:
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torchvision.datasets.FakeData(options.samples, transform=torchvision.transforms.ToTensor())
    loader = torch.utils.data.DataLoader(data, options.batch_size, shuffle=True, num_workers=2)
    model = torchvision.models.resnet18().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(options.epochs):
        for number, (images, labels) in enumerate(loader):
            loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            if number % options.accumulation_steps == 0:
                optimizer.zero_grad()
            (loss / options.accumulation_steps).backward()
            if (number + 1) % options.accumulation_steps == 0:
                optimizer.step()
        torch.save(model.state_dict(), options.out / "model.pt")


if __name__ == "__main__":
    main()
