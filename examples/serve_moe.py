"""Decode with a Mixture-of-Experts model: low-latency calls, two micro-batches in flight, hooks.

    torchrun --nproc-per-node 4 examples/serve_moe.py          # on GPUs where there are enough, else on the CPU
    python3 examples/serve_moe.py

Each rank serves its own sequences and a share of the experts. While one micro-batch's rows travel, the other's experts
run: a call with return_recv_hook only sends, and hook() receives when the rows are needed:

    dispatch a, dispatch b      send halves
    receive a, experts a, combine a (send), receive b, experts b, combine b (send)
    receive a's sums, receive b's sums

The weights are random: what counts is that the words equal those of the same model in one process (--compare, the
default on up to 8 ranks), and how long a step takes.
"""
import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn import functional as F

import epx


class Weights:
    """The same on every rank: a table of bytes, and per layer a gate and the experts' two matrices."""

    def __init__(self, a, device):
        random = torch.Generator().manual_seed(5)

        def draw(*shape):
            return (torch.randn(*shape, generator=random) * shape[-2] ** -0.5).bfloat16().to(device)
        self.embed = (torch.randn(256, a.hidden, generator=random) * 0.5).bfloat16().to(device)
        self.layers = [(draw(a.hidden, a.experts), draw(a.experts, a.hidden, a.inner), draw(a.experts, a.inner, a.hidden))
                       for _ in range(a.layers)]


def route(x, gate, topk):
    """(topk_idx int64 [T,k], weights fp32 [T,k])"""
    weights, chosen = torch.topk(F.softmax((x.float() @ gate.float()), dim=-1), topk, dim=-1)
    return chosen, weights / weights.sum(-1, keepdim=True)


def expert(rows, up, down):
    return F.gelu(rows @ up) @ down


def normed(x):
    return F.rms_norm(x, x.shape[-1:]) if hasattr(F, "rms_norm") else x * x.float().square().mean(
        -1, keepdim=True).add(1e-6).rsqrt().to(x.dtype)


class Server:
    """One rank's part: its experts, and the exchange."""

    def __init__(self, a, buffer, weights):
        self.a, self.buffer, self.weights = a, buffer, weights
        self.local = a.experts // buffer.group_size
        self.first = buffer.rank * self.local

    def send(self, x, layer):
        chosen, weights = route(x, self.weights.layers[layer][0], self.a.topk)
        recv, count, handle, _, hook = self.buffer.low_latency_dispatch(
            x, chosen, self.a.tokens, self.a.experts, use_fp8=False, return_recv_hook=True)
        return recv, count, handle, chosen, weights, hook

    def experts(self, sent, layer):
        """Receive, run this rank's experts, send the outputs back: (sums, hook that receives them)."""
        recv, count, handle, chosen, weights, hook = sent
        hook()
        _, ups, downs = self.weights.layers[layer]
        out = torch.empty_like(recv)
        counts = count.tolist() if recv.device.type == "cpu" else [recv.shape[1]] * self.local
        for e, n in enumerate(counts):  # on a GPU all rows, so that the host need not wait for the counts
            if n:
                out[e, :n] = expert(recv[e, :n], ups[self.first + e], downs[self.first + e])
        y, _, hook = self.buffer.low_latency_combine(out, chosen, weights, handle, return_recv_hook=True)
        return y, hook

    def step(self, a, b):
        """One token further for both micro-batches: bytes [T] each in, bytes [T] each out."""
        xa, xb = self.weights.embed[a], self.weights.embed[b]
        for layer in range(self.a.layers):
            na, nb = normed(xa), normed(xb)
            sa, sb = self.send(na, layer), self.send(nb, layer)
            ya, receive_a = self.experts(sa, layer)
            yb, receive_b = self.experts(sb, layer)
            receive_a()
            xa = xa + ya
            receive_b()
            xb = xb + yb
        return self.word(xa), self.word(xb)

    def word(self, x):
        return (normed(x).float() @ self.weights.embed.float().t()).argmax(-1)


def alone(a, weights, word):
    """The same step in one process."""
    x = weights.embed[word]
    for gate, ups, downs in weights.layers:
        chosen, gates = route(normed(x), gate, a.topk)
        rows, total = normed(x), torch.zeros(x.shape, device=x.device)
        for k in range(a.topk):
            y = torch.stack([expert(rows[t:t + 1], ups[e], downs[e])[0] for t, e in enumerate(chosen[:, k].tolist())])
            total = total + gates[:, k:k + 1] * y.float()
        x = x + total.bfloat16()
    return (normed(x).float() @ weights.embed.float().t()).argmax(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="tokens to decode")
    parser.add_argument("--tokens", type=int, default=8, help="sequences of one micro-batch on one rank")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--inner", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--no-compare", action="store_true")
    a = parser.parse_args()

    ranks, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if a.experts % ranks:
        parser.error("--experts %d must be a multiple of the %d ranks" % (a.experts, ranks))
    cuda = a.device == "cuda" or a.device == "auto" and torch.cuda.device_count() >= ranks
    device, where = (torch.device("cuda", local), "cuda") if cuda else (torch.device("cpu"), "cpu")
    if cuda:
        torch.cuda.set_device(local)
    torch.set_num_threads(1)
    window = epx.Buffer.get_low_latency_rdma_size_hint(a.tokens, a.hidden, ranks, a.experts)
    options = dict(num_rdma_bytes=window, low_latency_mode=True, backend=where)
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        buffer = epx.Buffer(dist.group.WORLD, **options)
    else:
        buffer = epx.Buffer(unique_id=epx.unique_id(), rank=0, ranks=1, **options)

    with torch.no_grad():
        weights = Weights(a, device)
        server = Server(a, buffer, weights)
        start = torch.arange(2 * a.tokens, device=device) * 7 + 31 * buffer.rank
        pair = (start[:a.tokens] % 256, start[a.tokens:] % 256)
        wrong, took = 0, []
        for _ in range(a.steps):
            begun = time.monotonic()
            after = server.step(*pair)
            if cuda:
                torch.cuda.synchronize()
            took.append(time.monotonic() - begun)
            if not a.no_compare:
                wrong += sum(int((alone(a, weights, one) != got).sum()) for one, got in zip(pair, after))
            pair = after
    took.sort()
    words = 2 * a.tokens * a.steps
    if ranks > 1:
        total = torch.tensor([wrong, words], device=device)
        dist.all_reduce(total)
        wrong, words = total.tolist()
    if buffer.rank == 0:
        print("%d ranks on %s: %d tokens decoded, step %.0f us (median)%s" % (
            ranks, where, words, took[len(took) // 2] * 1e6,
            "" if a.no_compare else "; %d differ from the model in one process" % wrong))
    buffer.destroy()
    if ranks > 1:
        dist.destroy_process_group()
    # Matrix products of other shapes round differently in bf16; now and then two bytes are as good as equal.
    return int(wrong > words // 20)


if __name__ == "__main__":
    sys.exit(main())
