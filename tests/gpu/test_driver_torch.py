"""What of torch runs on the session's GPU: everything here is true of a real one too."""

import os
import time

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.gpu

MIB = 2**20
OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.RMSprop, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
]
FORMS = [{"foreach": True}, {"foreach": False}, {"fused": True}]


def held(function):
    """Bytes that ``function``'s result keeps on the GPU."""
    before = torch.cuda.memory_allocated()
    result = function()
    after = torch.cuda.memory_allocated()
    del result
    return after - before


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_optimizers_take_a_step_and_keep_their_state(kind, options, form):
    if "fused" in form and kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        pytest.skip("has no fused form")
    net = nn.Linear(512, 512, device="cuda")
    optimizer = kind(net.parameters(), lr=0.1, **options, **form)
    net(torch.randn(4, 512, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert sum(value.numel() for value in states if value.is_cuda) >= 512 * 512
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_grad_scaler_lets_steps_through(form):
    # The flag of infinite gradients is filled by a kernel, in memory that held something else: small copies here.
    for _ in range(50):
        torch.ones(1, dtype=torch.long).cuda()
    net = nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.AdamW(net.parameters(), **form)
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0)  # or real gradients overflow, and real steps are left out
    for _ in range(2):
        with torch.autocast("cuda", torch.float16):
            loss = net(torch.randn(4, 64, device="cuda")).float().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "dropout": 0.1}, {"bias": False}])
def test_recurrent_networks(kind, options):
    net = kind(32, 48, batch_first=True, **options).cuda()
    x = torch.randn(3, 7, 32, device="cuda", requires_grad=True)
    output, _ = net(x)
    output.sum().backward()
    assert output.shape == (3, 7, 96 if "bidirectional" in options else 48)
    assert x.grad.shape == x.shape
    # One flat buffer, which the parameters are views of: cuDNN's layout was understood.
    pointers = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    assert len(pointers) == 1
    elements = sum(parameter.numel() for parameter in net.parameters())
    assert net.weight_hh_l0.untyped_storage().nbytes() >= 4 * elements


def test_a_projected_lstm_and_packed_sequences():
    net = nn.LSTM(16, 32, proj_size=8).cuda()
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(7, 3, 16, device="cuda"), torch.tensor([7, 5, 2]))
    output, (hidden, cell) = net(packed)
    output.data.sum().backward()
    assert (output.data.shape, hidden.shape, cell.shape) == ((14, 8), (1, 3, 8), (1, 3, 32))


def test_what_a_recurrent_network_keeps_for_its_backward_grows_with_the_batch():
    net = nn.LSTM(64, 64).cuda()
    small = held(lambda: net(torch.randn(10, 64, 64, device="cuda")))
    large = held(lambda: net(torch.randn(10, 640, 64, device="cuda")))
    gates = 10 * 640 * 64 * 4 * 4
    assert gates < large < 4 * gates
    assert 8 * small < large < 12 * small


def test_convolutions_in_both_layouts():
    for layout in (torch.contiguous_format, torch.channels_last):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 3)).cuda()
        x = torch.randn(2, 3, 16, 16, device="cuda").to(memory_format=layout).requires_grad_()
        output = net.to(memory_format=layout)(x)
        output.sum().backward()
        assert x.grad.shape == x.shape
        assert output.is_contiguous(memory_format=layout)
    nn.Conv3d(3, 8, 3).cuda()(torch.randn(1, 3, 8, 8, 8, device="cuda", requires_grad=True)).sum().backward()


def test_benchmarked_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    nn.Conv2d(3, 8, 3).cuda()(torch.randn(2, 3, 32, 32, device="cuda", requires_grad=True)).sum().backward()


def test_small_copies_are_real():
    values = torch.arange(1000, dtype=torch.float32)
    there = values.cuda()
    assert torch.equal(there.cpu(), values)
    assert there[7].item() == 7
    other = torch.empty_like(there)
    other.copy_(there)
    assert torch.equal(other.cpu(), values)
    del there, other
    assert torch.zeros((), device="cuda").item() == 0  # in memory that held something else


def test_copies_between_strided_views():
    values = torch.arange(64, dtype=torch.float32).view(8, 8)
    there = torch.zeros(8, 16, device="cuda")
    there[:, :8].copy_(values)
    assert there.shape == (8, 16)


def test_a_large_copy_costs_its_bytes_and_comes_back():
    there = torch.ones(64 * MIB, dtype=torch.uint8).cuda()
    assert there.numel() == 64 * MIB
    assert there.cpu().shape == there.shape


def test_events_tell_time():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.05)
    end.record()
    end.synchronize()
    assert end.query()
    assert 45 < start.elapsed_time(end) < 5000
    with pytest.raises((RuntimeError, ValueError)):
        start.elapsed_time(torch.cuda.Event(enable_timing=True))


def test_streams():
    stream = torch.cuda.Stream(priority=-1)
    assert stream.priority == -1
    assert stream != torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.randn(1000, 1000, device="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    x.record_stream(torch.cuda.current_stream())
    stream.synchronize()
    assert stream.query()


def test_pinned_memory():
    assert torch.empty(10, pin_memory=True).is_pinned()
    assert not torch.empty(10).is_pinned()
    assert torch.ones(10).pin_memory()[3:].is_pinned()
    assert torch.ones(10).pin_memory().sum() == 10


# Each that is spawned imports all of it again.
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_data_loader_workers(method, workers):
    torch.zeros(1, device="cuda")  # a fork after that is the case that matters
    data = torch.utils.data.TensorDataset(torch.arange(64.0))
    loader = torch.utils.data.DataLoader(
        data, batch_size=8, num_workers=workers, pin_memory=True, multiprocessing_context=method
    )
    batches = [batch for (batch,) in loader]
    assert all(batch.is_pinned() for batch in batches)
    assert torch.equal(torch.cat(batches), torch.arange(64.0))
    assert batches[0].cuda(non_blocking=True).shape == (8,)


def test_memory_history_and_snapshot():
    torch.cuda.memory._record_memory_history()
    try:
        kept = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    events = [event for trace in snapshot["device_traces"] for event in trace]
    assert any(event["action"] == "alloc" and event["size"] == 30 * MIB for event in events)
    assert any(segment["total_size"] >= kept.numel() for segment in snapshot["segments"])


def test_graphs_keep_their_memory_apart():
    net = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512)).cuda()
    optimizer = torch.optim.Adam(net.parameters(), capturable=True)
    x = torch.randn(256, 512, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            net(x).sum().backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    assert not torch.cuda.is_current_stream_capturing()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        net(x).sum().backward()
        optimizer.step()
    assert not torch.cuda.is_current_stream_capturing()
    graph.replay()
    torch.cuda.synchronize()
    pools = {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}
    assert tuple(graph.pool()) in {tuple(pool) for pool in pools}


def test_run_time_compiled_kernels():
    multiply = torch.cuda.jiterator._create_jit_fn("template <typename T> T multiply(T x, T y) { return x * y; }")
    assert multiply(torch.ones(3, device="cuda"), torch.ones(3, device="cuda")).shape == (3,)
    assert nn.init.trunc_normal_(torch.empty(5, 5, device="cuda")).shape == (5, 5)


def test_linear_algebra_and_transforms():
    a = torch.eye(8, device="cuda").expand(3, 8, 8).contiguous()
    assert torch.linalg.qr(a).Q.shape == torch.linalg.inv(a).shape == a.shape
    assert torch.linalg.svd(a).S.shape == torch.linalg.eigvalsh(a).shape == (3, 8)
    assert torch.linalg.cholesky(a).shape == a.shape
    assert torch.fft.rfft2(torch.randn(4, 64, 64, device="cuda")).shape == (4, 64, 33)
    assert torch.stft(torch.randn(2, 4000, device="cuda"), 400, return_complex=True).shape == (2, 201, 41)


def test_sparse_matrices():
    sparse = torch.eye(5).to_sparse_csr().cuda()
    assert (sparse @ torch.randn(5, 3, device="cuda")).shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_not_quadratic_in_memory(dtype, causal):
    query = torch.randn(1, 4, 4096, 64, device="cuda", dtype=dtype, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nn.functional.scaled_dot_product_attention(query, query, query, is_causal=causal).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * 4096 * 4096 * 2
    assert query.grad.shape == query.shape


def test_processes_are_listed():
    torch.zeros(1, device="cuda")
    assert str(os.getpid()) in torch.cuda.list_gpu_processes()


def test_the_profiler_runs():
    with torch.profiler.profile(profile_memory=True) as profile:
        nn.Linear(10, 10, device="cuda")(torch.randn(3, 10, device="cuda")).sum().backward()
    assert "aten::linear" in {event.key for event in profile.key_averages()}


def test_out_of_memory_names_its_bytes_and_leaves_everything_usable():
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate 4096.00 GiB"):
        torch.empty(2**42, dtype=torch.uint8, device="cuda")
    assert torch.empty(10, device="cuda").shape == (10,)


@pytest.mark.slow
def test_compiled_networks_forward_and_backward():
    net = torch.compile(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).cuda())
    for batch in (8, 8, 16):
        net(torch.randn(batch, 64, device="cuda")).sum().backward()
    net = nn.Linear(64, 64).cuda()
    graphed = torch.compile(net, mode="reduce-overhead")
    for _ in range(4):
        graphed(torch.randn(8, 64, device="cuda")).sum().backward()
        net.zero_grad()
