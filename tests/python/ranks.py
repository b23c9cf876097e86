"""Runs a function on several ranks: forked processes with a gloo group, each result or failure told to the test.

The parent imports torch once and initialises nothing (no CUDA, no threads), so that a fork is cheap and safe.
"""
import datetime
import gc
import glob
import multiprocessing
import os
import signal
import tempfile
import time
import traceback

import pytest

import epx

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)
GPUS = len(glob.glob("/dev/nvidia[0-9]*"))
DEVICE = os.environ.get("EPX_TEST_DEVICE", "cuda" if GPUS else "cpu")


def need(ranks):
    """Skip when there are not enough GPUs for that many ranks."""
    if DEVICE == "cuda" and ranks > GPUS:
        pytest.skip("%d ranks need as many GPUs; there are %d" % (ranks, GPUS))


def blocks():
    """What epx knows of the tensors alive that it made over memory of the C library."""
    return [one for one in gc.get_objects() if type(one) is epx._dlpack._Block]


def device_of(rank):
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    return torch.device("cpu")


_marks = None  # of this rank: a folder of the test's


def all_here(group, timeout=30):
    """Once in a test: all ranks have come here, and their streams. Who is out of it may die at once. Who is out of a
    barrier of the buffer may not: others may be in it still, and fail with what they or a third one hear of the death."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    open(os.path.join(_marks, "here.%d" % group.rank()), "w").close()
    end = time.monotonic() + timeout
    while not all(os.path.exists(os.path.join(_marks, "here.%d" % rank)) for rank in range(group.size())):
        assert time.monotonic() < end, "a rank did not come"
        time.sleep(0.001)


def _child(function, rank, ranks, store, pipe, environment, arguments):
    global _marks
    _marks = os.path.dirname(store)
    try:
        os.environ.update(environment)
        torch.set_num_threads(1)
        if ranks > 0:
            dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks,
                                    timeout=datetime.timedelta(seconds=60))
        result = function(dist.group.WORLD, device_of(rank), *arguments)
        pipe.send(("ok", result))
    except pytest.skip.Exception as skipped:
        pipe.send(("skip", str(skipped)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def run(ranks, function, *arguments, environment=None, timeout=90, start="fork", dead=()):
    """function(group, device, *arguments) on each rank: the list of results, by rank.

    dead   ranks that are expected to be killed; they have no result
    """
    need(ranks)
    context = multiprocessing.get_context(start)
    with tempfile.TemporaryDirectory() as folder:
        children, pipes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(function, rank, ranks, os.path.join(folder, "store"), theirs,
                                                         environment or {}, arguments), daemon=True)
            child.start()
            theirs.close()
            children.append(child)
            pipes.append(ours)
        results, end = [None] * ranks, time.monotonic() + timeout
        try:
            for rank in range(ranks):
                if rank in dead:
                    continue
                if not pipes[rank].poll(max(0.1, end - time.monotonic())):
                    raise AssertionError("rank %d did not end within %d s" % (rank, timeout))
                try:
                    results[rank] = pipes[rank].recv()
                except EOFError:
                    children[rank].join(5)
                    results[rank] = ("failed", "rank %d died, exit code %s" % (rank, children[rank].exitcode))
            for child in children:
                child.join(max(0.1, end - time.monotonic()))
        finally:
            for child in children:
                if child.is_alive():
                    os.kill(child.pid, signal.SIGKILL)
                    child.join()
    failed = ["rank %d:\n%s" % (rank, result[1]) for rank, result in enumerate(results)
              if result is not None and result[0] == "failed"]
    assert not failed, "\n".join(failed)
    for result in results:
        if result is not None and result[0] == "skip":
            pytest.skip(result[1])
    return [result[1] if result is not None else None for result in results]
