"""Trains under torchrun: DistributedDataParallel, on NCCL where every rank has a GPU and on gloo elsewhere."""

import os

import torch
from plain import Rows, model_of, parse
from torch import distributed, nn

if __name__ == "__main__":
    options, rank = parse(), int(os.environ["LOCAL_RANK"])
    distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    model = nn.parallel.DistributedDataParallel(model_of(options.features, options.device))
    optimizer = torch.optim.AdamW(model.parameters())
    rows = Rows(options.samples, options.features)
    sampler = torch.utils.data.DistributedSampler(rows)
    loader = torch.utils.data.DataLoader(rows, options.batch_size, sampler=sampler, collate_fn=lambda batch: batch)
    for number, (inputs, labels) in enumerate(loader, 1):
        loss = nn.functional.cross_entropy(model(inputs.to(options.device)), labels.to(options.device))
        (loss / options.accumulation_steps).backward()
        if number % options.accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    distributed.destroy_process_group()
