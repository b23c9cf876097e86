"""Several domains: the same calls, the ten-member handle. Domains of the wanted size are made by splitting this host's."""
import os

import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402
from reference import expected, in_rank, numbered, routing  # noqa: E402

H, K = 64, 3


def have_network():
    """The network plug-in lies beside the library."""
    folder = os.path.dirname(os.path.realpath(epx._abi.library_path()))
    return os.path.exists(os.path.join(folder, "libepx_ofi.so"))


pytestmark = pytest.mark.skipif(not have_network(), reason="no libepx_ofi.so: built without libfabric")


def check_tables(handle, rank, ranks, size, masks, channels):
    """Every member against its meaning, worked out from everybody's masks. Tokens go to channels in equal consecutive
    blocks."""
    domains, mine = ranks // size, masks[rank]
    (_, rdma_prefix, gbl_prefix, recv_rdma, rdma_sum, recv_gbl, rank_sum, meta, rdma_head, nvl_head) = [
        t.cpu() for t in handle]
    for table in (rdma_prefix, gbl_prefix, recv_rdma, rdma_sum, recv_gbl, rank_sum, rdma_head, nvl_head):
        assert table.dtype == torch.int32
    tokens = len(mine)
    to_domain = mine.view(tokens, domains, size).any(2)
    per = max(1, -(-tokens // channels))
    for c in range(channels):
        end = min((c + 1) * per, tokens)
        assert gbl_prefix[:, c].equal(mine[:end].sum(0).int())
        assert rdma_prefix[:, c].equal(to_domain[:end].sum(0).int())
        for d in range(domains):
            seen = rdma_head[c * per:end, d]
            assert seen[seen >= 0].equal(torch.arange(int((seen >= 0).sum()), dtype=torch.int32))
    first, rails = 0, []
    for r in range(ranks):
        takes = masks[r][:, rank]
        per_r = -(-len(takes) // channels)
        starts = [int(takes[:min(c * per_r, len(takes))].sum()) for c in range(channels)]
        assert recv_gbl[r].tolist() == [first + n for n in starts]
        first += int(takes.sum())
        assert rank_sum[r] == first
        if r % size == rank % size:  # the rank of that domain in this one's place
            assert recv_rdma[r // size].tolist() == starts
            rails.append(int(takes.sum()))
    assert rdma_sum.equal(torch.tensor(rails).cumsum(0).int())
    assert nvl_head.shape == (first, size)
    for i in range(size):
        want = torch.arange(first) if i == rank % size else torch.full((first,), -1)
        assert nvl_head[:, i].equal(want.int())
    assert bool((meta.view(torch.int32)[:, 1] == 1 << rank % size).all())


def several(group, device, size):
    rank, ranks = group.rank(), group.size()
    domains, experts = ranks // size, 2 * ranks
    buffer = epx.Buffer(group, 1 << 22, 1 << 22, ranks_per_domain=size)
    runtime = buffer.runtime
    assert runtime.get_num_rdma_ranks() == domains and runtime.get_rdma_rank() == rank // size
    assert runtime.get_root_rdma_rank(True) == rank % size
    for seed in range(5):
        tokens_of = [(11 * seed + 9 * r) % 60 for r in range(ranks)]
        everybody = [(numbered(r, tokens_of[r], H), *routing(seed, r, tokens_of[r], K, experts)) for r in range(ranks)]
        x, ids, weights = [t.to(device) for t in everybody[rank]]
        want_x, want_ids, want_weights, _, counts_wanted, sources = expected(rank, ranks, experts, everybody)
        per_rank, per_domain, per_expert, mask, _ = buffer.get_dispatch_layout(ids, experts)
        in_domain = mask.view(-1, domains, size).any(2)
        assert per_domain.dtype == torch.int32 and per_domain.equal(in_domain.sum(0).int())
        placed = dict(num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_domain, is_token_in_rank=mask,
                      num_tokens_per_expert=per_expert)
        with pytest.raises(epx.InvalidArgument, match="num_tokens_per_rdma_rank: shape"):
            buffer.internode_dispatch(x, topk_idx=ids, **dict(placed, num_tokens_per_rdma_rank=per_rank[:0]))
        recv_x, recv_ids, recv_weights, counts, handle, _ = buffer.internode_dispatch(
            x, topk_idx=ids, topk_weights=weights, **placed)
        assert recv_x.cpu().equal(want_x) and recv_ids.cpu().equal(want_ids) and recv_weights.cpu().equal(want_weights)
        assert counts == counts_wanted

        assert len(handle) == 10
        (given, rdma_prefix, gbl_prefix, recv_rdma, rdma_sum, recv_gbl, rank_sum, meta, rdma_head, nvl_head) = handle
        channels = epx.Buffer.num_sms // 2
        assert given.equal(mask) and handle[-4] is rank_sum
        assert rank_sum.cpu().equal(torch.tensor(sources).cumsum(0).int())
        assert rdma_prefix.shape == (domains, channels) == recv_rdma.shape and gbl_prefix.shape == (ranks, channels)
        assert recv_gbl.shape == (ranks, channels) and rdma_sum.shape == (domains,)
        assert rdma_prefix[:, -1].equal(per_domain) and gbl_prefix[:, -1].equal(per_rank)
        assert meta.shape == (len(want_x), 8) and meta.dtype == torch.uint8
        assert rdma_head.shape == (tokens_of[rank], domains) and (rdma_head >= 0).equal(in_domain)
        source = torch.repeat_interleave(torch.arange(ranks), torch.tensor(sources))
        assert meta.cpu().view(torch.int32)[:, 0].equal((source // size).int())

        masks = [in_rank(one, experts, ranks) for _, one, _ in everybody]
        check_tables(handle, rank, ranks, size, masks, channels)

        # Small integers: the sum is exact whatever it is rounded to on the way.
        small = (x % 8).contiguous()
        rows = buffer.dispatch(small, handle=handle)[0]
        fan_out = in_rank(ids.cpu(), experts, ranks).sum(1, keepdim=True).to(device)
        out, out_weights, _ = buffer.internode_combine(rows, handle, topk_weights=recv_weights)
        assert out.equal((small.float() * fan_out).bfloat16())
        assert out_weights.equal(torch.where(ids < 0, 0.0, weights))
    buffer.status()
    buffer.destroy()


@pytest.mark.parametrize("ranks, size", [(2, 1), (4, 2), (4, 1), (6, 3), (8, 4)])
def test_domains(ranks, size):
    world.run(ranks, several, size)


def low_latency(group, device, size):
    """Low latency between domains: every row, count and sum."""
    rank, ranks = group.rank(), group.size()
    experts, most = 2 * ranks, 10
    shape = (most, 128, ranks, experts)
    buffer = epx.Buffer(group, ranks_per_domain=size)  # not low_latency_mode: normal calls work in any case
    everybody = [(numbered(r, most - r, 128), *routing(3, r, most - r, K, experts)) for r in range(ranks)]
    x, ids, weights = [t.to(device) for t in everybody[rank]]
    assert epx.Buffer.get_low_latency_rdma_size_hint(*shape) > 0
    recv, count, handle, _, hook = buffer.low_latency_dispatch(x, ids, most, experts, use_fp8=False, return_recv_hook=True)
    hook()
    for e in range(2):
        rows = torch.cat([one[(i == rank * 2 + e).any(1)] for one, i, _ in everybody])
        assert int(count[e]) == len(rows) and recv[e, :len(rows)].cpu().equal(rows)
    y, _, hook = buffer.low_latency_combine(recv, ids, weights, handle, return_recv_hook=True)
    hook()
    want = torch.zeros(x.shape)
    for k in range(K):
        want = torch.where(ids[:, k:k + 1].cpu() < 0, want, want + (weights[:, k:k + 1] * x.float()).cpu())
    assert y.cpu().equal(want.bfloat16())
    buffer.destroy()


def low_latency_window(group, device, size):
    """A window asked for at the start is made with the buffer."""
    ranks = group.size()
    hint = epx.Buffer.get_low_latency_rdma_size_hint(10, 128, ranks, 2 * ranks)
    buffer = epx.Buffer(group, 1 << 21, hint, low_latency_mode=True, ranks_per_domain=size)
    other = epx.Buffer(group, 1 << 21, ranks_per_domain=size)
    other.barrier()
    other.destroy()
    buffer.destroy()


@pytest.mark.parametrize("ranks, size", [(2, 1), (4, 2), (4, 1), (6, 3)])
def test_low_latency(ranks, size):
    world.run(ranks, low_latency, size)


def test_low_latency_window():
    world.run(4, low_latency_window, 2)


def unequal(group, device):
    with pytest.raises(epx.Error):
        epx.Buffer(group, 1 << 20, ranks_per_domain=2)


def test_unequal_domains_are_refused():
    world.run(3, unequal)
