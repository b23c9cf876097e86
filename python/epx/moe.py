"""MoELayer: an expert-parallel feed-forward layer, small enough to read and to copy."""
import torch
from torch import nn
from torch.nn import functional as F

from . import ops


class MoELayer(nn.Module):
    """Top-k of `num_experts` two-layer experts, spread in equal blocks over the ranks of `buffer`.

    The gate lives on every rank (average its gradients over the ranks); an expert only on its own (do not).
    Each expert's weights are drawn from its own number, so that they do not depend on how many ranks there are.

    x       [..., hidden] fp32, bf16 or fp16
    Returns [..., hidden]; `last_topk` keeps the router's choice int64 [T,k].
    """

    def __init__(self, buffer, hidden, inner, num_experts, topk, seed=0):
        super().__init__()
        if num_experts % buffer.group_size:
            raise ValueError("num_experts: %d; it must be a multiple of the %d ranks" % (num_experts, buffer.group_size))
        self.buffer, self.num_experts, self.topk = buffer, num_experts, topk
        self.local = num_experts // buffer.group_size
        random = torch.Generator().manual_seed(seed)
        self.gate = nn.Parameter(torch.randn(hidden, num_experts, generator=random) * hidden ** -0.5)
        ups, downs = [], []
        for expert in range(buffer.rank * self.local, (buffer.rank + 1) * self.local):
            random = torch.Generator().manual_seed(seed * 1000003 + expert + 1)
            ups.append(torch.randn(hidden, inner, generator=random) * hidden ** -0.5)
            downs.append(torch.randn(inner, hidden, generator=random) * inner ** -0.5)
        self.up, self.down = nn.Parameter(torch.stack(ups)), nn.Parameter(torch.stack(downs))
        for parameter in (self.up, self.down):
            parameter.expert = True  # not to be averaged over the ranks
        self.last_topk = None

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, chosen = torch.topk(F.softmax((x @ self.gate).float(), dim=-1), self.topk, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        self.last_topk = chosen.detach()
        rows, ids, row_weights, _, handle = ops.dispatch(x, chosen, weights, self.buffer, self.num_experts)
        out = torch.zeros_like(rows)
        for expert in range(self.local):
            row, column = torch.where(ids == expert)
            mine = F.gelu(rows[row] @ self.up[expert]) @ self.down[expert]
            out = out.index_add(0, row, mine * row_weights[row, column].to(mine.dtype)[:, None])
        return ops.combine(out, handle, self.buffer, x).view(shape)
