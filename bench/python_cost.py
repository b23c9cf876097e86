"""What Python adds to a call: epx.Buffer against the same C calls by ctypes, in the same process, on the same rows.

    torchrun --nproc-per-node 4 bench/python_cost.py            # on GPUs where there are enough, else on the CPU
    torchrun --nproc-per-node 2 bench/python_cost.py --bench build/bin/epx      # epx bench of the same shapes after it
    python3 bench/python_cost.py --tokens 8 --hidden 64         # one rank, tiny rows: nearly all of it is the call

Each figure is the median over --iters calls, in microseconds:

stream   as epx bench times a GPU: between two events of the stream, the cache cold, the ranks' GPUs together at the start, the
         host ahead of them, as it is in a program that keeps its GPU busy; each iteration by its slowest rank
wall     from before the call until its rows are there, with the GPU idle before it, so that the host's time shows; of rank 0
host     until the call returns; of rank 0

Without Python at all: the epx bench commands of the last lines. They name the SMs that epx.Buffer asks for.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time
from array import array

import torch
import torch.distributed as dist

import epx
from epx import _abi

CHILL_BYTES = 256 << 20  # written before each call: several times any L2
HEAD_START = 1000000     # GPU cycles, about half a millisecond: in that time the host, its caches cold too, enqueues the call
GRAPH_PAIRS = 24         # as epx bench --graph


class Clock:
    """Times calls on one buffer. Every method is collective."""

    def __init__(self, buffer, device, iters, warmup):
        self.buffer, self.device, self.iters, self.warmup = buffer, device, iters, warmup
        self.cuda = device.type == "cuda"
        self.cold = torch.empty(CHILL_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def wall(self, call):
        """(median us until the rows are there, median us until the call returns)"""
        total, host = [], []
        for _ in range(self.warmup + self.iters):
            self.buffer.barrier()
            if self.cuda:
                torch.cuda.synchronize(self.device)
            begun = time.perf_counter()
            call()
            returned = time.perf_counter()
            if self.cuda:
                torch.cuda.synchronize(self.device)
            total.append((time.perf_counter() - begun) * 1e6)
            host.append((returned - begun) * 1e6)
        return statistics.median(total[self.warmup:]), statistics.median(host[self.warmup:])

    def stream(self, call, calls=1):
        """Median us on the stream of each of the `calls` that `call` makes, by the slowest rank; None on the CPU."""
        if not self.cuda:
            return None
        start, stop, times = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), array("d")
        gather = self.buffer._core.allgather
        for _ in range(self.warmup + self.iters):
            torch.cuda.synchronize(self.device)
            gather(b"ready")
            self.cold.fill_(1)
            torch.cuda._sleep(HEAD_START)
            self.buffer.barrier()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / calls)
        everybody = [array("d", part) for part in gather(times[self.warmup:].tobytes())]
        return statistics.median(map(max, zip(*everybody)))

    def compare(self, python, c):
        """{way of timing: (python us, C us)}"""
        python_wall, python_host = self.wall(python)
        c_wall, c_host = self.wall(c)
        return {"stream": (self.stream(python), self.stream(c)), "wall": (python_wall, c_wall),
                "host": (python_host, c_host)}


def made(buffer, device, tokens, hidden, topk, experts):
    """(rows bf16, their experts) of this rank"""
    random = torch.Generator().manual_seed(buffer.rank)
    x = torch.randn(tokens, hidden, generator=random).bfloat16().to(device)
    return x, torch.topk(torch.rand(tokens, experts, generator=random), topk, 1)[1].to(device)


def current(device):
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def measure(buffer, device, tokens, hidden, topk, experts, iters=50, warmup=10):
    """{name: Clock.compare's figures} of a cached dispatch and a combine. Collective."""
    x, ids = made(buffer, device, tokens, hidden, topk, experts)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    recv, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=ids, num_tokens_per_expert=counts)
    core, lib, pointer, stream = buffer._core, buffer._core.lib, handle.core.pointer, current(device)
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

    clock = Clock(buffer, device, iters, warmup)
    return {"cached dispatch": clock.compare(lambda: buffer.dispatch(x, handle=handle), again),
            "combine": clock.compare(lambda: buffer.combine(recv, handle), back)}


def low_latency(buffer, device, tokens, hidden, topk, experts, iters=50, warmup=10):
    """{name: Clock.compare's figures} of a low-latency pair, and of one of many in a graph. Collective."""
    x, ids = made(buffer, device, tokens, hidden, topk, experts)
    weights, out = torch.rand(tokens, topk, device=device), torch.empty_like(x)
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, tokens, experts, use_fp8=False)
    buffer.low_latency_combine(recv, ids, weights, handle, out=out)
    core, lib, pointer = buffer._ll_core, buffer._ll_core.lib, _abi.c_void_p()
    dispatch = _abi.LlDispatch(x=x.data_ptr(), tokens=tokens, hidden=hidden, topk_idx=ids.data_ptr(), topk_idx_bits=64,
                               topk=topk, experts=experts, recv_x=recv.data_ptr(), recv_count=count.data_ptr(),
                               src_info=handle[0].data_ptr(), layout_range=handle[1].data_ptr())
    combine = _abi.LlCombine(x=recv.data_ptr(), topk_idx=ids.data_ptr(), topk_weights=weights.data_ptr(),
                             out=out.data_ptr())

    def python():
        rows, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, tokens, experts, use_fp8=False)
        buffer.low_latency_combine(rows, ids, weights, handle, out=out)

    def c():
        stream = current(device)
        core.check(lib.epx_ll_dispatch(core.buffer, _abi.byref(dispatch), stream, _abi.byref(pointer)))
        core.check(lib.epx_ll_combine(pointer, _abi.byref(combine), stream))

    clock = Clock(buffer, device, iters, warmup)
    figures = {"low-latency pair": clock.compare(python, c)}
    if clock.cuda:
        graphs = [captured(call, device) for call in (python, c)]
        figures["  in a graph"] = {"stream": tuple(clock.stream(graph.replay, GRAPH_PAIRS) for graph in graphs)}
    return figures


def captured(call, device):
    """A graph of GRAPH_PAIRS calls."""
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_PAIRS):
            call()
    return graph


def report(figures):
    """The figures as lines of text."""
    ways = ("stream", "wall", "host")
    lines = ["%-18s" % "us" + "".join(" %9s %9s %8s" % (way + " py", "C", "adds") for way in ways)]
    for name, figure in figures.items():
        line = "%-18s" % name
        for way in ways:
            python, c = figure.get(way, (None, None))
            line += " %9s %9s %8s" % (("-",) * 3 if python is None else
                                      tuple("%.1f" % us for us in (python, c, python - c)))
        lines.append(line)
    return "\n".join(lines)


def in_c(a, cuda, ranks):
    """The commands that measure the same shapes without Python: lists of words after "epx"."""
    shape = ["--ranks", ranks, "--hidden", a.hidden, "--topk", a.topk, "--experts", a.experts, "--iters", a.iters,
             "--no-floor", "--backend", "cuda" if cuda else "cpu"]
    sms = ["--sms", epx.Buffer.get_combine_config(ranks).num_sms] if cuda else []
    commands = [["bench", "--op", "dispatch_cached,combine", "--tokens", a.tokens] + shape + sms]
    if _abi.library().has_ll:
        commands.append(["bench", "--op", "ll_pair", "--tokens", a.ll_tokens] + shape + ["--graph"] * cuda)
    return [[str(word) for word in command] for command in commands]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ll-tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--bench", metavar="EPX", help="the epx command: run its bench of the same shapes too")
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
    if _abi.library().has_ll:
        figures.update(low_latency(buffer, device, a.ll_tokens, a.hidden, a.topk, a.experts, a.iters))
    first = buffer.rank == 0
    if first:
        print(report(figures), flush=True)
    buffer.destroy()
    if ranks > 1:
        dist.destroy_process_group()
    if first:
        for command in in_c(a, cuda, ranks):
            print("epx " + " ".join(command), flush=True)
            if a.bench:
                subprocess.run([a.bench] + command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
