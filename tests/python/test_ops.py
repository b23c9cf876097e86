"""Differentiable dispatch and combine, custom ops under torch.compile, MoELayer against a dense layer."""
import gc

import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402
from reference import routing  # noqa: E402

E_PER_RANK, K, T, H = 3, 2, 17, 16


def dense(layer_of, x, topk):
    """The same layer in one process: layer_of(expert) -> (up, down), and the gate."""
    gate, experts = layer_of
    weights, chosen = torch.topk(torch.softmax((x @ gate).float(), -1), topk, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e, (up, down) in enumerate(experts):
        row, column = torch.where(chosen == e)
        out = out.index_add(0, row, torch.nn.functional.gelu(x[row] @ up) @ down * weights[row, column][:, None])
    return out


def layer(group, device):
    ranks, rank = group.size(), group.rank()
    buffer = epx.Buffer(group, 1 << 22)
    experts = E_PER_RANK * ranks
    moe = epx.MoELayer(buffer, H, 32, experts, K, seed=3).to(device)
    everybody = [torch.randn(T + r, H, generator=torch.Generator().manual_seed(50 + r)) for r in range(ranks)]
    x = everybody[rank].to(device).requires_grad_()
    y = moe(x)
    y.square().sum().backward()

    whole = epx.MoELayer(_Alone(), H, 32, experts, K, seed=3)
    gate = whole.gate.detach().to(device).requires_grad_()
    ups = [u.detach().to(device).requires_grad_() for u in whole.up]
    downs = [d.detach().to(device).requires_grad_() for d in whole.down]
    mine = everybody[rank].to(device).requires_grad_()
    outs = [dense((gate, list(zip(ups, downs))), mine if r == rank else everybody[r].to(device), K) for r in range(ranks)]
    assert torch.allclose(y, outs[rank], rtol=1e-5, atol=1e-5)
    gate_of_mine = torch.autograd.grad(outs[rank].square().sum(), [mine, gate], retain_graph=True)
    assert torch.allclose(x.grad, gate_of_mine[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(moe.gate.grad, gate_of_mine[1], rtol=1e-4, atol=1e-4)
    total = sum(out.square().sum() for out in outs)
    local = range(rank * E_PER_RANK, (rank + 1) * E_PER_RANK)
    for i, e in enumerate(local):
        want = torch.autograd.grad(total, [ups[e], downs[e]], retain_graph=True)
        assert torch.allclose(moe.up.grad[i], want[0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(moe.down.grad[i], want[1], rtol=1e-4, atol=1e-4)
    del x, y
    gc.collect()
    assert buffer._core.leases == 0
    assert not epx.ops._handles
    buffer.destroy()


class _Alone:
    """All that MoELayer asks of a buffer to make its weights."""

    rank, group_size = 0, 1


def test_layer_and_gradients():
    world.run(1, layer)
    world.run(3, layer)


def compiled(group, device, worst):
    if not worst:  # the number of rows is data
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
    ranks, rank = group.size(), group.rank()
    buffer = epx.Buffer(group, 1 << 22)
    experts = E_PER_RANK * ranks
    ids, weights = [t.to(device) for t in routing(11, rank, T, K, experts, empty=0)]

    def step(x, weights):
        recv, recv_ids, recv_weights, counts, handle = epx.dispatch(x, ids, weights, buffer, experts,
                                                                       num_worst_tokens=worst)
        y = recv * 2 * torch.where(recv_ids < 0, 0.0, recv_weights).sum(-1, keepdim=True)
        return epx.combine(y, handle, buffer, x)

    x = torch.randn(T, H, device=device, requires_grad=True)
    weights.requires_grad_()
    want = step(x, weights)
    grads = torch.autograd.grad(want.square().sum(), [x, weights])
    assert torch.allclose(want, x * 2 * weights.sum(-1, keepdim=True), atol=1e-5)
    fast = torch.compile(step, backend="aot_eager", fullgraph=True)
    untouched = epx.Buffer(group, 1 << 22)  # no eager call before the first traced one

    def whole(x, weights):
        made = epx.dispatch(x, ids, weights, untouched, experts, num_worst_tokens=2 * T)
        return epx.combine(made[0], made[4], untouched, x)
    with torch.no_grad():
        first = torch.compile(whole, backend="aot_eager", fullgraph=True)(x, weights)
    fan = (ids.view(T, K, 1) // E_PER_RANK == torch.arange(ranks, device=device)).any(1).sum(1, keepdim=True)
    assert torch.allclose(first, x * fan, atol=1e-5)
    if not worst:  # torch 2.4 cannot differentiate through such sizes: forward alone
        with torch.no_grad():
            assert all(torch.allclose(fast(x, weights), want, atol=1e-5) for _ in range(3))
        buffer.destroy()
        return
    for _ in range(3):
        got = fast(x, weights)
        assert torch.allclose(got, want, atol=1e-5)
        again = torch.autograd.grad(got.square().sum(), [x, weights])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(again, grads))
    buffer.destroy()


@pytest.mark.parametrize("worst", [0, 2 * T])
def test_compile(worst):
    world.run(2, compiled, worst, timeout=180)


def custom_ops(group, device):
    buffer = epx.Buffer(group, 1 << 22)
    x = torch.randn(4, 8, device=device)
    ids, weights = (torch.arange(8, device=device) % 5).view(4, 2) % 2, torch.rand(4, 2, device=device)
    from epx import ops  # noqa: F401  registers them
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.epx.dispatch.default, (x.clone().requires_grad_(), ids, weights, buffer._op_number, 2, 1, 9),
                          test_utils=checks)
    recv, _, recv_weights, _, handle = epx.dispatch(x, ids, weights, buffer, 2)
    for op, arguments in ((torch.ops.epx.combine.default, (recv.clone().requires_grad_(), handle, x, buffer._op_number)),
                          (torch.ops.epx.combine_weights.default, (recv, recv_weights, handle, x, buffer._op_number)),
                          (torch.ops.epx.dispatch_again.default, (x, recv, handle, buffer._op_number))):
        torch.library.opcheck(op, arguments, test_utils=checks)
    del recv, recv_weights, handle, arguments
    gc.collect()
    ids, weights = torch.zeros(4, 1, dtype=torch.int64, device=device), torch.ones(4, 1, device=device)
    _, _, _, counts, handle = epx.dispatch(x, ids, weights, buffer, 2, expert_alignment=16)
    assert counts.tolist() == [16, 0] and counts.dtype == torch.int64
    copy = handle.clone()
    assert epx.combine(x, copy, buffer, x).equal(x)
    del handle
    with pytest.raises(epx.InvalidArgument, match="its dispatch is gone"):
        epx.combine(x, copy, buffer, x)
    recv, recv_ids, _, counts, handle = epx.dispatch(x, ids, weights, buffer, 2, num_worst_tokens=9)
    assert recv.shape == (9, 8) and counts.numel() == 0 and int((recv_ids == -1).sum()) == 5
    del recv, recv_ids, handle
    number = buffer._op_number
    buffer.destroy()
    del buffer
    gc.collect()
    with pytest.raises(epx.InvalidArgument, match="buffer: it is gone"):
        torch.ops.epx.dispatch(x, ids, weights, number, 2, 1, 0)


def test_custom_ops():
    world.run(1, custom_ops)
