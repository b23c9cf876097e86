"""ArrayBuffer: the numpy entry."""
import gc
import os

import pytest

import epx

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")  # for the ranks, and as another owner of arrays
import ranks as world  # noqa: E402
from reference import expected, in_rank, numbered, routing  # noqa: E402


def arrays(group, device):
    rank, ranks = group.rank(), group.size()

    def gather(data):
        out = [None] * ranks
        torch.distributed.all_gather_object(out, data)
        return out
    buffer = epx.ArrayBuffer(allgather=gather, rank=rank, ranks=ranks, lease_bytes=1 << 20, reserve_bytes=1 << 16)
    experts = 2 * ranks
    everybody = [(numbered(r, 20 + r, 32, torch.float32), *routing(4, r, 20 + r, 2, experts)) for r in range(ranks)]
    x, ids, weights = [t.numpy() for t in everybody[rank]]
    want_x, want_ids, want_weights, _, counts, _ = expected(rank, ranks, experts, everybody)
    fan = in_rank(everybody[rank][1], experts, ranks).sum(1, keepdim=True).numpy().astype(np.float32)
    for dtype in (np.float32, np.float16):
        got = buffer.dispatch(x.astype(dtype), ids, experts, weights, scales=np.asfortranarray(x[:, 1:3]))
        assert (got.x == want_x.numpy()).all() and got.x.dtype == dtype and (got.topk_idx == want_ids.numpy()).all()
        assert (got.topk_weights == want_weights.numpy()).all() and got.rows_per_expert == counts
        assert (got.scales == want_x.numpy()[:, 1:3]).all()
        out, out_weights = buffer.combine(got.x, got.handle, got.topk_weights)
        assert (out == x * fan).all() and (out_weights == np.where(ids < 0, 0, weights)).all()
        out, none = buffer.combine(got.x.copy(), got.handle, bias=[x.astype(dtype)])
        assert none is None and (out == x * (fan + 1)).all()
        again, none = buffer.dispatch_again(x.astype(dtype) + 1, got.handle)
        assert none is None and (again == want_x.numpy() + 1).all()
    assert buffer._core.leases == 2
    rows = got.x[1:]
    del got, again
    gc.collect()
    assert buffer._core.leases == 1
    # bf16 as uint16; an owner with __dlpack__ (a torch tensor); bytes
    bits = everybody[rank][0].bfloat16().view(torch.int16).numpy().view(np.uint16)
    got = buffer.dispatch(bits, everybody[rank][1], experts)
    out, _ = buffer.combine(got.x, got.handle, dtype="bfloat16")
    assert (torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).float().numpy() == x * fan).all()
    got = buffer.dispatch(x.view(np.uint8), ids.astype(np.int32), experts)
    assert (got.x.view(np.float32) == want_x.numpy()).all() and got.topk_idx.dtype == np.int32

    for words, call in (("x: int", lambda: buffer.dispatch(3, ids, experts)),
                        ("topk_idx: dtype", lambda: buffer.dispatch(x, ids.astype(float), experts)),
                        ("topk_weights: shape", lambda: buffer.dispatch(x, ids, experts, weights[:, :1])),
                        ("scales: shape", lambda: buffer.dispatch(x, ids, experts, scales=x[:2])),
                        ("x: strides", lambda: buffer.dispatch(x[:, ::2], ids, experts)),
                        ("a row has 12 bytes", lambda: buffer.dispatch(np.ascontiguousarray(x[:, :3]), ids, experts)),
                        ("x: dtype int32", lambda: buffer.combine(got.x.view(np.int32), got.handle)),
                        ("handle: it must be", lambda: buffer.combine(rows, 3)),
                        ("nonsense: no such option", lambda: epx.ArrayBuffer(nonsense=1))):
        with pytest.raises(epx.InvalidArgument) as caught:
            call()
        assert words in str(caught.value), str(caught.value)
    same = np.broadcast_to(x[:, 1:2], (x.shape[0], 4))  # a stride of 0
    upward = buffer.dispatch(x, ids, experts, scales=x[:, 3:0:-1])  # a negative one
    assert (upward.scales == want_x.numpy()[:, 3:0:-1]).all()
    assert (buffer.dispatch(x, ids, experts, scales=same).scales == want_x.numpy()[:, 1:2]).all()
    wrong = ids.copy()
    wrong[0, 0] = experts
    with pytest.raises(epx.BadData):  # told by the call, which took part all the same
        buffer.dispatch(x, wrong, experts)
    buffer.status()
    for name, value in (("tokens_max", -1), ("timeout_ms", "soon"), ("expert_rank", [0.5])):
        with pytest.raises(epx.InvalidArgument, match=name):
            epx.ArrayBuffer(**{name: value})
    keep = rows.copy()
    if ranks == 1:  # 10,000 calls keep memory flat
        def rss():
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        seen = []
        for i in range(5000):
            got = buffer.dispatch(x, ids, experts, weights)
            buffer.combine(got.x, got.handle, got.topk_weights)
            if i % 500 == 499:
                seen.append(rss())
        assert seen[-1] - seen[1] < 1 << 20, [s >> 10 for s in seen]
    buffer.destroy()
    buffer.destroy()
    assert (rows == keep).all()
    with pytest.raises(epx.Broken):
        buffer.dispatch(x, ids, experts)


@pytest.mark.skipif(world.DEVICE == "cuda", reason="numpy arrays lie in CPU memory; covered where DEVICE is cpu")
@pytest.mark.parametrize("ranks", [1, 3])
def test_arrays(ranks):
    world.run(ranks, arrays)
