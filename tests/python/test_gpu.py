"""What only a GPU has: streams, graphs, failures that are known late, the cost of Python."""
import gc
import importlib.util
import os
import time

import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402
from conftest import ROOT  # noqa: E402
from reference import expected, in_rank, numbered, routing  # noqa: E402

pytestmark = pytest.mark.skipif(world.DEVICE != "cuda", reason="no GPU")
H, K = 256, 2


def made(group, device, seed, tokens=64):
    rank, ranks = group.rank(), group.size()
    experts = 4 * ranks
    everybody = [(numbered(r, tokens, H), *routing(seed, r, tokens, K, experts)) for r in range(ranks)]
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    return x, ids, weights, expected(rank, ranks, experts, everybody)[0], experts


def streams(group, device):
    """Asynchronous calls in a chain on the comm stream, allocated there; a side stream; sync and async in turn."""
    buffer = epx.Buffer(group, 1 << 26)
    for seed in range(20):
        x, ids, weights, want, experts = made(group, device, seed)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if seed % 3 == 0 else torch.cuda.current_stream()):
            event = epx.Buffer.capture()
            *placed, event = buffer.get_dispatch_layout(ids, experts, previous_event=event, async_finish=True,
                                                        allocate_on_comm_stream=True)
            per_rank, _, per_expert, mask = placed
            recv, _, recv_weights, _, handle, event = buffer.dispatch(
                x, topk_idx=ids, topk_weights=weights, num_tokens_per_rank=per_rank, is_token_in_rank=mask,
                num_tokens_per_expert=per_expert, previous_event=event, async_finish=True, allocate_on_comm_stream=True)
            out, out_weights, event = buffer.combine(recv, handle, topk_weights=recv_weights, previous_event=event,
                                                     async_finish=True, allocate_on_comm_stream=True)
            again, *_ = buffer.dispatch(x, handle=handle)  # synchronous, while the others may still run
            with event:
                busy = torch.ones(1024, 1024, device=device).mm(torch.ones(1024, 1024, device=device))
            assert recv.cpu().equal(want) and again.cpu().equal(want)
            fan = mask.sum(1, keepdim=True)
            assert out.equal((x.float() * fan).bfloat16())
            del busy
        torch.cuda.current_stream().wait_stream(side)
    buffer.destroy()


def busy(milliseconds):
    """Keep the current stream busy for about so long."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


def lease_order(group, device):
    """A lease made by a call on the communication stream goes back after its owner's own work on it: the next call, which
    waits for an older event alone, must not have its rows put where the current stream still reads."""
    x, ids, weights, want, experts = made(group, device, 1, tokens=256)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    buffer, y = epx.Buffer(group, 1 << 24), x + 1
    keys = dict(topk_idx=ids, num_tokens_per_expert=counts, async_finish=True, allocate_on_comm_stream=True)
    for _ in range(5):
        early = epx.Buffer.capture()
        recv, _, _, _, handle, event = buffer.dispatch(x, previous_event=early, **keys)
        event.current_stream_wait()
        busy(20)
        copy, where = recv.clone(), recv.data_ptr()
        del recv, handle
        other, _, _, _, handle, event = buffer.dispatch(y, previous_event=early, **keys)
        event.current_stream_wait()
        assert other.data_ptr() == where  # else this shows nothing
        assert copy.cpu().equal(want)
        del other, handle, copy
    buffer.destroy()


def dropped_elsewhere(group, device):
    """Received on one stream, used and dropped on another: the next call on the first must not have its rows put where the
    second still reads."""
    x, ids, weights, want, experts = made(group, device, 1, tokens=256)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    buffer, y, main, side = epx.Buffer(group, 1 << 24), x + 1, torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    for _ in range(5):
        with torch.cuda.stream(side):
            recv, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts)
        main.wait_stream(side)
        busy(20)
        copy, where = recv.clone(), recv.data_ptr()
        del recv
        with torch.cuda.stream(side):
            other, *_ = buffer.dispatch(y, handle=handle)
            assert other.data_ptr() == where  # else this shows nothing
            del other, handle
        assert copy.cpu().equal(want)
    buffer.destroy()


def ordinary_memory_order(group, device):
    """Without room in the window results are torch's memory. A call that waits for an older event alone must not be given a
    block that the current stream is still to write."""
    x, ids, weights, want, experts = made(group, device, 2, tokens=256)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    buffer, y = epx.Buffer(group, 2 << 20), x + 1
    hog = buffer.get_local_buffer_tensor(torch.uint8)  # all of the window that one call can have
    keys = dict(topk_idx=ids, num_tokens_per_expert=counts)
    *_, handle, _ = buffer.dispatch(x, **keys)
    for asynchronous in (True, False):
        for _ in range(3):
            early = epx.Buffer.capture()
            busy(20)
            old = [torch.full((len(want), H), 9, dtype=x.dtype, device=device) for _ in range(4)]
            del old  # free for the current stream, though written only in 20 ms
            recv, *_, event = buffer.dispatch(x, handle=handle, previous_event=early, async_finish=asynchronous)
            event.current_stream_wait()
            torch.cuda.synchronize()
            assert recv.cpu().equal(want)
            out, _, event = buffer.combine(recv, handle, previous_event=epx.Buffer.capture(), async_finish=asynchronous)
            event.current_stream_wait()
            fan = in_rank(ids.cpu(), experts, group.size()).sum(1, keepdim=True).to(device)
            assert out.equal((x.float() * fan).bfloat16())
            # What came on the communication stream is used here and dropped here: its block is not taken before that.
            busy(20)
            kept = recv.clone()
            del recv
            again, *_ = buffer.dispatch(y, handle=handle, previous_event=early, async_finish=True)
            assert kept.cpu().equal(want)
            del again
    del hog
    buffer.destroy()


def graph_keeps_its_places(group, device):
    """What was dropped while a graph was captured is not given to later calls: a replay writes there."""
    ranks = group.size()
    buffer = epx.Buffer(group, 1 << 26, handles_max=16)
    x, ids, weights, want, experts = made(group, device, 0)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    keys = dict(num_tokens_per_expert=counts, num_worst_tokens=64 * ranks)

    def step():
        recv, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **keys)
        return buffer.combine(recv, handle)[0]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    gc.collect()
    y, other_ids, _, other, _ = made(group, device, 5)
    kept = [buffer.dispatch(y, topk_idx=other_ids, num_tokens_per_expert=counts) for _ in range(8)]
    for seed in range(3):
        x2, ids2, weights2, _, _ = made(group, device, seed)
        x.copy_(x2), ids.copy_(ids2), weights.copy_(weights2)
        graph.replay()
        fan = in_rank(ids2.cpu(), experts, ranks).sum(1, keepdim=True).to(device)
        assert out.equal((x2.float() * fan).bfloat16())
    fan = in_rank(other_ids.cpu(), experts, ranks).sum(1, keepdim=True).to(device)
    for recv, _, _, _, handle, _ in kept:
        assert recv.cpu().equal(other)
        assert buffer.combine(recv, handle)[0].equal((y.float() * fan).bfloat16())
        assert handle[3].numel() == len(other)
    buffer.status()
    del graph
    buffer.destroy()


def cached_graph(group, device):
    """A cached dispatch with a handle made outside, and its combine, captured together with a call on the communication
    stream; tables read afterwards."""
    x, ids, weights, want, experts = made(group, device, 3)
    buffer = epx.Buffer(group, 1 << 26)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    *_, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts)
    fan = handle[4].sum(1, keepdim=True)

    def step():
        recv, *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
        event.current_stream_wait()
        out, _, event = buffer.combine(recv, handle, previous_event=epx.Buffer.capture(), async_finish=True,
                                       allocate_on_comm_stream=True)
        event.current_stream_wait()
        return recv, out
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recv, out = step()
    for add in range(4):
        x.add_(1)
        graph.replay()
        assert out.equal((x.float() * fan).bfloat16())
    assert handle.core.captured and handle[0].shape == (group.size(), group.size())
    buffer.status()
    del graph
    buffer.destroy()


def hook_defers(group, device):
    """The receive half is not on the stream before hook(): rank 0 is through with its own half long before rank 1 sends."""
    if not epx._abi.library().has_ll:
        pytest.skip("no low latency in this build of libepx.so")
    rank, ranks = group.rank(), group.size()
    x, ids, weights, want, experts = made(group, device, 0)
    buffer = epx.Buffer(group, low_latency_mode=True)
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 64, experts, use_fp8=False)
    buffer.low_latency_combine(recv, ids, weights, handle)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    begun = time.monotonic()
    if rank == ranks - 1:
        time.sleep(0.6)
    recv, count, handle, _, hook = buffer.low_latency_dispatch(x, ids, 64, experts, use_fp8=False, return_recv_hook=True)
    torch.cuda.synchronize()
    if rank != ranks - 1:
        assert time.monotonic() - begun < 0.4
    hook()
    torch.cuda.synchronize()
    assert ranks == 1 or time.monotonic() - begun > 0.5
    assert int(count.sum()) > 0
    # Nobody calls the hook of the next one: it is received when it is dropped, into memory that is still its own.
    buffer.low_latency_combine(recv, ids, weights, handle)
    got = buffer.low_latency_dispatch(x, ids, 64, experts, use_fp8=False, return_recv_hook=True)
    shape = got[0].shape
    del got
    others = [torch.full(shape, 77, dtype=torch.bfloat16, device=device) for _ in range(2)]
    torch.cuda.synchronize()
    assert all(bool((one == 77).all()) for one in others)
    buffer.status()
    buffer.destroy()


def other_device(group, device):
    """A buffer on another GPU than the current one: its own streams, events and memory all the same."""
    if world.GPUS < group.size() + 1:
        pytest.skip("it needs a GPU more than ranks")
    there = torch.device("cuda", world.GPUS - 1)
    buffer = epx.Buffer(unique_id=epx.unique_id(), rank=0, ranks=1, num_nvl_bytes=1 << 24, device=there.index)
    assert torch.cuda.current_device() == 0 and buffer.runtime.get_local_device_id() == there.index
    x, ids, weights, want, experts = made(group, there, 1)
    counts = torch.zeros(experts, dtype=torch.int32, device=there)
    for asynchronous in (False, True):
        recv, _, _, _, handle, event = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts,
                                                       async_finish=asynchronous)
        event.current_stream_wait()
        assert recv.device == there and recv.cpu().equal(want)
        out, _, event = buffer.combine(recv, handle, async_finish=asynchronous)
        event.current_stream_wait()
        assert out.equal((x.float() * handle[4].sum(1, keepdim=True)).bfloat16())
    assert torch.cuda.current_device() == 0
    with pytest.raises(epx.InvalidArgument, match="x: it is on cuda:0"):
        buffer.dispatch(x.to("cuda:0"), handle=handle)
    buffer.destroy()


def masked_on_comm(group, device):
    """By the mask alone, the counts still on their way on the communication stream."""
    x, ids, weights, want, experts = made(group, device, 4)
    buffer = epx.Buffer(group, 1 << 26)
    for _ in range(5):
        busy(20)
        later = ids.clone()
        _, _, per_expert, mask, event = buffer.get_dispatch_layout(later, experts, previous_event=epx.Buffer.capture(),
                                                                   async_finish=True, allocate_on_comm_stream=True)
        recv, _, _, counts, _, event = buffer.dispatch(x, is_token_in_rank=mask, num_tokens_per_expert=per_expert,
                                                       previous_event=event, async_finish=True,
                                                       allocate_on_comm_stream=True)
        event.current_stream_wait()
        assert recv.cpu().equal(want) and sum(counts) >= len(want) > 0
    buffer.destroy()


def nothing_at_all(group, device):
    """A rank with no tokens, biases and all; results of no rows."""
    buffer = epx.Buffer(group, 1 << 22)
    experts = group.size()
    x = torch.empty((0, H), dtype=torch.bfloat16, device=device)
    ids, weights = torch.empty((0, K), dtype=torch.int64, device=device), torch.empty((0, K), device=device)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    recv, recv_ids, recv_weights, rows, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights,
                                                                    num_tokens_per_expert=counts)
    assert recv.shape == (0, H) and recv.device == device and rows == [0]
    out, out_weights, _ = buffer.combine(recv, handle, topk_weights=recv_weights, bias=(x, x.clone()))
    assert out.shape == (0, H) and out_weights.shape == (0, K)
    assert [tuple(t.shape) for t in handle][3:] == [(0,), (0, experts), (0, experts)]
    torch.cuda.synchronize()
    buffer.status()
    buffer.destroy()


def worst_case_graph(group, device):
    """Dispatch (worst case) and combine captured once, replayed with other routing."""
    ranks = group.size()
    buffer = epx.Buffer(group, 1 << 26)
    x, ids, weights, want, experts = made(group, device, 0)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)

    def step():
        recv, recv_ids, recv_weights, _, handle, _ = buffer.dispatch(
            x, topk_idx=ids, topk_weights=weights, num_tokens_per_expert=counts, num_worst_tokens=64 * ranks)
        return recv, recv_ids, buffer.combine(recv, handle)[0], handle
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recv, recv_ids, out, handle = step()
    for seed in range(30):
        x2, ids2, weights2, want, _ = made(group, device, seed)
        x.copy_(x2), ids.copy_(ids2), weights.copy_(weights2)
        graph.replay()
        n = len(want)
        assert recv[:n].cpu().equal(want) and bool((recv_ids[n:] == -1).all())
        fan = in_rank(ids2.cpu(), experts, ranks).sum(1, keepdim=True).to(device)
        assert out.equal((x2.float() * fan).bfloat16())
    buffer.status()
    del graph
    buffer.destroy()


def low_latency_graph(group, device):
    """The low-latency pair captured once, replayed with other routing."""
    if not epx._abi.library().has_ll:
        pytest.skip("no low latency in this build of libepx.so")
    ranks = group.size()
    x, ids, weights, want, experts = made(group, device, 0)
    size = epx.Buffer.get_low_latency_rdma_size_hint(64, H, ranks, experts)
    buffer = epx.Buffer(group, num_rdma_bytes=size, low_latency_mode=True)

    def step():
        recv, count, handle, _, hook = buffer.low_latency_dispatch(x, ids, 64, experts, use_fp8=False,
                                                                   return_recv_hook=True)
        hook()
        out, _, hook = buffer.low_latency_combine(recv, ids, weights, handle, return_recv_hook=True)
        hook()
        return recv, count, out
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recv, count, out = step()
    for seed in range(30):
        x2, ids2, weights2, _, _ = made(group, device, seed)
        x.copy_(x2), ids.copy_(ids2), weights.copy_(weights2)
        graph.replay()
        want = torch.zeros(x.shape, dtype=torch.float32, device=device)
        for k in range(K):
            want = torch.where(ids2[:, k:k + 1] < 0, want, want + weights2[:, k:k + 1] * x2.float())
        assert (out.float() - want).abs().max() <= 2 ** -7 * want.abs().max()
    buffer.status()
    del graph
    buffer.destroy()


def late(group, device):
    """A rank that stays away is known at a later touch, in words; the CUDA context lives on."""
    x, ids, weights, want, experts = made(group, device, 0)
    buffer = epx.Buffer(group, 1 << 26)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    *_, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts)
    buffer.barrier()
    if group.rank() == 0:
        with pytest.raises(epx.Error) as caught:
            for _ in range(100):
                buffer.dispatch(x, handle=handle)
                torch.cuda.synchronize()
                buffer.status()
        assert isinstance(caught.value, (epx.Timeout, epx.PeerFailure)) and "1" in str(caught.value)
    else:
        time.sleep(4)
    buffer.destroy()
    assert float(torch.ones(4, device=device).sum()) == 4


def cost(group, device):
    """Microseconds that a cached dispatch and a combine take the host, for the log."""
    x, ids, weights, want, experts = made(group, device, 0)
    buffer = epx.Buffer(group, 1 << 26)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    recv, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts)
    took = []
    for call in (lambda: buffer.dispatch(x, handle=handle), lambda: buffer.combine(recv, handle)):
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            call()
        took.append((time.perf_counter() - start) / 50 * 1e6)
        torch.cuda.synchronize()
    script = importlib.util.spec_from_file_location("python_cost", os.path.join(ROOT, "bench", "python_cost.py"))
    bench = importlib.util.module_from_spec(script)
    script.loader.exec_module(bench)
    figures = bench.measure(buffer, device, 1024, 2048, 8, 32 * group.size())
    if epx._abi.library().has_ll:
        figures.update(bench.low_latency(buffer, device, 64, 2048, 8, 32 * group.size()))
    buffer.destroy()
    return took, bench.report(figures)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("function", [streams, lease_order, dropped_elsewhere, ordinary_memory_order,
                                      graph_keeps_its_places, cached_graph, hook_defers, masked_on_comm, nothing_at_all,
                                      worst_case_graph, low_latency_graph])
def test_gpu(function, ranks):
    world.run(ranks, function)


def test_other_device():
    world.run(1, other_device)


def test_late():
    world.run(2, late, environment={"EPX_TIMEOUT_MS": "1500"})


def test_cost(capsys):
    with capsys.disabled():
        for took, table in world.run(min(2, world.GPUS), cost):
            print("host time: cached dispatch %.1f us, combine %.1f us" % tuple(took))
            print(table)  # what Python adds to a call; within 15 us for a cached dispatch is the aim
