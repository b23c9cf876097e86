"""What only a GPU has: streams, graphs, failures that are known late, the cost of Python."""
import time

import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402
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


def worst_case_graph(group, device):
    """Dispatch (worst case) and combine captured once, replayed with other routing."""
    rank, ranks = group.rank(), group.size()
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
    buffer.destroy()
    return took


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("function", [streams, worst_case_graph, low_latency_graph])
def test_gpu(function, ranks):
    world.run(ranks, function)


def test_late():
    world.run(2, late, environment={"EPX_TIMEOUT_MS": "1500"})


def test_cost(capsys):
    with capsys.disabled():
        for took in world.run(min(2, world.GPUS), cost):
            print("host time: cached dispatch %.1f us, combine %.1f us" % tuple(took))
