"""What every rank must receive, computed by each rank for itself from seeds: no collective takes part.

Payloads name (rank, token, column): digits in base 256, since bf16 holds integers only to 256.
"""
import torch


def numbered(rank, tokens, hidden, dtype=torch.bfloat16):
    """[tokens, hidden]: column 0 the rank, 1 and 2 the token's digits, the rest a digit of (column + token)."""
    out = (torch.arange(hidden)[None, :] + torch.arange(tokens)[:, None]) % 251
    out = out.clone().float()
    if tokens:
        out[:, 0] = rank
        out[:, 1] = torch.arange(tokens) % 256
        out[:, 2] = torch.arange(tokens) // 256
    return out.to(dtype)


def routing(seed, rank, tokens, topk, experts, empty=0.1, skew=False):
    """(topk_idx int64 [tokens, topk], distinct ids, some -1; topk_weights fp32)."""
    random = torch.Generator().manual_seed(seed * 1000 + rank)
    scores = torch.rand(tokens, experts, generator=random)
    if skew:
        scores[:, 0] += 0.7
    ids = torch.topk(scores, topk, dim=1)[1] if tokens else torch.empty((0, topk), dtype=torch.int64)
    ids = torch.where(torch.rand(tokens, topk, generator=random) < empty, torch.tensor(-1), ids)
    weights = torch.rand(tokens, topk, generator=random)
    return ids, weights


def in_rank(ids, experts, ranks):
    """bool [tokens, ranks]"""
    owner = torch.where(ids < 0, ranks, ids // (experts // ranks))
    out = torch.zeros((ids.shape[0], ranks + 1), dtype=torch.bool)
    out.scatter_(1, owner, True)
    return out[:, :ranks]


def expected(rank, ranks, experts, everybody):
    """What `rank` receives. everybody: list by rank of (x, ids, weights).

    Returns x, local ids, weights, source token of each row, rows per local expert, rows per source.
    """
    local = experts // ranks
    xs, idxs, ws, tokens, sources = [], [], [], [], []
    for x, ids, weights in everybody:
        take = in_rank(ids, experts, ranks)[:, rank].nonzero().flatten()
        mine = (ids[take] >= rank * local) & (ids[take] < (rank + 1) * local)
        xs.append(x[take])
        idxs.append(torch.where(mine, ids[take] - rank * local, -1))
        ws.append(torch.where(mine, weights[take], 0.0))
        tokens.append(take)
        sources.append(len(take))
    idx = torch.cat(idxs)
    counts = [int((idx == e).sum()) for e in range(local)]
    return torch.cat(xs), idx, torch.cat(ws), torch.cat(tokens), counts, sources


def calc_diff(a, b):
    """deep_ep's measure of a difference, in double."""
    a, b = a.double() + 1, b.double() + 1
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())
