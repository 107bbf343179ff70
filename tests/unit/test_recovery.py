"""A window that runs out of memory is repeated as if it never had."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch import Accumulator, DoesNotFitError
from autobatch.probe.state import fingerprint
from autobatch.training.recovery import Recovery
from tests.workloads.training import OUT, SUSPECT, Fails, linear, windows


class RunsOut(TorchDispatchMode):
    """Runs out of memory at the ``fail_at``-th operator, as an allocator would."""

    def __init__(self, fail_at: int, message: str = "CUDA out of memory. Tried to allocate 2 GiB.") -> None:
        super().__init__()
        self.left, self.message, self.failed = fail_at, message, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= func.namespace != "profiler"  # a mark that takes no memory
        if self.left == 0 and not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError(self.message)
        return func(*args, **(kwargs or {}))


class Noisy(nn.Module):
    """Draws random numbers and changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.full_like(x, random.random())
        out: Tensor = self.layers(x + noise * torch.randn_like(x))
        return out


def noisy(size: int, **options: Any) -> tuple[Noisy, Accumulator, torch.optim.Optimizer]:
    torch.manual_seed(3)
    random.seed(3)
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, Accumulator(model, optimizer, nn.MSELoss(), micro_batch_size=size, **options), optimizer


def operators_of_a_window() -> int:
    _, accumulator, _ = noisy(8)
    with RunsOut(10**9) as mode:
        accumulator.step(windows(1)[0])
    return 10**9 - mode.left


@pytest.mark.filterwarnings("ignore::autobatch.errors.AutobatchWarning")
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_every_operator_of_forward_and_backward_can_run_out_and_nothing_is_different(stride: int) -> None:
    """Bit-identical to a run that takes the smaller micro-batches from that window on."""
    batches, failed = windows(3), 0
    for fail_at in range(1, operators_of_a_window(), stride):
        told: list[Recovery] = []
        model, accumulator, optimizer = noisy(8, on_recovery=told.append)
        accumulator.step(batches[0])
        mode = RunsOut(fail_at)
        try:
            with mode:
                accumulator.step(batches[1])
        except DoesNotFitError as exc:
            assert "in the optimizer's step of window 1, which cannot be undone" in str(exc)  # noqa: PT017
            break
        accumulator.step(batches[2])
        reference, smaller, its_optimizer = noisy(8)
        smaller.step(batches[0])
        if told:
            failed += 1
            assert [(r.window, r.next_micro_batch_size) for r in told] == [(1, 4)]
            assert 4 < told[0].micro_batch_size <= 8
            assert told[0].message.startswith("CUDA out of memory")
            smaller.micro_batch_size = 4
        smaller.step(batches[1])
        smaller.step(batches[2])
        assert fingerprint(model, optimizer) == fingerprint(reference, its_optimizer)
    assert failed > 100 / stride


@pytest.mark.filterwarnings("ignore::autobatch.errors.AutobatchWarning")
def test_where_not_even_one_sample_fits_everything_is_as_before() -> None:
    model, accumulator, optimizer = noisy(4)
    model.eval()  # batch norm refuses one sample

    class Never(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    refused = Accumulator(model, optimizer, Never(), micro_batch_size=4)
    before = fingerprint(model, optimizer)
    with pytest.raises(DoesNotFitError, match="in window 0 not even one sample fits: CUDA out of memory"):
        refused.step(windows(1)[0])
    assert fingerprint(model, optimizer) == before
    assert accumulator.step(windows(1)[0]).stepped


@pytest.mark.filterwarnings("ignore::autobatch.errors.AutobatchWarning")
def test_it_grows_again_where_that_was_asked_for() -> None:
    batch = windows(1)[0]
    _, accumulator, _ = noisy(8, grow_after=2)
    with RunsOut(20):
        accumulator.step(batch)
    sizes = []
    for _ in range(4):
        sizes.append(accumulator.micro_batch_size)
        accumulator.step(batch)
    assert sizes == [4, 4, 8, 8]


@pytest.mark.parametrize("error", [OUT, SUSPECT, RuntimeError("too many INT_MAX elements")])
def test_what_means_memory_or_may_mean_it_is_tried_smaller_and_the_loss_is_put_back(error: Exception) -> None:
    model, accumulator = linear(loss := Fails(2, error))
    accumulator.step(windows(1)[0])
    reference, smaller = linear(Fails(0, error), size=4)
    smaller.step(windows(1)[0])
    assert torch.equal(model.weight, reference.weight)
    assert accumulator.micro_batch_size == 4
    assert loss.calls.item() == -(-len(windows(1)[0][0]) // 4)


@pytest.mark.parametrize(("error", "raised"), [(OUT, DoesNotFitError), (SUSPECT, RuntimeError)])
def test_a_window_that_is_given_up_says_nothing_of_the_next(error: Exception, raised: type[Exception]) -> None:
    class Always(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            raise error

    _, accumulator = linear(Always())
    with pytest.raises(raised):
        accumulator.step(windows(1)[0])
    assert accumulator.micro_batch_size == 8


def test_an_error_that_the_caller_is_handling_means_nothing_here() -> None:
    _, accumulator = linear(nn.MSELoss())
    try:
        raise OUT
    except torch.OutOfMemoryError:
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            accumulator.step((torch.ones(8, 5), torch.ones(8, 2)))
    assert accumulator.micro_batch_size == 8


def test_buffers_that_are_replaced_and_generators_are_put_back() -> None:
    class Drawing(nn.Linear):
        average: Tensor

        def __init__(self) -> None:
            super().__init__(6, 2)
            self.register_buffer("average", torch.zeros(2))
            self.generator = torch.Generator().manual_seed(5)

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x + torch.randn(6, generator=self.generator))
            self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
            return out + self.average

    def trained(loss_fn: Any, size: int) -> Drawing:
        torch.manual_seed(0)
        model = Drawing()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Accumulator(model, optimizer, loss_fn, micro_batch_size=size).step(windows(1)[0])
        return model

    ours, theirs = trained(Fails(2, OUT), 8), trained(Fails(0, OUT), 4)
    assert torch.equal(ours.average, theirs.average)
    assert torch.equal(ours.weight, theirs.weight)


def test_a_recovered_window_keeps_nothing_of_the_batch_alive() -> None:
    loss = Fails(2, torch.OutOfMemoryError("CUDA out of memory."))
    _, accumulator = linear(loss)
    gc.disable()
    try:
        x, y = windows(1)[0]
        batch = x.clone()
        alive = weakref.ref(batch)
        accumulator.step((batch, y))
        del batch, loss.error  # which keeps its own traceback
        assert alive() is None
    finally:
        gc.enable()


def test_another_error_flies_and_leaves_no_gradient() -> None:
    model, accumulator = linear(Fails(2, KeyError("row 5")))
    with pytest.raises(KeyError, match="row 5"):
        accumulator.step(windows(1)[0])  # amid the second micro-batch
    assert all(parameter.grad is None for parameter in model.parameters())
