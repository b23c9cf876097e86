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


def unequal(group, device):
    with pytest.raises(epx.Error):
        epx.Buffer(group, 1 << 20, ranks_per_domain=2)


def test_unequal_domains_are_refused():
    world.run(3, unequal)
