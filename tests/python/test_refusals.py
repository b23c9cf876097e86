"""Every refusal: words that name the argument, nothing done, the buffer good afterwards."""
import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402

E, K, T, H = 8, 2, 5, 16


def refused(words, call, *args, kind=epx.InvalidArgument, **kwargs):
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert words in str(caught.value), "%r does not say %r" % (str(caught.value), words)
    assert isinstance(caught.value, epx.Error) and caught.value.status > 0


def in_calls(group, device):
    buffer = epx.Buffer(group, 1 << 20, topk_max=4, tokens_max=64, experts_max=32)
    other = epx.Buffer(group, 1 << 20)
    x = torch.ones((T, H), dtype=torch.bfloat16, device=device)
    ids = torch.arange(T * K, device=device).reshape(T, K) % E
    weights = torch.rand(T, K, device=device)
    per_rank, _, per_expert, mask, _ = buffer.get_dispatch_layout(ids, E)
    placed = dict(num_tokens_per_rank=per_rank, is_token_in_rank=mask, num_tokens_per_expert=per_expert)
    recv, _, recv_weights, _, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **placed)
    *_, foreign, _ = other.dispatch(x, topk_idx=ids, **placed)

    def dispatch(*args, **kwargs):
        return buffer.dispatch(*args, **{**placed, "topk_idx": ids, **kwargs})

    # layout
    refused("topk_idx: list", buffer.get_dispatch_layout, [[1]], E)
    refused("topk_idx: dtype torch.float32", buffer.get_dispatch_layout, ids.float(), E)
    refused("topk_idx: shape (10,)", buffer.get_dispatch_layout, ids.flatten(), E)
    refused("topk_idx: strides", buffer.get_dispatch_layout, ids.t(), E)
    refused("7 experts", buffer.get_dispatch_layout, ids, 7) if group.size() == 2 else None
    refused("experts", buffer.get_dispatch_layout, ids, 64)
    for wrong in (0, -8, 8.0, "8", None):
        refused("num_experts: %r" % (wrong,), buffer.get_dispatch_layout, ids, wrong)
    # dispatch: rows
    refused("x: int", dispatch, 1)
    refused("x: shape (5,)", dispatch, x[:, 0])
    refused("x: a row of 3 elements has 6 bytes", dispatch, x[:, :3])
    refused("x: strides", dispatch, torch.ones((H, T), dtype=torch.bfloat16, device=device).t())
    wide = torch.ones((T, H + 1), dtype=torch.bfloat16, device=device)
    refused("x: strides", dispatch, wide[:, :H])
    refused("x: it starts at", dispatch, torch.ones((1, H + 1), dtype=torch.bfloat16, device=device)[:, 1:],
            topk_idx=ids[:1], is_token_in_rank=mask[:1])
    refused("x: a tuple of 3", dispatch, (x, x, x))
    refused("x[1] (scales): 4 tokens", dispatch, (x, torch.ones((4, 1), device=device)))
    refused("x[1] (scales): list", dispatch, (x, [1.0]))
    refused("x[1] (scales): 2 bytes", dispatch, (x, torch.ones((T, 1), dtype=torch.bfloat16, device=device)))
    # dispatch: routing
    refused("num_tokens_per_expert: it is needed", buffer.dispatch, x, topk_idx=ids)
    refused("num_tokens_per_expert: dtype torch.int64", dispatch, x, num_tokens_per_expert=per_expert.long())
    refused("num_tokens_per_rank: dtype torch.int64", dispatch, x, num_tokens_per_rank=per_rank.long())
    refused("num_tokens_per_rank: shape", dispatch, x, num_tokens_per_rank=per_expert)
    refused("num_tokens_per_rank: int", dispatch, x, num_tokens_per_rank=5)
    refused("topk_idx: shape", dispatch, x, topk_idx=ids[:3])
    refused("topk_idx: dtype", dispatch, x, topk_idx=ids.short())
    refused("topk_weights: dtype torch.float64", dispatch, x, topk_weights=weights.double())
    refused("topk_weights: shape (5, 1)", dispatch, x, topk_weights=weights[:, :1])
    refused("topk_weights: they need topk_idx", dispatch, x, topk_idx=None, topk_weights=weights)
    refused("topk_idx or is_token_in_rank", buffer.dispatch, x, num_tokens_per_expert=per_expert)
    refused("is_token_in_rank: dtype torch.int32", dispatch, x, is_token_in_rank=mask.int())
    refused("is_token_in_rank: shape", dispatch, x, is_token_in_rank=mask[:, :0])
    for wrong in (0, -1, 2.5, "1"):
        refused("expert_alignment: %r" % (wrong,), dispatch, x, expert_alignment=wrong)
    for wrong in (-1, 2.5, "1"):
        refused("num_worst_tokens: %r" % (wrong,), dispatch, x, num_worst_tokens=wrong)
    refused("topk", dispatch, x, topk_idx=torch.zeros((T, 5), dtype=torch.int64, device=device))
    many = torch.ones((65, H), dtype=torch.bfloat16, device=device)
    refused("65", dispatch, many, topk_idx=torch.zeros((65, K), dtype=torch.int64, device=device), is_token_in_rank=None)
    # handles
    refused("handle: tuple", buffer.dispatch, x, handle=tuple(member.clone() for member in handle))
    refused("handle: tuple", buffer.combine, recv, tuple(handle)[:5])
    refused("handle: tuple", buffer.combine, recv, (None,) * 6)
    refused("handle: it was made by another buffer", buffer.dispatch, x, handle=tuple(foreign))
    refused("handle: int", buffer.combine, recv, 3)
    refused("handle: it was made by another buffer", buffer.dispatch, x, handle=foreign)
    refused("x: 4 tokens; the handle's dispatch had 5", buffer.dispatch, x[:4], handle=handle)
    refused("topk_idx, topk_weights: they do not travel", buffer.dispatch, x, handle=handle, topk_idx=ids)
    # combine
    refused("x: dtype torch.int32", buffer.combine, recv.int(), handle)
    refused("rows; the handle's dispatch received", buffer.combine, torch.cat([recv, recv[:1]]), handle)
    refused("topk_weights: shape", buffer.combine, recv, handle, topk_weights=recv_weights[:, :1])
    refused("topk_weights: dtype", buffer.combine, recv, handle, topk_weights=recv_weights.half())
    refused("bias: 3 tensors", buffer.combine, recv, handle, bias=(x, x, x))
    refused("bias: shape", buffer.combine, recv, handle, bias=x[:2])
    refused("bias[1]: dtype", buffer.combine, recv, handle, bias=(x, x.float()))
    odd = torch.ones(T * H + 1, dtype=torch.bfloat16, device=device)[1:].view(T, H)
    refused("bias[1] is at", buffer.combine, recv, handle, bias=(x, odd))
    *_, masked, _ = buffer.dispatch(x, **placed)
    refused("topk_weights: the handle's dispatch had no topk_idx", buffer.combine, recv, masked, topk_weights=recv_weights)
    # streams, configs
    refused("allocate_on_comm_stream: it needs", dispatch, x, allocate_on_comm_stream=True)
    refused("allocate_on_comm_stream: it needs", dispatch, x, allocate_on_comm_stream=True, async_finish=True)
    refused("previous_event: int", dispatch, x, previous_event=3)
    refused("config: int", dispatch, x, config=24)
    refused("new_num_sms: 3", epx.Buffer.set_num_sms, 3)
    for name in ("get_dispatch_layout", "dispatch", "combine"):
        first = {"get_dispatch_layout": (ids, E), "dispatch": (x,), "combine": (recv, handle)}[name]
        others = {"dispatch": dict(placed, topk_idx=ids)}.get(name, {})
        refused("previous_event: str", getattr(buffer, name), *first, previous_event="now", **others)
        refused("allocate_on_comm_stream: it needs", getattr(buffer, name), *first, allocate_on_comm_stream=True, **others)
        *_, event = getattr(buffer, name)(*first, previous_event=epx.EventHandle(), async_finish=True, **others)
        event.current_stream_wait()  # the handle itself does as an event
    refused("num_sms: -2", epx.Config, -2)
    refused("offset: 3", buffer.get_local_buffer_tensor, torch.int32, offset=3)
    refused("size:", buffer.get_local_buffer_tensor, torch.int32, (1 << 30,))
    if device.type == "cuda":
        refused("x: it is on cpu", dispatch, x.cpu())
    else:
        refused("x: it is on meta", dispatch, x.to("meta"))

    # Nothing of that touched the buffer.
    assert buffer.combine(buffer.dispatch(x, handle=handle)[0], handle)[0].equal(
        (x.float() * mask.sum(1, keepdim=True)).bfloat16())
    buffer.destroy()
    other.destroy()
    refused("destroyed", buffer.dispatch, x, handle=handle, kind=epx.Broken)
    refused("destroyed", buffer.get_dispatch_layout, ids, E, kind=epx.Broken)


def test_calls():
    world.run(2, in_calls)
    world.run(1, in_calls)


def in_creation(group, device):
    refused("num_nvl_bytes: -1", epx.Buffer, group, -1)
    refused("num_rdma_bytes: 'much'", epx.Buffer, group, 0, "much")
    refused("num_qps_per_rank", epx.Buffer, group, num_qps_per_rank=-2)
    for name in ("timeout_ms", "lease_bytes", "reserve_bytes", "tokens_max", "topk_max", "experts_max", "handles_max",
                 "leases_max", "threads", "ranks_per_domain", "ll_slots"):
        for wrong in (-1, 0.5, "1"):
            refused("%s: %r" % (name, wrong), epx.Buffer, group, **{name: wrong})
    refused("expert_rank[1]: 0.5", epx.Buffer, group, expert_rank=[0, 0.5])
    refused("group and comm", epx.Buffer, group, comm=group)
    refused("group: int", epx.Buffer, 3)
    refused("comm: str", epx.Buffer, comm="world")
    refused("backend: 'tpu'", epx.Buffer, group, backend="tpu")
    refused("unique_id: it takes the place", epx.Buffer, group, unique_id=b"x" * 128)
    refused("unique_id: bytes", epx.Buffer, unique_id="x", rank=0, ranks=1)
    refused("unique_id: 3 bytes", epx.Buffer, unique_id=b"abc", rank=0, ranks=1)
    refused("topk_max is 64", epx.Buffer, group, topk_max=64)
    refused("expert_rank", epx.Buffer, group, expert_rank=[0] * 5000)
    if world.DEVICE == "cpu":
        refused("", epx.Buffer, group, backend="cuda", kind=epx.Error)


def test_creation():
    world.run(1, in_creation)


def disagree(group, device):
    kinds = (epx.Mismatch, epx.PeerFailure)
    with pytest.raises(kinds):
        epx.Buffer(group, 1 << 20 if group.rank() else 1 << 23)


def test_ranks_disagree():
    world.run(2, disagree)


def bad_ids(group, device):
    """An id out of range counts as -1, is told once, at the call on CPU, and leaves the buffer usable."""
    buffer = epx.Buffer(group, 1 << 20)
    x = torch.ones((T, H), dtype=torch.bfloat16, device=device)
    ids = torch.arange(T * K, device=device).reshape(T, K) % E
    counts = torch.zeros(E, dtype=torch.int32, device=device)
    wrong = ids.clone()
    if group.rank() == 0:
        wrong[2, 0] = E + 3
    if group.rank() == 0:
        with pytest.raises(epx.BadData):
            buffer.dispatch(x, topk_idx=wrong, num_tokens_per_expert=counts)
            if device.type == "cuda":
                torch.cuda.synchronize()
                buffer.status()
    else:
        buffer.dispatch(x, topk_idx=wrong, num_tokens_per_expert=counts)
    recv, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts)
    buffer.combine(recv, handle)
    if device.type == "cpu":  # the layout's own
        with pytest.raises(epx.BadData):
            buffer.get_dispatch_layout(torch.full((T, K), E, device=device), E)
        buffer.get_dispatch_layout(ids, E)
    buffer.status()
    buffer.destroy()


def test_bad_ids():
    world.run(2, bad_ids)


def overflow(group, device):
    """More rows than num_worst_tokens: known everywhere, in words; the process goes on with another buffer."""
    buffer = epx.Buffer(group, 1 << 20)
    x = torch.ones((T, H), dtype=torch.bfloat16, device=device)
    ids = torch.zeros((T, 1), dtype=torch.int64, device=device)  # all to rank 0
    counts = torch.zeros(E, dtype=torch.int32, device=device)
    with pytest.raises((epx.Overflow, epx.PeerFailure)) as caught:
        buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts, num_worst_tokens=2 * T - 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        buffer.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
            buffer.status()
    said = str(caught.value)
    buffer.destroy()
    other = epx.Buffer(group, 1 << 20)
    other.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts, num_worst_tokens=2 * T)
    other.status()
    other.destroy()
    return type(caught.value).__name__, said


def test_overflow():
    kinds = world.run(2, overflow)
    assert any(kind == "Overflow" and str(2 * T) in words for kind, words in kinds), kinds


def low_latency(group, device):
    buffer = epx.Buffer(group, low_latency_mode=True)
    buffer.clean_low_latency_buffer(8, 128, 8)
    if hasattr(epx._abi.library(), "epx_ll_dispatch"):
        pytest.skip("low latency is in this build")
    refused("low-latency", buffer.low_latency_dispatch, None, None, 8, 8, kind=epx.Unsupported)
    refused("low-latency", buffer.low_latency_combine, None, None, None, None, kind=epx.Unsupported)
    buffer.destroy()


def test_low_latency_words():
    world.run(1, low_latency)
