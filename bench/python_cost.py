"""What Python adds to a call: epx.Buffer against the same C calls made directly, in the same process, on the same rows.

    torchrun --nproc-per-node 4 bench/python_cost.py            # on GPUs where there are enough, else on the CPU
    python3 bench/python_cost.py --tokens 8 --hidden 64         # one rank, tiny rows: nearly all of it is the call

Each figure is the median over --iters calls, each from before the call until its rows are there (the GPU synchronised),
of this rank; rank 0 prints its own. "host" is the time until the call returns. The same shapes in C alone, without any
Python: epx bench --op dispatch_cached,combine with the options that the last line names.
"""
import argparse
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

import epx
from epx import _abi


def timed(call, device, iters, warmup, together):
    """(median us until the rows are there, median us until the call returns)"""
    cuda, total, host = device.type == "cuda", [], []
    for i in range(warmup + iters):
        together()
        if cuda:
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        call()
        returned = time.perf_counter()
        if cuda:
            torch.cuda.synchronize(device)
        if i >= warmup:
            total.append((time.perf_counter() - begun) * 1e6)
            host.append((returned - begun) * 1e6)
    return statistics.median(total), statistics.median(host)


def measure(buffer, device, tokens, hidden, topk, experts, iters=50, warmup=10):
    """{name: (python us, python host us, C us, C host us)} of a cached dispatch and a combine. Collective."""
    random = torch.Generator().manual_seed(buffer.rank)
    x = torch.randn(tokens, hidden, generator=random).bfloat16().to(device)
    ids = torch.topk(torch.rand(tokens, experts, generator=random), topk, 1)[1].to(device)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    recv, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts)
    core, lib, pointer = buffer._core, buffer._core.lib, handle.core.pointer
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    config = epx.Buffer.get_combine_config(buffer.group_size)
    rows = _abi.Rows(x=x.data_ptr(), row_bytes=hidden * 2)
    out, got = torch.empty_like(x), _abi.Received()
    combine = _abi.Combine(x=recv.data_ptr() or 16, dtype=_abi.DTYPE_BF16, hidden=hidden, out=out.data_ptr(),
                           sms=config.num_sms if core.cuda else 0)

    def again():
        core.check(lib.epx_dispatch_again(pointer, _abi.byref(rows), None, stream, _abi.byref(got)))
        lib.epx_lease_release(core.buffer, got.lease, stream)

    def back():
        core.check(lib.epx_combine(pointer, _abi.byref(combine), stream))

    def both(python, c):
        first, second = [timed(call, device, iters, warmup, buffer.barrier) for call in (python, c)]
        return first + second

    return {"cached dispatch": both(lambda: buffer.dispatch(x, handle=handle), again),
            "combine": both(lambda: buffer.combine(recv, handle), back)}


def low_latency(buffer, device, tokens, hidden, topk, experts, iters=50, warmup=10):
    """(us of a low-latency pair called from Python, us of the pair replayed from a graph or None). Collective."""
    random = torch.Generator().manual_seed(buffer.rank)
    x = torch.randn(tokens, hidden, generator=random).bfloat16().to(device)
    ids = torch.topk(torch.rand(tokens, experts, generator=random), topk, 1)[1].to(device)
    weights, out = torch.rand(tokens, topk, device=device), torch.empty_like(x)

    def pair():
        recv, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, tokens, experts, use_fp8=False)
        buffer.low_latency_combine(recv, ids, weights, handle, out=out)
    plain = timed(pair, device, iters, warmup, buffer.barrier)[0]
    if device.type != "cuda":
        return plain, None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        pair()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair()
    return plain, timed(graph.replay, device, iters, warmup, buffer.barrier)[0]


def report(figures, pair=None):
    """The figures as lines of text."""
    lines = ["%-16s %10s %10s %10s %10s %10s" % ("us", "python", "C", "adds", "py host", "C host")]
    for name, (python, python_host, c, c_host) in figures.items():
        lines.append("%-16s %10.1f %10.1f %10.1f %10.1f %10.1f" % (name, python, c, python - c, python_host, c_host))
    if pair is not None:
        lines.append("low-latency pair %10.1f%s" % (pair[0], "" if pair[1] is None else
                                                    "   replayed from a graph %10.1f" % pair[1]))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ll-tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    a = parser.parse_args()
    ranks, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = a.device == "cuda" or a.device == "auto" and torch.cuda.device_count() >= ranks
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local)
    torch.set_num_threads(1)
    window = (a.tokens * ranks * (2 * a.hidden + 1024)) * 3
    options = dict(num_nvl_bytes=window, tokens_max=max(8192, a.tokens), backend="cuda" if cuda else "cpu")
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        buffer = epx.Buffer(dist.group.WORLD, **options)
    else:
        buffer = epx.Buffer(unique_id=epx.unique_id(), rank=0, ranks=1, **options)
    figures = measure(buffer, device, a.tokens, a.hidden, a.topk, a.experts, a.iters)
    pair = None
    if _abi.library().has_ll:
        pair = low_latency(buffer, device, a.ll_tokens, a.hidden, a.topk, a.experts, a.iters)
    if buffer.rank == 0:
        print(report(figures, pair))
        print("in C alone: epx bench --op dispatch_cached,combine --backend %s --ranks %d --tokens %d --hidden %d --topk %d "
              "--experts %d --iters %d" % ("cuda" if cuda else "cpu", ranks, a.tokens, a.hidden, a.topk, a.experts, a.iters))
    buffer.destroy()
    if ranks > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
