"""Low latency, every token numbered, against what each rank works out for itself."""
import gc
import os
import time

import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402
from reference import numbered, routing  # noqa: E402

pytestmark = pytest.mark.skipif(not epx._abi.library().has_ll, reason="no low latency in this build of libepx.so")
H, K, M = 128, 3, 12


def inputs(seed, ranks, experts, hidden=H, topk=K, most=M, empty=0.1):
    out = []
    for r in range(ranks):
        tokens = (5 * seed + 7 * r) % (most + 1)
        ids, weights = routing(seed, r, tokens, topk, experts, empty=empty)
        out.append((numbered(r, tokens, hidden), ids, weights))
    return out


def check_received(everybody, rank, ranks, experts, x, count, handle, m=M):
    """Rows by (source rank, token index), counts, source tokens, ranges."""
    src_info, layout_range, got_m, hidden, got_e = handle
    assert (got_m, hidden, got_e) == (m, x.shape[2], experts)
    local = experts // ranks
    assert x.shape[:2] == (local, ranks * m) == src_info.shape and layout_range.shape == (local, ranks)
    for e in range(local):
        expert, at = rank * local + e, 0
        for r, (rows, ids, _) in enumerate(everybody):
            tokens = (ids == expert).any(1).nonzero().flatten()
            n = len(tokens)
            if n:
                assert x[e, at:at + n].cpu().equal(rows[tokens])
                assert src_info[e, at:at + n].cpu().equal(tokens.int())
            word = int(layout_range[e, r])
            assert word & 0xffffffff == n and (not n or word >> 32 == at)
            at += n
        assert int(count[e]) == at


def summed(x, ids, weights):
    """x times the weights of the experts that got it, in fp32, in top-k order, from +0; rounded once."""
    total = torch.zeros(x.shape, dtype=torch.float32)
    for k in range(ids.shape[1]):
        term = weights[:, k:k + 1] * x.float()
        total = torch.where(ids[:, k:k + 1] < 0, total, total + term)
    return total.bfloat16()


def rounds(group, device):
    rank, ranks = group.rank(), group.size()
    experts = 3 * ranks
    buffer = epx.Buffer(group, num_rdma_bytes=epx.Buffer.get_low_latency_rdma_size_hint(M, H, ranks, experts),
                        low_latency_mode=True)
    assert buffer._ll_core is not None  # its shape was known from the hint
    stats = torch.zeros(3, dtype=torch.int32, device=device)
    waited = torch.zeros(ranks, dtype=torch.int64, device=device)
    want = torch.zeros(3, dtype=torch.int32)
    for seed in range(10):
        everybody = inputs(seed, ranks, experts)
        x, ids, weights = [t.to(device) for t in everybody[rank]]
        hooks = seed % 2 == 1
        recv, count, handle, event, hook = buffer.low_latency_dispatch(
            x, ids, M, experts, cumulative_local_expert_recv_stats=stats, dispatch_wait_recv_cost_stats=waited,
            use_fp8=False, return_recv_hook=hooks)
        assert (hook is not None) == hooks and event.event is None
        if hooks:
            hook()
            hook()  # a second time is nothing
        check_received(everybody, rank, ranks, experts, recv, count, handle)
        want += count.cpu()
        y, _, hook = buffer.low_latency_combine(recv, ids, weights, handle, return_recv_hook=hooks,
                                                combine_wait_recv_cost_stats=waited)
        if hooks:
            hook()
        assert y.cpu().equal(summed(*everybody[rank]))
        if seed == 4:  # normal calls in between
            got, _, _, _, normal, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=torch.zeros(
                experts, dtype=torch.int32, device=device))
            buffer.combine(got, normal)
    assert stats.cpu().equal(want) and bool((waited >= 0).all())
    if ranks > 1 and device.type == "cpu":
        assert int(waited.sum()) > 0
    with pytest.raises(epx.InvalidArgument, match="it has been combined"):
        buffer.low_latency_combine(recv, ids, weights, handle)
    buffer.destroy()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_numbered(ranks):
    world.run(ranks, rounds)


def two_in_flight(group, device):
    """Two micro-batches, all halves interleaved; and ranks far apart in time, without a barrier."""
    rank, ranks = group.rank(), group.size()
    experts = 2 * ranks
    buffer = epx.Buffer(group, low_latency_mode=True)
    assert buffer._ll_core is None  # nobody named the shape: made by the first call
    for seed in range(40):
        both = [inputs(2 * seed + i, ranks, experts) for i in range(2)]
        sent = []
        for everybody in both:
            x, ids, weights = [t.to(device) for t in everybody[rank]]
            if (seed + rank) % 5 == 0:
                time.sleep(0.003)
            sent.append((everybody, ids, weights) + buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False,
                                                                                return_recv_hook=True))
        back = []
        for everybody, ids, weights, recv, count, handle, _, hook in sent if seed % 2 else sent[::-1]:
            hook()
            check_received(everybody, rank, ranks, experts, recv, count, handle)
            back.append((everybody, *buffer.low_latency_combine(recv, ids, weights, handle, return_recv_hook=True)))
        for everybody, y, _, hook in back:
            hook()
            assert y.cpu().equal(summed(*everybody[rank]))
        del sent, back
    buffer.destroy()


def test_two_micro_batches():
    world.run(2, two_in_flight)
    world.run(4, two_in_flight)


def hook_defers(group, device):
    """Without the hook nothing is received: rank 0 calls dispatch long before the others and is not held up."""
    rank, ranks = group.rank(), group.size()
    experts = 2 * ranks
    buffer = epx.Buffer(group, low_latency_mode=True)
    everybody = inputs(3, ranks, experts)
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False)  # makes the window
    buffer.barrier()
    begun = time.monotonic()
    if rank:
        time.sleep(0.6)
    recv, count, handle, _, hook = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False, return_recv_hook=True)
    if rank == 0:
        assert time.monotonic() - begun < 0.4
    hook()
    assert time.monotonic() - begun > 0.5
    check_received(everybody, rank, ranks, experts, recv, count, handle)
    buffer.destroy()


@pytest.mark.skipif(world.DEVICE == "cuda", reason="a GPU call does not wait")
def test_hook_defers():
    world.run(2, hook_defers)


def zero_copy_and_shapes(group, device):
    """The combine buffer, a buffer that grows for a larger shape, a smaller shape on it, out=."""
    rank, ranks = group.rank(), group.size()
    buffer = epx.Buffer(group, low_latency_mode=True)
    for m, hidden, experts in ((4, 64, ranks), (12, 256, 4 * ranks), (6, 64, 2 * ranks)):
        for seed in range(4):
            everybody = inputs(seed, ranks, experts, hidden, topk=1 if experts == ranks else 2, most=m)
            x, ids, weights = [t.to(device) for t in everybody[rank]]
            recv, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, m, experts, use_fp8=False)
            check_received(everybody, rank, ranks, experts, recv, count, handle, m)
            out = torch.empty_like(x)
            if seed % 2:
                place = buffer.get_next_low_latency_combine_buffer(handle)
                assert place.shape == recv.shape
                place.copy_(recv)
                y, event, hook = buffer.low_latency_combine(place, ids, weights, handle, zero_copy=True, out=out)
            else:  # ordinary memory that is not laid out as the window
                y, event, hook = buffer.low_latency_combine(recv.contiguous(), ids, weights, handle, out=out)
            assert y is out and hook is None and y.cpu().equal(summed(*everybody[rank]))
    buffer.destroy()


def test_zero_copy_and_shapes():
    world.run(3, zero_copy_and_shapes)


def masks(group, device):
    """A rank given up is neither sent to nor waited for; it can come back."""
    rank, ranks = group.rank(), group.size()
    experts = ranks
    buffer = epx.Buffer(group, low_latency_mode=True, enable_shrink=True)
    status = torch.full((ranks,), 7, dtype=torch.int32, device=device)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * ranks
    everybody = inputs(2, ranks, experts, topk=2, empty=0)
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False)
    buffer.barrier()
    if rank == ranks - 1:
        time.sleep(0.5)
        buffer.destroy()
        return
    buffer.low_latency_update_mask_buffer(ranks - 1, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * (ranks - 1) + [1]
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False)
    alive = [one if r < ranks - 1 else (one[0][:0], one[1][:0], one[2][:0]) for r, one in enumerate(everybody)]
    check_received(alive, rank, ranks, experts, recv, count, handle)
    y = buffer.low_latency_combine(recv, ids, weights, handle)[0]
    rows, all_ids, all_weights = everybody[rank]
    assert y.cpu().equal(summed(rows, torch.where(all_ids == ranks - 1, -1, all_ids), all_weights))
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * ranks
    buffer.destroy()


def test_masks():
    world.run(3, masks)


def refusals(group, device):
    rank, ranks = group.rank(), group.size()
    experts = 2 * ranks
    buffer = epx.Buffer(group, low_latency_mode=True)
    x, ids, weights = [t.to(device) for t in inputs(1, ranks, experts)[rank]]

    def refused(words, call, *args, **kwargs):
        with pytest.raises(epx.InvalidArgument) as caught:
            call(*args, **kwargs)
        assert words in str(caught.value), str(caught.value)

    dispatch, combine = buffer.low_latency_dispatch, buffer.low_latency_combine
    refused("x: dtype", dispatch, x.float(), ids, M, experts)
    refused("x: strides", dispatch, torch.ones(H, 4, dtype=torch.bfloat16, device=device).t(), ids[:4], M, experts)
    refused("topk_idx: dtype", dispatch, x, ids.float(), M, experts)
    refused("topk_idx: shape", dispatch, x, ids[:-1], M, experts)
    refused("num_max_dispatch_tokens_per_rank: 2", dispatch, x, ids, 2, experts)
    refused("num_experts: %d" % (experts + 1), dispatch, x, ids, M, experts + 1) if ranks > 1 else None
    refused("not both", dispatch, x, ids, M, experts, async_finish=True, return_recv_hook=True)
    refused("fp8 needs a multiple of 512", dispatch, x, ids, M, experts, use_ue8m0=True, round_scale=True)
    refused("cumulative_local_expert_recv_stats: shape", dispatch, x, ids, M, experts,
            cumulative_local_expert_recv_stats=torch.zeros(1, dtype=torch.int32, device=device))
    refused("dispatch_wait_recv_cost_stats: dtype", dispatch, x, ids, M, experts,
            dispatch_wait_recv_cost_stats=torch.zeros(ranks, dtype=torch.int32, device=device))
    refused("rank_to_mask: %d" % ranks, buffer.low_latency_update_mask_buffer, ranks, True)
    refused("mask_status: shape", buffer.low_latency_query_mask_buffer,
            torch.zeros(ranks + 1, dtype=torch.int32, device=device))
    refused("each from 1", epx.Buffer.get_low_latency_rdma_size_hint, 0, 7168, 8, 256)
    recv, count, handle, _, _ = dispatch(x, ids, M, experts, use_fp8=False)
    refused("handle: tuple", combine, recv, ids, weights, tuple(handle))
    refused("x: shape", combine, recv[:, :-1], ids, weights, handle)
    refused("x: dtype", combine, recv.float(), ids, weights, handle)
    refused("topk_weights: dtype", combine, recv, ids, weights.double(), handle)
    refused("out: shape", combine, recv, ids, weights, handle, out=x[:-1])
    refused("zero_copy: write to", combine, recv, ids, weights, handle, zero_copy=True)
    refused("not both", combine, recv, ids, weights, handle, async_finish=True, return_recv_hook=True)
    combine(recv, ids, weights, handle)
    buffer.destroy()


def test_refusals():
    world.run(2, refusals)


def busy_and_flat(group, device):
    """Every slot owned: Busy in words. Handles that die give their slots back. 5,000 pairs keep memory flat."""
    rank, ranks = group.rank(), group.size()
    experts = 2 * ranks
    buffer = epx.Buffer(group, low_latency_mode=True)
    x, ids, weights = [t.to(device) for t in inputs(1, ranks, experts)[rank]]
    kept = [buffer.low_latency_dispatch(x, ids, M, experts) for _ in range(2)]
    with pytest.raises(epx.Busy):
        buffer.low_latency_dispatch(x, ids, M, experts)
    del kept
    gc.collect()

    def rss():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    seen = []
    for i in range(5000):
        recv, count, handle, _, hook = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False, return_recv_hook=True)
        hook()
        y, _, hook = buffer.low_latency_combine(recv, ids, weights, handle, return_recv_hook=True)
        hook()
        if i % 500 == 499:
            seen.append(rss())
    assert seen[-1] - seen[1] < 1 << 20, [s >> 10 for s in seen]
    buffer.destroy()


def test_busy_and_flat():
    world.run(2, busy_and_flat)
