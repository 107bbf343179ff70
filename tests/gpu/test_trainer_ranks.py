"""Trainer under torchrun with nccl, on GPUs of 24 and 16 GB that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from autobatch.training.checkpoint import WEIGHTS, newest
from tests.gpu.machines import Forks
from tests.gpu.test_find_ranks import ranks

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

FIT = """
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 1024
    def __getitem__(self, index):
        return torch.zeros(512, 1024, device="cuda"), torch.zeros(512, 1024, device="cuda")

class Loss(nn.Module):
    def forward(self, output, target):
        return mse_loss(output, target)

if __name__ == "__main__":
    from autobatch import Trainer
    rank = int(os.environ["LOCAL_RANK"])
    device = f"cuda:{rank}"
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    model = layers(device)
    optimizer = torch.optim.AdamW(model.parameters())
    events = []
    trainer = Trainer(
        model, optimizer, Loss(), effective_batch_size=512, progress=False, callbacks=[events.append],
        find_options={"per_rank": sys.argv[1] == "per_rank", "headroom": 0.02, "max_batch_size": 256},
    )
    report = trainer.fit(Rows(), epochs=1)
    samples = [event.window.samples for event in events if event.window]
    recovered = sum(event.kind == "recovered" for event in events)
    parts = [event.window.micro_batches for event in events if event.window]
    sys.stdout.write(json.dumps([rank, report.micro_batch_size, samples, parts, recovered]) + "\\n")
    leave()
"""


def test_both_train_with_the_size_that_fits_the_smaller(forks: Forks, tmp_path: Path) -> None:
    (_, large, *first), (_, small, *second) = ranks(forks, tmp_path, FIT, "agreed")
    assert large == small
    assert first == second == [[512, 512], [-(-256 // small)] * 2, 0]


@pytest.mark.slow
def test_each_trains_with_its_own_size_in_as_many_micro_batches(forks: Forks, tmp_path: Path) -> None:
    (_, large, *first), (_, small, *second) = ranks(forks, tmp_path, FIT, "per_rank")
    assert large / small == pytest.approx(24 / 16, rel=0.15)
    assert first == second
    assert (first[0], first[2]) == ([512, 512], 0)


SHARDED = """
if __name__ == "__main__":
    from autobatch import Trainer
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    rank, folder = int(os.environ["LOCAL_RANK"]), sys.argv[1]
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    ended = []
    for epochs in (1, 2):
        model = layers(f"cuda:{rank}")
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        trainer = Trainer(
            model, optimizer, mse_loss, effective_batch_size=8, micro_batch_size=2, checkpoint=folder, progress=False,
        )
        rows = torch.utils.data.TensorDataset(torch.zeros(16, 512, 1024), torch.zeros(16, 512, 1024))
        report = trainer.fit(rows, epochs=epochs)
        state = next(iter(optimizer.state.values()))["exp_avg"]
        ended.append([len(report.losses), isinstance(state, DTensor), str(state.device)])
    sys.stdout.write(json.dumps([rank, *ended]) + "\\n")
    leave()
"""


def test_a_sharded_model_is_whole_in_its_checkpoint_and_each_rank_takes_its_part(forks: Forks, tmp_path: Path) -> None:
    for rank, told in enumerate(ranks(forks, tmp_path, SHARDED, str(tmp_path / "run"))):
        assert told == [rank, [1, True, f"cuda:{rank}"], [2, True, f"cuda:{rank}"]]
    weights = load_file(newest(tmp_path / "run")[0] / WEIGHTS)
    assert weights["0.linear1.weight"].shape == (4096, 1024)
