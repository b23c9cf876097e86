"""Normal mode on 1, 2, 3, 4 and 8 ranks, every token numbered, against what each rank works out for itself."""
import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402
from reference import calc_diff, expected, in_rank, numbered, routing  # noqa: E402

H = 64


def inputs(seed, ranks, tokens_of, topk, experts, hidden=H, dtype=torch.bfloat16, skew=False):
    everybody = []
    for r in range(ranks):
        ids, weights = routing(seed, r, tokens_of[r], topk, experts, skew=skew)
        everybody.append((numbered(r, tokens_of[r], hidden, dtype), ids, weights))
    return everybody


def layout(buffer, ids, experts):
    per_rank, per_domain, per_expert, mask, event = buffer.get_dispatch_layout(ids, experts)
    assert event.event is None and per_domain is None
    return dict(num_tokens_per_rank=per_rank, is_token_in_rank=mask, num_tokens_per_expert=per_expert)


def check_handle(handle, rank, ranks, everybody, experts, channels):
    """The six tables against their meaning."""
    masks = [in_rank(ids, experts, ranks) for _, ids, _ in everybody]
    matrix = torch.stack([mask.sum(0) for mask in masks])
    rank_prefix, channel_prefix, recv_channel, src, mask, head = [t.cpu() for t in handle]
    assert len(handle) == 6 and handle[4].equal(list(handle)[4])
    assert rank_prefix.dtype == torch.int32 and rank_prefix.equal(matrix.cumsum(0).int())
    assert mask.equal(masks[rank])
    tokens = mask.shape[0]
    per = max(1, -(-tokens // channels))
    for c in range(channels):
        end = min((c + 1) * per, tokens)
        assert channel_prefix[:, c].equal(mask[:end].sum(0).int())
    assert src.equal(torch.cat([m[:, rank].nonzero().flatten() for m in masks]).int())
    for r in range(ranks):
        per_r = -(-masks[r].shape[0] // channels)
        for c in range(channels):
            start = min(c * per_r, masks[r].shape[0])
            assert recv_channel[r, c] == masks[r][:start, rank].sum()
    assert head.shape == (tokens, ranks) and (head == -1).equal(~mask)
    for r in range(ranks):
        for c in range(channels):
            seen = head[c * per:(c + 1) * per, r]
            seen = seen[seen >= 0]
            assert seen.equal(torch.arange(len(seen), dtype=torch.int32))


def one_round(group, device, seed, tokens_of, topk, experts, dtype=torch.bfloat16, skew=False, buffer=None):
    rank, ranks = group.rank(), group.size()
    mine = buffer or epx.Buffer(group, 1 << 24)
    everybody = inputs(seed, ranks, tokens_of, topk, experts, dtype=dtype, skew=skew)
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    want_x, want_ids, want_weights, want_src, want_counts, _ = expected(rank, ranks, experts, everybody)
    placed = layout(mine, ids, experts)
    assert placed["is_token_in_rank"].cpu().equal(in_rank(ids.cpu(), experts, ranks))
    assert placed["num_tokens_per_expert"].cpu().equal(torch.stack([(ids == e).sum() for e in range(experts)]).int().cpu())
    assert placed["num_tokens_per_rank"].cpu().equal(placed["is_token_in_rank"].sum(0).int().cpu())

    recv_x, recv_ids, recv_weights, counts, handle, event = mine.dispatch(x, topk_idx=ids, topk_weights=weights, **placed)
    assert event.event is None and recv_x.dtype == dtype
    assert recv_x.cpu().equal(want_x) and recv_ids.cpu().equal(want_ids) and recv_weights.cpu().equal(want_weights)
    assert counts == want_counts and all(type(n) is int for n in counts)
    check_handle(handle, rank, ranks, everybody, experts, epx.Buffer.num_sms // 2)

    # The tokens come back fan-out times, exactly (sums of small integers), and the weights once each.
    fan_out = placed["is_token_in_rank"].sum(1, keepdim=True)
    out, out_weights, event = mine.combine(recv_x, handle, topk_weights=recv_weights)
    want = (x.float() * fan_out).to(dtype)
    assert event.event is None and out.equal(want)
    assert out_weights.equal(torch.where(ids < 0, 0.0, weights).float())
    assert calc_diff(out.float(), x.float() * fan_out) < 5e-6 if len(x) else True

    # Other rows by the same routing; explicit None for what does not travel.
    again, none_ids, none_weights, none_counts, none_handle, _ = mine.dispatch(
        x + 1, handle=handle, num_tokens_per_rank=None, is_token_in_rank=None, num_tokens_per_expert=None)
    assert none_ids is none_weights is none_counts is none_handle is None
    parts = [(numbered(r, tokens_of[r], H, dtype) + 1, everybody[r][1], everybody[r][2]) for r in range(ranks)]
    assert again.cpu().equal(expected(rank, ranks, experts, parts)[0])

    # Expert outputs in ordinary memory, with biases.
    for biases in ((), (0.5,), (0.5, 2.0)):
        given = [torch.full_like(x, b) for b in biases]
        bias = None if not given else given[0] if len(given) == 1 else tuple(given)
        out, none, _ = mine.combine(recv_x.clone(), handle, bias=bias)
        assert none is None and out.equal((x.float() * fan_out + sum(biases)).to(dtype))
    if buffer is None:
        mine.destroy()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_numbered(ranks):
    world.run(ranks, one_round, 1, [50 + 7 * r for r in range(ranks)], min(4, 2 * ranks), 2 * ranks)


@pytest.mark.parametrize("ranks", [1, 4])
def test_empty_ranks(ranks):
    world.run(ranks, one_round, 2, [0 if r % 2 == 0 else 9 for r in range(ranks)], 2, 2 * ranks)
    world.run(ranks, one_round, 3, [0] * ranks, 2, 2 * ranks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(dtype):
    world.run(2, one_round, 4, [33, 20], 3, 8, dtype)


def rounds(group, device):
    """Changing routing on one buffer, skewed, without barriers, more rows than a lease holds now and then."""
    buffer = epx.Buffer(group, lease_bytes=1 << 16, reserve_bytes=1 << 16)
    for seed in range(12):
        one_round(group, device, seed, [(13 * seed * (r + 1)) % 300 for r in range(group.size())], 3, 12, skew=seed % 3 == 0,
                  buffer=buffer)
    buffer.destroy()


def test_rounds_and_ordinary_tensors():
    world.run(4, rounds)


def fp8(group, device):
    rank, ranks = group.rank(), group.size()
    tokens, hidden, experts = 40, 256, 4 * ranks
    buffer = epx.Buffer(group, 1 << 24)
    everybody = inputs(5, ranks, [tokens] * ranks, 4, experts, hidden)
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    placed = layout(buffer, ids, experts)
    rows8 = [numbered(r, tokens, hidden).float().clamp(max=200).to(torch.float8_e4m3fn) for r in range(ranks)]
    scale = [(torch.arange(tokens)[:, None] * 8 + torch.arange(hidden // 128) + r).float() for r in range(ranks)]
    want8 = expected(rank, ranks, experts, [(rows8[r].view(torch.uint8), *everybody[r][1:]) for r in range(ranks)])[0]
    for kind in (torch.float32, torch.int32):
        want = expected(rank, ranks, experts, [(scale[r].to(kind), *everybody[r][1:]) for r in range(ranks)])[0]
        for strides in ("rows", "columns", "gaps", "same token", "same element"):
            mine = scale[rank].to(kind).to(device)
            if strides == "columns":
                mine = mine.t().contiguous().t()
            elif strides == "gaps":
                wide = torch.zeros((tokens * 2, hidden // 128 * 3), dtype=kind, device=device)
                wide[::2, 1::3] = mine
                mine = wide[::2, 1::3]
            wanted = want
            if strides.startswith("same"):  # expanded: a stride of 0
                token = strides == "same token"
                mine = (mine[3:4] if token else mine[:, 1:2]).expand(mine.shape)
                all_scales = [(s[3:4] if token else s[:, 1:2]).expand(s.shape).to(kind) for s in scale]
                wanted = expected(rank, ranks, experts, [(all_scales[r], *everybody[r][1:]) for r in range(ranks)])[0]
            (recv, scales), recv_ids, _, _, handle, _ = buffer.dispatch(
                (rows8[rank].to(device), mine), topk_idx=ids, topk_weights=weights, **placed)
            assert recv.dtype == torch.float8_e4m3fn and recv.view(torch.uint8).cpu().equal(want8)
            assert scales.dtype == kind and scales.cpu().equal(wanted)
            (recv, scales), *_ = buffer.dispatch((rows8[rank].to(device), mine), handle=handle)
            assert recv.view(torch.uint8).cpu().equal(want8) and scales.cpu().equal(wanted)
    buffer.destroy()


def test_fp8():
    world.run(3, fp8)


def keywords(group, device):
    """Alignment, worst case, masks only, 32-bit ids, events, patched configs, strided rows, the other names."""
    rank, ranks = group.rank(), group.size()
    tokens, experts = 30 + rank, 4 * ranks
    buffer = epx.Buffer(group, 1 << 24)
    everybody = inputs(6, ranks, [30 + r for r in range(ranks)], 3, experts)
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    want_x, want_ids, want_weights, _, want_counts, _ = expected(rank, ranks, experts, everybody)
    placed = layout(buffer, ids, experts)
    n = len(want_x)

    *_, counts, _, _ = buffer.dispatch(x, topk_idx=ids, expert_alignment=8, **placed)
    assert counts == [(c + 7) // 8 * 8 for c in want_counts]

    recv_x, recv_ids, recv_weights, counts, handle, _ = buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights, num_worst_tokens=40 * ranks, **placed)
    assert counts == [] and recv_x.shape == (40 * ranks, H) and recv_x[:n].cpu().equal(want_x)
    assert recv_ids[:n].cpu().equal(want_ids) and bool((recv_ids[n:] == -1).all())
    assert recv_weights[:n].cpu().equal(want_weights) and bool((recv_weights[n:] == 0).all())
    fan_out = placed["is_token_in_rank"].sum(1, keepdim=True)
    out, out_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    assert out.equal((x.float() * fan_out).bfloat16()) and out_weights.equal(torch.where(ids < 0, 0.0, weights))
    again, *_ = buffer.dispatch(x, handle=handle)
    assert again[:n].cpu().equal(want_x)
    assert handle[0].shape == (ranks, ranks) and handle[3][:n].dtype == torch.int32

    inside = torch.zeros(experts + 2, dtype=torch.int32, device=device)[2:]  # a view into something else
    inside.copy_(placed["num_tokens_per_expert"])
    assert buffer.dispatch(x, **dict(placed, num_tokens_per_expert=inside))[3] == want_counts
    recv_x, none_ids, none_weights, counts, handle, _ = buffer.dispatch(x, **placed)  # by the mask
    assert none_ids is none_weights is None and recv_x.cpu().equal(want_x) and counts == want_counts
    assert buffer.combine(recv_x, handle)[0].equal((x.float() * fan_out).bfloat16())

    recv_x, recv_ids, *_ = buffer.dispatch(x, topk_idx=ids.int(), topk_weights=weights, **placed)
    assert recv_ids.dtype == torch.int32 and recv_ids.long().cpu().equal(want_ids)

    wide = torch.zeros((tokens, 2 * H), dtype=torch.bfloat16, device=device)
    wide[:, :H] = x
    assert buffer.dispatch(wide[:, :H], topk_idx=ids, **placed)[0].cpu().equal(want_x)

    event = epx.Buffer.capture()
    got = buffer.get_dispatch_layout(ids, experts, previous_event=event, async_finish=True, allocate_on_comm_stream=True)
    got[-1].current_stream_wait()
    assert got[3].equal(placed["is_token_in_rank"])
    recv_x, _, _, _, handle, event = buffer.dispatch(x, topk_idx=ids, previous_event=got[-1], async_finish=True,
                                                     allocate_on_comm_stream=True, config=epx.Config(24, 8, 256), **placed)
    assert event.event is not None
    with event:
        pass
    assert recv_x.cpu().equal(want_x)
    out, _, event = buffer.combine(recv_x, handle, async_finish=True, previous_event=epx.EventOverlap(None))
    event.current_stream_wait()
    assert out.equal((x.float() * fan_out).bfloat16())

    recv_x, _, _, _, handle, _ = buffer.intranode_dispatch(x, topk_idx=ids, **placed)
    assert buffer.intranode_combine(recv_x, handle)[0].equal(out)
    recv_x, _, _, _, handle, _ = buffer.internode_dispatch(x, topk_idx=ids, **placed)
    assert buffer.internode_combine(recv_x, handle)[0].equal(out)

    class Patched(epx.Buffer):
        asked = []

    Patched.get_dispatch_config = staticmethod(lambda r: Patched.asked.append(r) or epx.Config(16))
    patched = Patched(group, 1 << 22)
    *_, handle, _ = patched.dispatch(x, topk_idx=ids, **placed)
    assert Patched.asked == [ranks] and handle[1].shape == (ranks, 8)
    patched.destroy()
    buffer.status()
    buffer.barrier()
    assert set(buffer.traffic()) == {"local_bytes", "domain_bytes", "net_bytes", "net_puts"}
    buffer.destroy()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_keywords(ranks):
    world.run(ranks, keywords)


def mapped(group, device):
    """expert_rank: any expert on any rank, as many on each as there are; ids, counts and low latency by that map."""
    rank, ranks, tokens, topk = group.rank(), group.size(), 25, 3
    experts = 2 * ranks + 1
    owner = [(e + e // ranks) % ranks for e in range(experts)]
    assert set(owner) == set(range(ranks))
    buffer = epx.Buffer(group, 1 << 22, expert_rank=torch.tensor(owner))
    mine = [e for e in range(experts) if owner[e] == rank]
    local_of = torch.tensor([mine.index(e) if owner[e] == rank else -1 for e in range(experts)] + [-1])
    everybody = inputs(8, ranks, [tokens] * ranks, topk, experts, hidden=128)
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    per_rank, _, per_expert, mask, _ = buffer.get_dispatch_layout(ids, experts)
    place = torch.tensor(owner + [ranks])
    wanted_mask = torch.stack([(place[everybody[rank][1]] == r).any(1) for r in range(ranks)], 1)
    assert mask.cpu().equal(wanted_mask) and per_rank.cpu().equal(wanted_mask.sum(0).int())
    takes = [(place[i] == rank).any(1) for _, i, _ in everybody]
    want_x = torch.cat([one[take] for (one, _, _), take in zip(everybody, takes)])
    want_ids = torch.cat([local_of[i[take]] for (_, i, _), take in zip(everybody, takes)])
    want_counts = [int((want_ids == n).sum()) for n in range(len(mine))]
    aligned = [(n + 3) // 4 * 4 for n in want_counts]
    placed = dict(is_token_in_rank=mask, num_tokens_per_expert=per_expert, expert_alignment=4)
    recv_x, recv_ids, _, counts, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **placed)
    assert recv_x.cpu().equal(want_x) and recv_ids.cpu().equal(want_ids) and counts == aligned
    assert handle[4].cpu().equal(wanted_mask)
    recv_x, _, _, counts, handle, _ = buffer.dispatch(x, **placed)  # by the mask: the same counts
    assert recv_x.cpu().equal(want_x) and counts == aligned
    assert buffer.combine(recv_x, handle)[0].equal((x.float() * mask.sum(1, keepdim=True)).bfloat16())
    with pytest.raises(epx.InvalidArgument, match="expert_rank maps %d" % experts):
        buffer.dispatch(x, is_token_in_rank=mask, num_tokens_per_expert=per_expert[1:].contiguous())
    made = epx.dispatch(x, ids, weights, buffer, experts)
    assert made[3].tolist() == want_counts
    if epx._abi.library().has_ll:
        recv, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, tokens, experts, use_fp8=False)
        assert recv.shape == (len(mine), ranks * tokens, 128) and count.tolist() == want_counts
        for n, expert in enumerate(mine):
            rows = torch.cat([one[(i == expert).any(1)] for one, i, _ in everybody])
            assert recv[n, :len(rows)].cpu().equal(rows)
        place = buffer.get_next_low_latency_combine_buffer(handle)
        place.copy_(recv)
        y, _, _ = buffer.low_latency_combine(place, ids, weights, handle, zero_copy=True)
        want = torch.zeros(x.shape)
        for k in range(topk):
            want = torch.where(ids[:, k:k + 1].cpu() < 0, want, want + (weights[:, k:k + 1] * x.float()).cpu())
        assert y.cpu().equal(want.bfloat16())
    buffer.destroy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_expert_map(ranks):
    world.run(ranks, mapped)


def two_buffers(group, device):
    rank, ranks = group.rank(), group.size()
    a, b = epx.Buffer(group, 1 << 22), epx.Buffer(group, 1 << 22)
    experts = 2 * ranks
    everybody = inputs(7, ranks, [20] * ranks, 2, experts)
    x, ids, _ = [t.to(device) for t in everybody[rank]]
    want = expected(rank, ranks, experts, everybody)[0]
    pa, pb = layout(a, ids, experts), layout(b, ids, experts)
    ra, _, _, _, ha, _ = a.dispatch(x, topk_idx=ids, **pa)
    rb, _, _, _, hb, _ = b.dispatch(x + 1, topk_idx=ids, **pb)
    with pytest.raises(epx.InvalidArgument, match="another buffer"):
        a.combine(rb, hb)
    fan = pa["is_token_in_rank"].sum(1, keepdim=True)
    assert b.combine(rb, hb)[0].equal(((x + 1).float() * fan).bfloat16())
    a.destroy()
    assert ra.cpu().equal(want)
    assert b.dispatch(x, handle=hb)[0].cpu().equal(want)
    b.destroy()


def test_two_buffers():
    world.run(3, two_buffers)


def attributes(group, device):
    buffer = epx.Buffer(group, 1 << 22, 1 << 10, low_latency_mode=True, num_qps_per_rank=8, allow_mnnvl=True,
                        allow_nvlink_for_low_latency_mode=False, explicitly_destroy=True, enable_shrink=True)
    assert buffer.group is group and (buffer.rank, buffer.group_size) == (group.rank(), group.size())
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1 << 22, 1 << 10)
    assert buffer.low_latency_mode and buffer.explicitly_destroy
    runtime = buffer.runtime
    assert runtime.is_available() and runtime.get_num_rdma_ranks() == 1 and runtime.get_rdma_rank() == 0
    assert runtime.get_root_rdma_rank(True) == group.rank() and runtime.get_root_rdma_rank(False) == 0
    assert runtime.get_local_device_id() == (device.index if device.type == "cuda" else -1)
    assert runtime.get_comm_stream() is not None and buffer.get_comm_stream() is not None
    scratch = buffer.get_local_buffer_tensor(torch.int32, (4, 8), offset=64)
    scratch.fill_(7)
    assert scratch.shape == (4, 8) and bool((buffer.get_local_buffer_tensor(torch.int32)[16:48] == 7).all())
    for ranks in (1, 2, 3, 8, 24, 100):
        for config in (epx.Buffer.get_dispatch_config(ranks), epx.Buffer.get_combine_config(ranks)):
            assert config.get_nvl_buffer_size_hint(7168, ranks) > 0 and config.get_rdma_buffer_size_hint(7168, ranks) > 0
    assert epx.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) < 100 << 20
    before = epx.Buffer.num_sms
    epx.Buffer.set_num_sms(24)
    assert epx.Buffer.get_dispatch_config(4).num_sms == 24
    epx.Buffer.set_num_sms(before)
    assert isinstance(epx.Buffer.is_sm90_compiled(), bool)
    assert isinstance(epx.Buffer.capture(), epx.EventOverlap)
    config = epx.Config(12, 1, 2, 3, 4)
    assert (config.num_sms, config.num_max_nvl_chunked_send_tokens, config.num_max_nvl_chunked_recv_tokens,
            config.num_max_rdma_chunked_send_tokens, config.num_max_rdma_chunked_recv_tokens) == (12, 1, 2, 3, 4)
    del scratch
    buffer.destroy()
    assert not runtime.is_available()


def test_attributes():
    world.run(2, attributes)


class Comm:
    """What epx uses of an mpi4py communicator."""

    def __init__(self, group):
        self.group = group

    def Get_rank(self):
        return self.group.rank()

    def Get_size(self):
        return self.group.size()

    def allgather(self, data):
        out = [None] * self.group.size()
        torch.distributed.all_gather_object(out, data)
        return out


def other_bootstraps(group, device):
    comm = Comm(group)
    buffer = epx.Buffer(comm=comm, num_nvl_bytes=1 << 20)
    assert buffer.group is None and buffer.group_size == group.size()
    buffer.destroy()
    made = [epx.unique_id() if group.rank() == 0 else None]
    assert made[0] is None or type(made[0]) is bytes
    torch.distributed.broadcast_object_list(made, 0)
    buffer = epx.Buffer(unique_id=bytearray(made[0]), rank=group.rank(), ranks=group.size(), num_nvl_bytes=1 << 20)
    assert buffer.rank == group.rank()
    buffer.barrier()
    buffer.destroy()
    part = torch.distributed.new_group([1, 2])  # ranks of a subgroup count anew
    if group.rank():
        buffer = epx.Buffer(part, 1 << 20)
        assert (buffer.rank, buffer.group_size) == (group.rank() - 1, 2)
        buffer.destroy()


def test_other_bootstraps():
    world.run(3, other_bootstraps)
