import torch
import torchvision

import autobatch


def build(device):
    with torch.device(device):
        model = torchvision.models.resnet50()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def batch(n):
        return torch.zeros(n, 3, 224, 224), torch.zeros(n, dtype=torch.long)

    return autobatch.Workload(model, optimizer, torch.nn.functional.cross_entropy, batch, precision="bf16")


if __name__ == "__main__":
    print(autobatch.find(build, device="a100-40gb"))
