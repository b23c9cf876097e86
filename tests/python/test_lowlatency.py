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
        if seed % 3 == 1:
            ids = ids.int()
        recv, count, handle, event, hook = buffer.low_latency_dispatch(
            x, ids, M, experts, cumulative_local_expert_recv_stats=stats, dispatch_wait_recv_cost_stats=waited,
            use_fp8=False, return_recv_hook=hooks)
        assert (hook is not None) == hooks and event.event is None
        if hooks:
            hook()
            hook()  # a second time is nothing
        check_received(everybody, rank, ranks, experts, recv, count, handle)
        want += count.cpu()
        y, _, hook = buffer.low_latency_combine(recv, ids, weights, handle, use_logfmt=seed % 2 == 0, return_recv_hook=hooks,
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


def largest_of_sizes(group, device):
    """Programs give the largest of several sizes: the window is the largest that was asked about and that it holds."""
    ranks = group.size()
    epx.lowlatency._hints.clear()
    hint = epx.Buffer.get_low_latency_rdma_size_hint
    small, wanted, other = hint(M // 2, H, ranks, ranks), hint(M, H, ranks, 3 * ranks), hint(64 * M, H, ranks + 1, ranks + 1)
    assert small < wanted < other
    normal = epx.Buffer.get_dispatch_config(ranks).get_rdma_buffer_size_hint(2 * H, ranks)
    for size, shape in ((max(wanted, normal), (M, H)), (other, (M, H)), (wanted - 1, (M // 2, H)), (small - 1, (0, 0))):
        buffer = epx.Buffer(group, 1 << 21, size, low_latency_mode=True)
        assert buffer._ll_shape[:2] == shape and (buffer._ll_core is None) == (shape == (0, 0))
        buffer.destroy()


def test_largest_of_sizes():
    world.run(2, largest_of_sizes)


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


def two_zero_copies(group, device):
    """Two handles at once, both by zero copy, in any order: each has its own memory. Views of a larger window are strided."""
    rank, ranks = group.rank(), group.size()
    experts = 2 * ranks
    buffer = epx.Buffer(group, low_latency_mode=True)
    other = epx.Buffer(group, low_latency_mode=True)
    x, ids, weights = [t.to(device) for t in inputs(1, ranks, experts)[rank]]
    buffer.low_latency_dispatch(x, ids, M + 3, experts, use_fp8=False)  # the window: M + 3 tokens a rank
    for seed in range(8):
        both, sent = [inputs(2 * seed + i, ranks, experts) for i in range(2)], []
        for everybody in both:
            x, ids, weights = [t.to(device) for t in everybody[rank]]
            recv, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False)
            assert recv.stride() == ((M + 3) * ranks * H, H, 1) and not recv.is_contiguous()
            sent.append((everybody, ids, weights, recv, handle))
        places = [buffer.get_next_low_latency_combine_buffer(handle) for *_, handle in sent]
        assert places[0].data_ptr() != places[1].data_ptr()
        for place, (*_, recv, handle) in zip(places, sent):
            assert place.shape == recv.shape and place.stride() == recv.stride()
            assert buffer.get_next_low_latency_combine_buffer(handle).data_ptr() == place.data_ptr()
            place[:, :, :] = recv
        for everybody, ids, weights, recv, handle in sent if seed % 2 else sent[::-1]:
            y, _, _ = buffer.low_latency_combine(recv, ids, weights, handle, zero_copy=True)
            assert y.cpu().equal(summed(*everybody[rank]))
        with pytest.raises(epx.InvalidArgument, match="it has been combined"):
            buffer.get_next_low_latency_combine_buffer(handle)
    assert sum(map(len, buffer._ll_spare.values())) == 2
    _, _, handle, _, _ = other.low_latency_dispatch(x, ids, M, experts)
    with pytest.raises(epx.InvalidArgument, match="another buffer"):
        buffer.get_next_low_latency_combine_buffer(handle)
    buffer.destroy()
    other.destroy()


def test_two_zero_copies():
    world.run(3, two_zero_copies)


def quantised(x, round_scale):
    """(e4m3 [T,H], scales fp32 [T,H/128]) of bf16 rows, by the contract's words."""
    blocks = x.float().view(len(x), -1, 128)
    scales = blocks.abs().amax(2).clamp(min=1e-4) / 448
    if round_scale:
        scales = torch.exp2(torch.ceil(torch.log2(scales.double()))).float()
    return (blocks * (1 / scales)[:, :, None]).to(torch.float8_e4m3fn).view(x.shape), scales


def formats(group, device):
    """fp8 rows and their scales, bit for bit, in all three forms; where the scales lie; an amax below 1e-4."""
    rank, ranks, hidden = group.rank(), group.size(), 1024
    experts, local = 2 * ranks, 2
    buffer = epx.Buffer(group, low_latency_mode=True)
    everybody = []
    for r in range(ranks):
        ids, weights = routing(5, r, M - r, K, experts)
        x = torch.randn(M - r, hidden, generator=torch.Generator().manual_seed(r)) * torch.logspace(-6, 3, M - r)[:, None]
        x[0, :128] = 0
        everybody.append((x.bfloat16(), ids, weights))
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    for round_scale, ue8m0 in ((False, False), (True, False), (True, True)):
        (recv, scales), count, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, experts, round_scale=round_scale,
                                                                           use_ue8m0=ue8m0)
        rows = ranks * M
        assert recv.shape == (local, rows, hidden) and recv.dtype == torch.float8_e4m3fn and recv.is_contiguous()
        n = hidden // (512 if ue8m0 else 128)
        assert scales.shape == (local, rows, n) and scales.stride() == (n * rows, 1, rows)  # the row is the fastest
        assert scales.dtype == (torch.int32 if ue8m0 else torch.float32)
        for e in range(local):
            takes = [(i == rank * local + e).any(1) for _, i, _ in everybody]
            want, want_scales = zip(*[quantised(one[take], round_scale) for (one, _, _), take in zip(everybody, takes)])
            want, want_scales = torch.cat([w.view(torch.uint8) for w in want]), torch.cat(want_scales)
            got, got_scales = recv[e, :len(want)].cpu().view(torch.uint8), scales[e, :len(want)].cpu()
            assert int(count[e]) == len(want) and got.equal(want)
            if ue8m0:
                assert got_scales.contiguous().view(torch.uint8).equal((want_scales.view(torch.int32) >> 23).to(torch.uint8))
            else:
                assert got_scales.equal(want_scales)
        buffer.low_latency_combine(torch.zeros(recv.shape, dtype=torch.bfloat16, device=device), ids, weights, handle)
    buffer.destroy()


def test_formats():
    world.run(2, formats)


def bad_ids(group, device):
    """Ids out of range: told by the call that had them (CPU), the buffer is good; status() knows of low latency too."""
    rank, ranks = group.rank(), group.size()
    experts = 2 * ranks
    buffer = epx.Buffer(group, low_latency_mode=True)
    x, ids, weights = [t.to(device) for t in inputs(3, ranks, experts)[rank]]
    wrong = torch.full_like(ids, experts)
    for hook in (False, True):
        with pytest.raises(epx.BadData):
            _, _, _, _, receive = buffer.low_latency_dispatch(x, wrong, M, experts, return_recv_hook=hook)
            if device.type == "cuda":
                if hook:
                    receive()
                torch.cuda.synchronize()
                buffer.status()
    everybody = inputs(4, ranks, experts)
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False)
    check_received(everybody, rank, ranks, experts, recv, count, handle)
    assert buffer.low_latency_combine(recv, ids, weights, handle)[0].cpu().equal(summed(*everybody[rank]))
    buffer.status()
    moved = buffer.traffic()
    assert ranks == 1 or sum(moved.values()) > 0
    buffer.destroy()


def test_bad_ids():
    world.run(2, bad_ids)


def dropped(group, device):
    """A dispatch whose hook is never called, nor its handle combined: what was sent is taken out when the last of it goes,
    into memory that is still the call's; the slots are free again."""
    rank, ranks = group.rank(), group.size()
    experts = 2 * ranks
    buffer = epx.Buffer(group, low_latency_mode=True)
    for seed in range(12):
        everybody = inputs(seed, ranks, experts, empty=0)
        x, ids, weights = [t.to(device) for t in everybody[rank]]
        got = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False, return_recv_hook=True)
        shapes = [got[0].shape, got[1].shape]
        recv, count, handle, event, hook = got
        kept = (hook, handle, recv)[seed % 3]  # which of them goes last
        del got, recv, count, event
        if seed % 3 != 0:
            del hook
        if seed % 3 != 1:
            del handle
        others = [torch.full(shape, 77, dtype=kind, device=device) for shape, kind in
                  zip(shapes * 4, (torch.bfloat16, torch.int32) * 4)]
        if seed % 3 == 0:
            del hook
        elif seed % 3 == 1:
            del handle
        del kept
        gc.collect()
        assert all(bool((one == 77).all()) for one in others)
        del others
        recv, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False)
        check_received(everybody, rank, ranks, experts, recv, count, handle)
        y, _, hook = buffer.low_latency_combine(recv, ids, weights, handle, return_recv_hook=seed % 2 == 0)
        if hook:
            hook()
        assert y.cpu().equal(summed(*everybody[rank]))
    assert buffer._ll_core.leases == 0
    buffer.destroy()


def test_dropped_hooks():
    world.run(3, dropped)


def cost_stats(group, device):
    """Who was waited for: rank 1 comes 0.3 s late, and every other rank's table says so, and adds up."""
    rank, ranks = group.rank(), group.size()
    experts = ranks
    buffer = epx.Buffer(group, low_latency_mode=True)
    x = torch.ones(2, H, dtype=torch.bfloat16, device=device)
    ids = torch.arange(2 * ranks, device=device).view(2, ranks) % experts
    weights = torch.ones(2, ranks, device=device)
    waited = [torch.full((ranks,), 5, dtype=torch.int64, device=device) for _ in range(2)]
    for turn in range(3):
        buffer.barrier()
        if rank == 1 and turn:
            time.sleep(0.3)
        recv, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 2, experts, use_fp8=False,
                                                            dispatch_wait_recv_cost_stats=waited[0])
        buffer.barrier()
        if rank == 1 and turn:
            time.sleep(0.3)
        buffer.low_latency_combine(recv, ids, weights, handle, combine_wait_recv_cost_stats=waited[1])
        if turn == 0:
            for table in waited:
                table.fill_(5)
    if rank != 1:
        for table in waited:
            assert 0.4e9 < int(table[1]) < 5e9, table
            assert all(int(table[r]) < int(table[1]) for r in range(ranks) if r != 1), table
    buffer.destroy()


@pytest.mark.skipif(world.DEVICE == "cuda", reason="the barrier is of streams: sleeping hosts are not seen")
def test_cost_stats():
    world.run(3, cost_stats)


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


def shrink(group, device):
    """enable_shrink: a rank that dies is masked by the call that misses it, which goes on without it."""
    rank, ranks = group.rank(), group.size()
    experts, dead = ranks, ranks - 1
    buffer = epx.Buffer(group, low_latency_mode=True, enable_shrink=True)
    everybody = inputs(2, ranks, experts, topk=2, empty=0)
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False)
    buffer.low_latency_combine(recv, ids, weights, handle)
    world.all_here(group)
    if rank == dead:
        os._exit(9)
    alive = [one if r != dead else (one[0][:0], one[1][:0], one[2][:0]) for r, one in enumerate(everybody)]
    rows, all_ids, all_weights = everybody[rank]
    for _ in range(3):
        recv, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, experts, use_fp8=False)
        check_received(alive, rank, ranks, experts, recv, count, handle)
        y = buffer.low_latency_combine(recv, ids, weights, handle)[0]
        assert y.cpu().equal(summed(rows, torch.where(all_ids == dead, -1, all_ids), all_weights))
    status = torch.zeros(ranks, dtype=torch.int32, device=device)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * dead + [1]
    buffer.destroy()


@pytest.mark.skipif(world.DEVICE == "cuda", reason="on a GPU the deadline alone masks; the library's own tests have that")
def test_shrink():
    world.run(3, shrink, dead=(2,), environment={"EPX_TIMEOUT_MS": "3000"})


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
    for wrong, name in enumerate(("num_max_dispatch_tokens_per_rank", "hidden", "num_ranks", "num_experts")):
        for value in (0, -1, 2.5, "2"):
            refused("%s: %r" % (name, value), epx.Buffer.get_low_latency_rdma_size_hint,
                    *[value if i == wrong else 8 for i in range(4)])
    refused("num_experts: 0", dispatch, x, ids, M, 0)
    refused("num_max_dispatch_tokens_per_rank: 1.5", dispatch, x, ids, 1.5, experts)
    refused("rank_to_mask: 0.5", buffer.low_latency_update_mask_buffer, 0.5, True)
    refused("this rank itself", buffer.low_latency_update_mask_buffer, rank, True)
    buffer.low_latency_update_mask_buffer(rank, False)
    odd = torch.ones(x.numel() + 1, dtype=torch.bfloat16, device=device)[1:].view(x.shape)
    refused("x is at", dispatch, odd, ids, M, experts)
    recv, count, handle, _, _ = dispatch(x, ids, M, experts, use_fp8=False)
    refused("handle: tuple", combine, recv, ids, weights, tuple(handle))
    refused("x: shape", combine, recv[:, :-1], ids, weights, handle)
    refused("x: dtype", combine, recv.float(), ids, weights, handle)
    refused("topk_weights: dtype", combine, recv, ids, weights.double(), handle)
    refused("topk_idx: dtype torch.int32; it must be torch.int64", combine, recv, ids.int(), weights, handle)
    refused("topk_idx: shape", combine, recv, ids[:, :1], weights, handle)
    refused("out: shape", combine, recv, ids, weights, handle, out=x[:-1])
    refused("out: dtype", combine, recv, ids, weights, handle, out=x.float())
    refused("out is at", combine, recv, ids, weights, handle, out=odd)
    refused("combine_wait_recv_cost_stats: dtype", combine, recv, ids, weights, handle,
            combine_wait_recv_cost_stats=torch.zeros(ranks, device=device))
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
