"""Train a small Mixture-of-Experts language model on the licence texts of this machine, experts spread over the ranks.

    torchrun --nproc-per-node 4 examples/train_moe.py              # on GPUs where there are enough, else on the CPU
    python3 examples/train_moe.py                                  # one rank with all experts
    torchrun --nproc-per-node 4 examples/train_moe.py --compare    # both, and their losses compared

Bytes are the tokens. Every rank holds the dense parts (their gradients are added up over the ranks) and its share of the
experts (whose gradients are complete as they come: combine's backward brings every token's). A step's batch is the same
whatever the number of ranks, each rank taking its share; in fp32 the losses are therefore the same too, up to rounding.
"""
import argparse
import glob
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import epx

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from curve import save_curve  # noqa: E402


def text():
    """The licence texts, or this checkout's README: uint8 [n]."""
    files = sorted(set(os.path.realpath(f) for f in glob.glob("/usr/share/common-licenses/*")))
    files = [f for f in files if os.path.isfile(f)]
    if not files:
        files = [os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md")]
    data = b"".join(open(f, "rb").read() for f in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), files


def batch(data, step, size, context):
    """Sequences of step `step`: int64 [size, context + 1], the same on every rank."""
    random = torch.Generator().manual_seed(7919 * step + 1)
    starts = torch.randint(len(data) - context - 1, (size,), generator=random)
    return torch.stack([data[s:s + context + 1].long() for s in starts])


class Block(nn.Module):
    def __init__(self, buffer, hidden, inner, experts, topk, seed):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.moe = epx.MoELayer(buffer, hidden, inner, experts, topk, seed=seed)

    def forward(self, x):
        b, t, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 4, h // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, h))
        return x + self.moe(self.norm2(x))


class Model(nn.Module):
    def __init__(self, buffer, a):
        super().__init__()
        torch.manual_seed(1)  # the dense parts are equal on all ranks
        self.embed, self.place = nn.Embedding(256, a.hidden), nn.Embedding(a.context, a.hidden)
        self.blocks = nn.ModuleList(Block(buffer, a.hidden, a.inner, a.experts, a.topk, 10 + i) for i in range(a.layers))
        self.norm, self.head = nn.LayerNorm(a.hidden), nn.Linear(a.hidden, 256)

    def forward(self, tokens):
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def train(a, buffer, group, device, steps, show):
    """(model, losses): the mean loss of every step's whole batch."""
    rank, ranks = buffer.rank, buffer.group_size
    data, _ = text()
    model = Model(buffer, a).to(device)
    dense = [p for p in model.parameters() if not getattr(p, "expert", False)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=a.lr, eps=1e-5)
    mine, tokens_in_all, losses, begun, said = a.batch // ranks, a.batch * a.context, [], time.monotonic(), 0.0
    for step in range(steps):
        sequences = batch(data, step, a.batch, a.context)[rank * mine:(rank + 1) * mine].to(device)
        logits = model(sequences[:, :-1])
        loss = F.cross_entropy(logits.float().reshape(-1, 256), sequences[:, 1:].reshape(-1), reduction="sum") / tokens_in_all
        optimiser.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        if ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in dense] + [total.view(1)])
            dist.all_reduce(flat, group=group)
            total = flat[-1]
            at = 0
            for p in dense:
                p.grad.copy_(flat[at:at + p.numel()].view_as(p))
                at += p.numel()
        optimiser.step()
        losses.append(float(total))
        now = time.monotonic()
        if show and rank == 0 and (now - said > 0.5 or step == steps - 1):
            said = now
            print("step %4d of %d   loss %.4f   %.0f tokens/s" % (step + 1, steps, losses[-1],
                                                                  (step + 1) * tokens_in_all / (now - begun)), flush=True)
    return model, losses


def save_routing(a, model, buffer, group, device, path):
    """What the first layer's router chooses for a stretch of text, for `epx bench --routing FILE`."""
    rank, ranks = buffer.rank, buffer.group_size
    data, _ = text()
    each = max(1, a.routing_tokens // a.context)
    sequences = batch(data, 10**6, each * ranks, a.context)[rank * each:(rank + 1) * each].to(device)
    with torch.no_grad():
        model(sequences[:, :-1])
    chosen = model.blocks[0].moe.last_topk.cpu().tolist()
    everybody = [chosen]
    if ranks > 1:
        everybody = [None] * ranks
        dist.all_gather_object(everybody, chosen, group=group)
    if rank == 0:
        with open(path, "w") as file:
            file.write("# Which experts a trained router chose: examples/train_moe.py, first layer, licence texts as bytes\n")
            file.write("epx-routing 1 ranks %d topk %d experts %d\n" % (ranks, a.topk, a.experts))
            file.write("tokens %s\n" % " ".join(str(len(one)) for one in everybody))
            for one in everybody:
                file.writelines(" ".join(map(str, ids)) + "\n" for ids in one)
        print("routing of %d tokens: %s" % (sum(map(len, everybody)), path))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step, over all ranks")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--inner", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--curve", default="train_moe.png", help="picture of the losses; '' is none")
    parser.add_argument("--routing", default="", help="file to save the router's choices in")
    parser.add_argument("--routing-tokens", type=int, default=512, help="tokens of each rank in that file")
    parser.add_argument("--compare", action="store_true", help="train on one rank too; the first 50 losses must agree")
    a = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if a.batch % ranks or a.experts % ranks:
        parser.error("--batch %d and --experts %d must be multiples of the %d ranks" % (a.batch, a.experts, ranks))
    cuda = a.device == "cuda" or a.device == "auto" and torch.cuda.device_count() >= ranks
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(1)
    group = None
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        group = dist.group.WORLD
    where = "cuda" if cuda else "cpu"
    if group is not None:
        buffer = epx.Buffer(group, 64 << 20, backend=where)
    else:
        buffer = epx.Buffer(unique_id=epx.unique_id(), rank=0, ranks=1, num_nvl_bytes=64 << 20, backend=where)

    if buffer.rank == 0:
        data, files = text()
        print("%d bytes of %d texts; %d experts over %d ranks on %s" % (len(data), len(files), a.experts, ranks, where))
    model, losses = train(a, buffer, group, device, a.steps, show=True)
    if a.routing:
        save_routing(a, model, buffer, group, device, a.routing)
    if a.curve and buffer.rank == 0:
        print("curve: %s (by %s)" % (a.curve, save_curve(losses, a.curve)))
    wrong = False
    if a.compare:
        if buffer.rank == 0:
            alone = epx.Buffer(unique_id=epx.unique_id(), rank=0, ranks=1, num_nvl_bytes=64 << 20, backend=where)
            count = min(50, a.steps)
            _, other = train(a, alone, None, device, count, show=False)
            off = max(abs(x - y) for x, y in zip(losses, other))
            wrong = off > 1e-4
            print("first %d losses against one rank with all experts: at most %.2e apart%s" %
                  (count, off, ", WRONG (1e-4 is allowed)" if wrong else ""))
            alone.destroy()
        if group is not None:
            flag = torch.tensor([int(wrong)], device=device)
            dist.all_reduce(flag)
            wrong = bool(flag.item())
    buffer.destroy()
    if group is not None:
        dist.destroy_process_group()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
