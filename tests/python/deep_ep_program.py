"""A program written for deep_ep, which knows nothing of epx: its checks are those that such programs make.

test_deep_ep.py runs it after epx.install_as_deep_ep().
"""
import torch
import torch.distributed as dist

import deep_ep
from deep_ep import Buffer, Config, EventOverlap
from deep_ep.utils import EventHandle  # noqa: F401


def calc_diff(a, b):
    a, b = a.double() + 1, b.double() + 1
    return (1 - 2 * (a * b).sum() / (a * a + b * b).sum()).item()


def inplace_unique(x, num_slots):
    mask = x < 0
    padded = x.masked_fill(mask, num_slots)
    counts = torch.zeros((x.size(0), num_slots + 1), dtype=x.dtype, device=x.device)
    counts.scatter_add_(1, padded, torch.ones_like(padded))
    counts = counts[:, :num_slots]
    sorted_counts, sorted_idx = torch.sort(counts, dim=-1, descending=True)
    sorted_idx[sorted_counts == 0] = -1
    sorted_idx = torch.sort(sorted_idx, descending=True, dim=-1).values
    x[:, :].fill_(-1)
    valid = min(num_slots, x.size(1))
    x[:, :valid] = sorted_idx[:, :valid]


def per_token_cast_to_fp8(x):
    m, n = x.shape
    view = x.view(m, -1, 128)
    amax = view.abs().float().amax(dim=2).view(m, -1).clamp(1e-4)
    return (view * (448.0 / amax.unsqueeze(2))).to(torch.float8_e4m3fn).view(m, n), (amax / 448.0).view(m, -1)


def per_token_cast_back(x, scales):
    if x.numel() == 0:
        return x.to(torch.bfloat16)
    full = x.to(torch.float32).view(x.size(0), -1, 128)
    return (full * scales.view(x.size(0), -1, 1)).view(x.shape).to(torch.bfloat16)


def intranode(group, device, num_tokens=120, hidden=256, num_topk=4, num_experts=None):
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    num_experts = num_experts or 8 * num_ranks
    torch.manual_seed(rank)
    buffer = Buffer(group, int(1e8), 0, low_latency_mode=False, num_qps_per_rank=1, explicitly_destroy=True)

    x = torch.ones((num_tokens, hidden), dtype=torch.bfloat16, device=device) * rank
    x_pure_rand = torch.randn((num_tokens, hidden), dtype=torch.bfloat16, device=device)
    x_e4m3 = per_token_cast_to_fp8(x)
    x_e4m3 = (x_e4m3[0], x_e4m3[1].T.contiguous().T)
    scores = torch.randn((num_tokens, num_experts), dtype=torch.float32, device=device).abs() + 1
    topk_idx = torch.topk(scores, num_topk, dim=-1, largest=True, sorted=False)[1].to(deep_ep.topk_idx_t)
    topk_weights = torch.ones((num_tokens, num_topk), dtype=torch.float32, device=device) * rank
    topk_weights_pure_rand = torch.randn((num_tokens, num_topk), dtype=torch.float32, device=device)
    rank_idx = topk_idx // (num_experts // num_ranks)
    rank_idx = rank_idx.to(torch.int64)
    rank_idx.masked_fill_(topk_idx == -1, -1)
    inplace_unique(rank_idx, num_ranks)

    # Layout by hand
    num_tokens_per_expert = torch.zeros((num_experts,), dtype=torch.int, device=device)
    for i in range(num_experts):
        num_tokens_per_expert[i] = (topk_idx == i).sum()
    gbl_num_tokens_per_expert = num_tokens_per_expert.clone().cpu()
    dist.all_reduce(gbl_num_tokens_per_expert, group=group)
    num_tokens_per_rank = torch.empty((num_ranks,), dtype=torch.int, device=device)
    token_idx_in_rank = torch.full((num_ranks, num_tokens), -1, dtype=torch.long, device=device)
    for i in range(num_ranks):
        num_tokens_per_rank[i] = (rank_idx == i).sum()
        token_sel = (rank_idx == i).max(dim=-1)[0]
        count = token_sel.sum().item()
        tokens = torch.sort(token_sel.to(torch.int), descending=True)[1]
        tokens[:count] = torch.sort(tokens[:count])[0]
        token_idx_in_rank[i][tokens[:count]] = torch.arange(count, dtype=torch.long, device=device)
    is_token_in_rank = token_idx_in_rank.T.contiguous().to(torch.int) >= 0
    gbl_num_tokens_per_rank = num_tokens_per_rank.clone().cpu()
    dist.all_reduce(gbl_num_tokens_per_rank, group=group)

    ref_rank, _, ref_expert, ref_in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    assert torch.allclose(ref_rank, num_tokens_per_rank)
    assert torch.allclose(ref_expert, num_tokens_per_expert)
    assert torch.allclose(ref_in_rank, is_token_in_rank)

    config = Config(Buffer.num_sms, 8, 256)

    def check_data(check_x, rank_prefix_matrix):
        assert torch.allclose(check_x.amin(dim=1), check_x.amax(dim=1))
        check_start = 0
        for i in range(num_ranks):
            check_end = rank_prefix_matrix[i][rank].item()
            assert (check_x[check_start:check_end, :].int() - i).sum().item() == 0
            check_start = check_end

    for previous_mode in (False, True):
        for async_mode in (False, True):
            for current_x in (x_pure_rand, x, x_e4m3):
                for with_topk in (False, True):
                    args = {"x": current_x, "num_tokens_per_rank": num_tokens_per_rank,
                            "is_token_in_rank": is_token_in_rank, "num_tokens_per_expert": num_tokens_per_expert,
                            "config": config, "async_finish": async_mode}
                    if with_topk:
                        args.update({"topk_idx": topk_idx, "topk_weights":
                                     topk_weights_pure_rand if current_x is x_pure_rand else topk_weights})
                    if previous_mode:
                        args.update({"previous_event": Buffer.capture()})
                    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, event = buffer.dispatch(**args)
                    event.current_stream_wait() if async_mode else ()
                    recv_x = per_token_cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x

                    rank_prefix_matrix = handle[0]
                    assert gbl_num_tokens_per_rank[rank].item() == recv_x.size(0)
                    assert gbl_num_tokens_per_expert.view(num_ranks, -1)[rank].tolist() == counts
                    if current_x is not x_pure_rand:
                        check_data(recv_x, rank_prefix_matrix)
                    recv_topk_weights_clone = None
                    if with_topk:
                        assert (recv_topk_idx.eq(-1) | ((recv_topk_idx >= 0) & (recv_topk_idx < num_experts // num_ranks))
                                ).sum().item() == recv_topk_idx.numel()
                        for i, count in enumerate(counts):
                            assert recv_topk_idx.eq(i).sum().item() == count
                        recv_topk_weights_clone = recv_topk_weights.clone()
                        if current_x is not x_pure_rand:
                            recv_topk_weights[recv_topk_idx.eq(-1)] = recv_topk_weights.amax(
                                dim=1, keepdim=True).expand_as(recv_topk_weights)[recv_topk_idx.eq(-1)]
                            check_data(recv_topk_weights, rank_prefix_matrix)

                    # `num_worst_tokens`
                    if with_topk:
                        num_worst_tokens = num_tokens * num_ranks
                        args.update({"num_worst_tokens": num_worst_tokens})
                        worst_x, worst_idx, worst_weights, empty_list, _, event = buffer.dispatch(**args)
                        event.current_stream_wait() if async_mode else ()
                        worst_x = per_token_cast_back(*worst_x) if isinstance(worst_x, tuple) else worst_x
                        assert len(empty_list) == 0
                        assert num_worst_tokens == worst_x.size(0) == worst_idx.size(0) == worst_weights.size(0)
                        assert torch.equal(recv_x, worst_x[:recv_x.size(0)])
                        assert torch.equal(recv_topk_idx, worst_idx[:recv_x.size(0)])
                        assert torch.equal(recv_topk_weights_clone, worst_weights[:recv_x.size(0)])
                        assert torch.all(worst_idx[recv_x.size(0):] == -1).item()

                    # Cached dispatch
                    if not with_topk:
                        args = {"x": current_x, "handle": handle, "config": config, "async_finish": async_mode}
                        if previous_mode:
                            args.update({"previous_event": Buffer.capture()})
                        recv_x, _, _, _, _, event = buffer.dispatch(**args)
                        event.current_stream_wait() if async_mode else ()
                        recv_x = per_token_cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x
                        if current_x is not x_pure_rand:
                            check_data(recv_x, rank_prefix_matrix)

                    # Combine
                    args = {"x": recv_x, "handle": handle, "config": config, "async_finish": async_mode}
                    if with_topk:
                        args.update({"topk_weights": recv_topk_weights})
                    if previous_mode:
                        args.update({"previous_event": Buffer.capture()})
                    combined_x, combined_topk_weights, event = buffer.combine(**args)
                    event.current_stream_wait() if async_mode else ()
                    check_x = combined_x.float() / is_token_in_rank.sum(dim=1).unsqueeze(1)
                    ref_x = x_pure_rand if current_x is x_pure_rand else x
                    assert calc_diff(check_x, ref_x.float()) < 5e-6
                    if with_topk:
                        check = combined_topk_weights if current_x is x_pure_rand else \
                            combined_topk_weights / is_token_in_rank.sum(dim=1).unsqueeze(1)
                        ref = topk_weights_pure_rand if current_x is x_pure_rand else topk_weights
                        assert calc_diff(check, ref) < 1e-9
    assert isinstance(event, EventOverlap)
    buffer.destroy()
    return True


def low_latency(group, device, num_tokens=30, hidden=1024, num_topk=4, num_experts=None):
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    num_experts = num_experts or 4 * num_ranks
    num_local_experts = num_experts // num_ranks
    size = Buffer.get_low_latency_rdma_size_hint(num_tokens, hidden, num_ranks, num_experts)
    buffer = Buffer(group, num_rdma_bytes=size, low_latency_mode=True, num_qps_per_rank=num_local_experts,
                    allow_nvlink_for_low_latency_mode=True, explicitly_destroy=True, allow_mnnvl=False)
    torch.manual_seed(rank)
    rank_offset = 128
    x = torch.ones((num_tokens, hidden), dtype=torch.bfloat16, device=device) * (rank - rank_offset)
    x[:, -128:] = torch.arange(num_tokens, device=device).to(torch.bfloat16).view(-1, 1)
    scores = torch.randn((num_tokens, num_experts), dtype=torch.float32, device=device).abs() + 1
    topk_idx = torch.topk(scores, num_topk, dim=-1, largest=True, sorted=True)[1].to(deep_ep.topk_idx_t)
    topk_weights = torch.randn((num_tokens, num_topk), dtype=torch.float32, device=device).abs()
    for _ in range(5):  # some go nowhere
        topk_idx[torch.randint(num_tokens, (1,)).item(), torch.randint(num_topk, (1,)).item()] = -1

    every = [torch.empty_like(topk_idx.cpu()) for _ in range(num_ranks)]
    dist.all_gather(every, topk_idx.cpu(), group=group)
    all_topk_idx = torch.stack(every).to(device)
    total = torch.zeros(num_local_experts, dtype=torch.int, device=device)
    want_total = torch.zeros_like(total)
    for return_recv_hook in (False, True):
        for use_fp8, round_scale, use_ue8m0 in ((False, False, False), (True, False, False), (True, True, False),
                                                (True, True, True)):
            packed, count, handle, event, hook = buffer.low_latency_dispatch(
                x, topk_idx, num_tokens, num_experts, use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0,
                cumulative_local_expert_recv_stats=total, async_finish=not return_recv_hook,
                return_recv_hook=return_recv_hook)
            hook() if return_recv_hook else event.current_stream_wait()
            if use_fp8:
                assert packed[1].shape == (num_local_experts, num_tokens * num_ranks, hidden // (512 if use_ue8m0 else 128))
                scales = packed[1]
                if use_ue8m0:
                    scales = (scales.contiguous().view(torch.uint8).to(torch.int32) << 23).view(torch.float32)
                simulated = torch.empty(packed[0].shape, dtype=torch.bfloat16, device=device)
                for i in range(num_local_experts):
                    simulated[i] = per_token_cast_back(packed[0][i], scales[i].contiguous())
            else:
                simulated = packed.clone()
            want_total += count
            src_info, layout_range, m, h, e = handle
            assert (m, h, e) == (num_tokens, hidden, num_experts)
            for i in range(num_local_experts):
                expert_id = rank * num_local_experts + i
                n = count[i].item()
                assert n == (all_topk_idx == expert_id).sum().item()
                assert (layout_range[i] & 0xffffffff).sum().item() == n
                recv_x, src = simulated[i, :n], src_info[i, :n]
                if n == 0:
                    continue
                recv = recv_x[:, :-128].float()
                assert torch.equal(recv.amin(dim=-1), recv.amax(dim=-1))
                assert (recv_x[:, -128:].float() - src.view(-1, 1) % num_tokens).abs().max().item() < 1.1 if use_fp8 else \
                    (recv_x[:, -128:] - src.view(-1, 1) % num_tokens).sum().item() == 0
                for j in range(num_ranks):
                    begin, c = (layout_range[i][j] >> 32).item(), (layout_range[i][j] & 0xffffffff).item()
                    assert c == (all_topk_idx[j] == expert_id).sum().item()
                    if not round_scale:
                        assert (recv[begin:begin + c] - (j - rank_offset)).abs().max().item() < 1e-3 * 128 if c else True
                    assert torch.equal(src[begin:begin + c].long(),
                                       (all_topk_idx[j] == expert_id).any(-1).nonzero().flatten())
            for zero_copy in (False, True):
                if zero_copy:
                    buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = simulated
                out = torch.empty((num_tokens, hidden), dtype=torch.bfloat16, device=device)
                combined, event, hook = buffer.low_latency_combine(
                    simulated, topk_idx, topk_weights, handle, async_finish=not return_recv_hook, zero_copy=zero_copy,
                    return_recv_hook=return_recv_hook, out=out)
                hook() if return_recv_hook else event.current_stream_wait()
                diff = calc_diff(x * topk_weights.masked_fill(topk_idx == -1, 0).sum(dim=1).view(-1, 1), combined)
                assert not torch.isnan(combined).any()
                assert diff < (9e-4 if use_fp8 else 1e-5), diff
                if not zero_copy:  # one combine a dispatch: another dispatch for the second
                    _, _, handle, event, hook = buffer.low_latency_dispatch(
                        x, topk_idx, num_tokens, num_experts, use_fp8=False, return_recv_hook=True)
                    hook()
    assert torch.equal(total, want_total)
    buffer.destroy()
    return True


def internode(group, device, num_tokens=90, hidden=256, num_topk_groups=2, num_topk=4, num_experts=None):
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    num_experts = num_experts or 8 * num_ranks
    torch.manual_seed(rank)
    buffer = Buffer(group, int(1e8), int(1e8), low_latency_mode=False, num_qps_per_rank=12, explicitly_destroy=True)
    num_nodes = buffer.runtime.get_num_rdma_ranks()
    num_local_ranks = num_ranks // num_nodes
    assert num_nodes > 1

    x = torch.ones((num_tokens, hidden), dtype=torch.bfloat16, device=device) * rank
    x_pure_rand = torch.randn((num_tokens, hidden), dtype=torch.bfloat16, device=device)
    x_e4m3 = per_token_cast_to_fp8(x)
    x_e4m3 = (x_e4m3[0], x_e4m3[1].T.contiguous().T)
    # Gating limited to groups: a token's experts lie in a few nodes.
    scores = torch.randn((num_tokens, num_experts), dtype=torch.float32, device=device).abs() + 1
    group_scores = scores.view(num_tokens, num_nodes, -1).amax(dim=-1)
    group_idx = torch.topk(group_scores, k=min(num_topk_groups, num_nodes), dim=-1, sorted=False).indices
    keep = torch.zeros((num_tokens, num_nodes), dtype=torch.bool, device=device).scatter_(1, group_idx, True)
    scores = (scores.view(num_tokens, num_nodes, -1) * keep.unsqueeze(-1)).view(num_tokens, -1)
    topk_idx = torch.topk(scores, num_topk, dim=-1, largest=True, sorted=False)[1].to(deep_ep.topk_idx_t)
    topk_weights = torch.ones((num_tokens, num_topk), dtype=torch.float32, device=device) * rank
    topk_weights_pure_rand = torch.randn((num_tokens, num_topk), dtype=torch.float32, device=device)
    rank_idx = (topk_idx // (num_experts // num_ranks)).to(torch.int64)
    rank_idx.masked_fill_(topk_idx == -1, -1)
    rdma_rank_idx = rank_idx // num_local_ranks
    rdma_rank_idx.masked_fill_(rank_idx == -1, -1)
    inplace_unique(rank_idx, num_ranks)
    inplace_unique(rdma_rank_idx, num_nodes)

    num_tokens_per_expert = torch.stack([(topk_idx == i).sum() for i in range(num_experts)]).int()
    gbl_num_tokens_per_expert = num_tokens_per_expert.clone().cpu()
    dist.all_reduce(gbl_num_tokens_per_expert, group=group)
    num_tokens_per_rank = torch.stack([(rank_idx == i).sum() for i in range(num_ranks)]).int()
    num_tokens_per_rdma_rank = torch.stack([(rdma_rank_idx == i).sum() for i in range(num_nodes)]).int()
    is_token_in_rank = torch.stack([(rank_idx == i).any(dim=-1) for i in range(num_ranks)], dim=1)
    gbl_num_tokens_per_rank = num_tokens_per_rank.clone().cpu()
    dist.all_reduce(gbl_num_tokens_per_rank, group=group)
    ref_rank, ref_rdma_rank, ref_expert, ref_in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    assert torch.allclose(ref_rank, num_tokens_per_rank) and torch.allclose(ref_rdma_rank, num_tokens_per_rdma_rank)
    assert torch.allclose(ref_expert, num_tokens_per_expert) and torch.allclose(ref_in_rank, is_token_in_rank)

    config = Config(Buffer.num_sms, 8, 512, 16, 128)

    def check_data(check_x, recv_gbl_rank_prefix_sum):
        assert torch.allclose(check_x.amin(dim=1), check_x.amax(dim=1))
        check_start = 0
        for i in range(num_ranks):
            check_end = recv_gbl_rank_prefix_sum[i].item()
            assert (check_x[check_start:check_end, :].int() - i).sum().item() == 0
            check_start = check_end

    for previous_mode in (False, True):
        for async_mode in (False, True):
            for current_x in (x_pure_rand, x, x_e4m3):
                for with_topk in (False, True):
                    args = {"x": current_x, "num_tokens_per_rank": num_tokens_per_rank,
                            "num_tokens_per_rdma_rank": num_tokens_per_rdma_rank, "is_token_in_rank": is_token_in_rank,
                            "num_tokens_per_expert": num_tokens_per_expert, "config": config, "async_finish": async_mode}
                    if with_topk:
                        args.update({"topk_idx": topk_idx, "topk_weights":
                                     topk_weights_pure_rand if current_x is x_pure_rand else topk_weights})
                    if previous_mode:
                        args.update({"previous_event": Buffer.capture()})
                    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, event = buffer.dispatch(**args)
                    event.current_stream_wait() if async_mode else ()
                    recv_x = per_token_cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x
                    recv_gbl_rank_prefix_sum = handle[-4]
                    assert gbl_num_tokens_per_rank[rank].item() == recv_x.size(0)
                    assert gbl_num_tokens_per_expert.view(num_ranks, -1)[rank].tolist() == counts
                    if current_x is not x_pure_rand:
                        check_data(recv_x, recv_gbl_rank_prefix_sum)
                    if with_topk:
                        for i, count in enumerate(counts):
                            assert recv_topk_idx.eq(i).sum().item() == count
                        if current_x is not x_pure_rand:
                            recv_topk_weights[recv_topk_idx.eq(-1)] = recv_topk_weights.amax(
                                dim=1, keepdim=True).expand_as(recv_topk_weights)[recv_topk_idx.eq(-1)]
                            check_data(recv_topk_weights, recv_gbl_rank_prefix_sum)
                    else:  # cached
                        args = {"x": current_x, "handle": handle, "config": config, "async_finish": async_mode}
                        if previous_mode:
                            args.update({"previous_event": Buffer.capture()})
                        recv_x, _, _, _, _, event = buffer.dispatch(**args)
                        event.current_stream_wait() if async_mode else ()
                        recv_x = per_token_cast_back(*recv_x) if isinstance(recv_x, tuple) else recv_x
                        if current_x is not x_pure_rand:
                            check_data(recv_x, recv_gbl_rank_prefix_sum)
                    bias_0 = torch.ones((num_tokens, hidden), dtype=torch.bfloat16, device=device)
                    bias_1 = torch.randn((num_tokens, hidden), dtype=torch.bfloat16, device=device)
                    args = {"x": recv_x, "bias": (bias_0, bias_1), "handle": handle, "config": config,
                            "async_finish": async_mode}
                    if with_topk:
                        args.update({"topk_weights": recv_topk_weights})
                    if previous_mode:
                        args.update({"previous_event": Buffer.capture()})
                    combined_x, combined_topk_weights, event = buffer.combine(**args)
                    event.current_stream_wait() if async_mode else ()
                    check_x = (combined_x.float() - bias_0.float() - bias_1.float()) / is_token_in_rank.sum(dim=1).unsqueeze(1)
                    ref_x = x_pure_rand if current_x is x_pure_rand else x
                    assert calc_diff(check_x, ref_x.float()) < 5e-6
                    if with_topk:
                        check = combined_topk_weights if current_x is x_pure_rand else \
                            combined_topk_weights / is_token_in_rank.sum(dim=1).unsqueeze(1)
                        ref = topk_weights_pure_rand if current_x is x_pure_rand else topk_weights
                        assert calc_diff(check, ref) < 1e-9
    buffer.destroy()
    return True
