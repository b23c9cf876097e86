"""What calls ask of the streams on a GPU, on pretend streams: no GPU is needed to see the order. A buffer on the CPU is
told that it has a communication stream; torch.cuda's functions are replaced by ones that write down what they are asked.
What the order is worth on a real GPU is tested in test_gpu.py."""
import contextlib
import gc

import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402

T, H, E, K = 6, 16, 4, 2


class Stream:
    """A stream that remembers after which points of others it comes."""

    number = 0

    def __init__(self, name, device):
        Stream.number += 1
        self.name, self.device, self.cuda_stream, self.length = name, device, Stream.number, 0
        self.device_index = -1  # as the C library says of a buffer on the CPU
        self.after = {}  # stream -> how far along it
        self.captured = False

    def wait_stream(self, other):
        assert other.captured == self.captured or other.length == 0
        self.wait_event(Event.at(other))

    def wait_event(self, event):
        for stream, length in event.seen.items():
            self.after[stream] = max(self.after.get(stream, 0), length)


class Event:
    seen = {}

    def record(self, stream):
        stream.length += 1
        self.seen = {**stream.after, stream: stream.length}

    @classmethod
    def at(cls, stream):
        event = cls()
        event.record(stream)
        return event


class Pretend:
    """torch.cuda as far as epx uses it. `current` is the current stream; `taken` what record_stream was told."""

    def __init__(self, device):
        self.device, self.taken, self.made_on, self.asked = device, {}, {}, 0
        self.main, self.side = Stream("main", device), Stream("side", device)
        self.comm, self.back = Stream("comm", device), Stream("back", device)
        self.current = self.main

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, device=None):
        self.asked += 1
        return self.current

    def install(self):
        torch.cuda.is_initialized = lambda: True
        torch.cuda.current_stream = self.current_stream
        torch.cuda.current_device = lambda: -1
        torch._C._cuda_getCurrentRawStream = lambda index: self.current.cuda_stream
        torch.cuda.stream, torch.cuda.Event = self.stream, Event
        torch.cuda.is_current_stream_capturing = lambda: self.current.captured
        torch.Tensor.record_stream = lambda tensor, stream: self.taken.setdefault(tensor.data_ptr(), set()).add(stream.name)
        empty = torch.empty

        def noted(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            self.made_on[tensor.data_ptr()] = self.current.name
            return tensor
        torch.empty = noted


def prepared(group, device):
    buffer = epx.Buffer(group, 1 << 22)
    cuda = Pretend(device)
    x = torch.ones(T, H)
    ids = torch.arange(T * K).view(T, K) % E
    keys = dict(topk_idx=ids, topk_weights=torch.ones(T, K), num_tokens_per_expert=torch.zeros(E, dtype=torch.int32))
    cuda.install()
    buffer._comm_stream, buffer._core.way_back = cuda.comm, epx._turn.WayBack(cuda.back)
    return buffer, cuda, x, keys


def lease_of(tensor):
    found = [one.keeps for one in world.blocks() if one.tensor.data == tensor.data_ptr()]
    return found[0] if found else None


MODES = [(previous, asynchronous, on_comm) for previous in (False, True) for asynchronous in (False, True)
         for on_comm in (False, True) if not on_comm or previous and asynchronous]


def order(group, device):
    """Where each mode runs, what it comes after, what comes after it, and in which order its leases go back."""
    buffer, cuda, x, keys = prepared(group, device)
    seen, real = [], buffer._core.lib.epx_dispatch_end

    def dispatch_end(handle, place, stream, got):
        seen.append((stream, dict(cuda.comm.after)))
        return real(handle, place, stream, got)
    buffer._core.lib.epx_dispatch_end = dispatch_end
    for previous, asynchronous, on_comm in MODES:
        cuda.main.length += 1
        work = cuda.main.length
        early = epx.Buffer.capture() if previous else None
        cuda.main.length += 5  # work that came after the event
        recv, ids, weights, _, handle, event = buffer.dispatch(
            x, previous_event=early, async_finish=asynchronous, allocate_on_comm_stream=on_comm, **keys)
        stream, after = seen.pop()
        here = not previous and not asynchronous
        assert stream == (cuda.main if here else cuda.comm).cuda_stream
        if not here:
            assert after[cuda.main] >= work  # it comes after the event's work
            if previous:
                assert after[cuda.main] == work + 1  # the event itself; not what followed it, that is the point of it
        # The caller's own stream is the one whose work the lease waits for, whatever the call ran on.
        lease = lease_of(recv)
        assert lease.stream == handle.core.stream == cuda.main.cuda_stream
        if asynchronous:
            assert event.event is not None
            before = cuda.main.after.get(cuda.comm, 0)
            event.current_stream_wait()
            assert cuda.main.after[cuda.comm] > before
            assert cuda.taken[x.data_ptr()] >= {"comm"}
            cuda.taken.clear()
        else:
            assert event.event is None
            if not here:
                assert cuda.main.after[cuda.comm] == cuda.comm.length
        assert recv.data_ptr() not in cuda.taken  # torch does not know leases
        out, _, event = buffer.combine(recv, handle, previous_event=early, async_finish=asynchronous,
                                       allocate_on_comm_stream=on_comm)
        event.current_stream_wait()
        # Ordinary memory: of the communication stream unless that has waited for all of the current one.
        assert cuda.made_on[out.data_ptr()] == ("comm" if previous else "main")
        uses = cuda.taken.get(out.data_ptr(), set())
        assert uses >= ({"main"} if previous else {"comm"} if asynchronous else set()), (previous, asynchronous, uses)
        cuda.taken.clear()
        del recv, ids, weights, handle, lease, out
    buffer.destroy()


def test_order():
    world.run(1, order)


def ordinary(group, device):
    """Without room in the window: results of a call that waits for an event alone are the communication stream's memory."""
    buffer, cuda, x, keys = prepared(group, device)
    hog = buffer.get_local_buffer_tensor(torch.uint8)
    for previous, asynchronous, on_comm in MODES:
        early = epx.Buffer.capture() if previous else None
        recv, ids, weights, _, handle, event = buffer.dispatch(
            x, previous_event=early, async_finish=asynchronous, allocate_on_comm_stream=on_comm, **keys)
        assert lease_of(recv) is None
        for tensor in (recv, ids, weights):
            assert cuda.made_on[tensor.data_ptr()] == ("comm" if previous else "main")
            uses = cuda.taken.get(tensor.data_ptr(), set())
            assert uses >= ({"main"} if previous else {"comm"} if asynchronous else set())
        cuda.taken.clear()
        del recv, ids, weights, handle
    del hog
    buffer.destroy()


def test_ordinary_memory():
    world.run(1, ordinary)


def dropped_elsewhere(group, device):
    """A lease that dies while another stream is current, which has then most likely used it, goes back after that one's work
    as well as its owner's; neither of the two waits for the other. Not across a capture."""
    buffer, cuda, x, keys = prepared(group, device)
    given, real = [], buffer._core.lib.epx_lease_release

    def lease_release(core, number, stream):
        given.append(stream)
        return real(core, number, stream)
    buffer._core.lib.epx_lease_release = lease_release
    got = buffer.dispatch(x, **keys)
    del got
    assert given == [cuda.main.cuda_stream]  # as ever
    for inside in (False, True):  # in the middle of a call of the same buffer too: then it goes back with the next
        got = buffer.dispatch(x, **keys)
        with cuda.stream(cuda.side):
            cuda.side.length += 7
            if inside:
                with buffer._core:
                    del got
                    assert len(given) == 2
            else:
                del got
        assert len(given) == 3 if inside else 2
        assert given[-1] == cuda.back.cuda_stream
        assert cuda.back.after[cuda.side] >= cuda.side.length and cuda.back.after[cuda.main] >= cuda.main.length
        assert cuda.main not in cuda.side.after and cuda.side not in cuda.main.after
    got = buffer.dispatch(x, **keys)
    cuda.side.captured = True
    with cuda.stream(cuda.side):
        del got
    assert given[-1] == cuda.main.cuda_stream
    gc.collect()
    assert buffer._core.leases == 0 and len(given) == 4
    buffer.destroy()


def test_dropped_elsewhere():
    world.run(1, dropped_elsewhere)


def foreign_memory(group, device):
    """The allocator cudaMallocAsync refuses record_stream for memory that it does not know, a lease: that is no failure."""
    buffer, cuda, x, keys = prepared(group, device)
    real, backend = torch.Tensor.record_stream, ["cudaMallocAsync"]

    def record_stream(tensor, stream):
        if lease_of(tensor) is not None:
            raise RuntimeError("ptr not found in ptr_info")
        real(tensor, stream)
    torch.Tensor.record_stream = record_stream
    torch.cuda.get_allocator_backend = lambda: backend[0]
    recv, _, _, _, handle, _ = buffer.dispatch(x, **keys)
    out, _, event = buffer.combine(recv, handle, async_finish=True)
    event.current_stream_wait()
    assert "comm" in cuda.taken[out.data_ptr()]
    backend[0] = "native"
    with pytest.raises(RuntimeError, match="ptr not found"):
        buffer.combine(recv, handle, async_finish=True)
    buffer.destroy()


def test_foreign_memory():
    world.run(1, foreign_memory)


def one_after_the_other(group, device):
    """Calls of a buffer are in order among themselves, from whatever stream; low latency too; not across a capture."""
    buffer, cuda, x, keys = prepared(group, device)
    _, _, _, _, handle, _ = buffer.dispatch(x, **keys)
    with cuda.stream(cuda.side):
        before = cuda.main.length
        buffer.dispatch(x, handle=handle)
        assert cuda.side.after[cuda.main] > before - 1
    buffer.dispatch(x, handle=handle, async_finish=True)
    assert cuda.comm.after[cuda.side] and cuda.comm.after[cuda.main]
    cuda.side.captured = True
    with cuda.stream(cuda.side):
        length = cuda.side.after.get(cuda.comm, 0)
        recv, *_ = buffer.dispatch(x, handle=handle)
        assert cuda.side.after.get(cuda.comm, 0) == length  # a wait across the border would break the capture
    assert lease_of(recv).captured and handle.core.captured
    del recv
    gc.collect()
    assert buffer._core.leases == 0
    cuda.side.captured = False
    recv, *_ = buffer.dispatch(x, handle=handle)
    assert not lease_of(recv).captured
    if epx._abi.library().has_ll:
        rows = torch.ones(T, 128, dtype=torch.bfloat16)
        weights = keys["topk_weights"]
        for asynchronous, hooked in ((False, False), (True, False), (False, True)):
            got, count, ll, event, hook = buffer.low_latency_dispatch(rows, keys["topk_idx"], T, E, async_finish=asynchronous,
                                                                      return_recv_hook=hooked)
            assert (event.event is not None) == asynchronous and (hook is not None) == hooked
            assert ll.core.stream == cuda.main.cuda_stream
            if hooked:
                hook()
            for tensor in got + (count,) + ll[:2]:
                assert cuda.made_on[tensor.data_ptr()] == "main"
                assert cuda.taken.get(tensor.data_ptr(), set()) >= ({"comm"} if asynchronous else set())
            event.current_stream_wait()
            y, event, _ = buffer.low_latency_combine(torch.zeros(got[0].shape, dtype=torch.bfloat16), keys["topk_idx"],
                                                     weights, ll, async_finish=asynchronous)
            event.current_stream_wait()
            cuda.taken.clear()
    buffer.destroy()


def test_one_after_the_other():
    world.run(1, one_after_the_other)


def low_latency(group, device):
    """The zero-copy place of a combine that may be under way on the communication stream is written after it. A window is not
    made during a capture."""
    buffer, cuda, x, keys = prepared(group, device)
    rows, weights, ids = torch.ones(T, 128, dtype=torch.bfloat16), keys["topk_weights"], keys["topk_idx"]
    cuda.main.captured = True
    with pytest.raises(epx.InvalidArgument, match="top-2 yet, and it cannot be made while a CUDA graph is captured"):
        buffer.low_latency_dispatch(rows, ids, T, E, use_fp8=False)
    cuda.main.captured = False
    handles = [buffer.low_latency_dispatch(rows, ids, T, E, use_fp8=False)[2] for _ in range(2)]
    first = buffer.get_next_low_latency_combine_buffer(handles[0])
    buffer.low_latency_combine(first, ids, weights, handles[0], zero_copy=True, async_finish=True)
    assert cuda.main.after.get(cuda.comm, 0) < cuda.comm.length
    second = buffer.get_next_low_latency_combine_buffer(handles[1])
    assert second.data_ptr() == first.data_ptr() and cuda.main.after[cuda.comm] == cuda.comm.length
    buffer.destroy()


def test_low_latency():
    if not epx._abi.library().has_ll:
        pytest.skip("no low latency in this build of libepx.so")
    world.run(1, low_latency)


def asked_once(group, device):
    """torch makes an object when it is asked for the current stream: a call asks only when that is another than before."""
    buffer, cuda, x, keys = prepared(group, device)
    _, _, _, _, handle, _ = buffer.dispatch(x, **keys)
    for stream in (cuda.side, cuda.main):
        with cuda.stream(stream):
            before = cuda.asked
            for asynchronous in (False, True, False):
                recv, *_ = buffer.dispatch(x, handle=handle, async_finish=asynchronous)
                assert lease_of(recv).stream == stream.cuda_stream
                buffer.combine(recv, handle, async_finish=asynchronous)
            buffer.barrier()
            assert cuda.asked == before + 1
            del recv
    buffer.destroy()


def test_asked_once():
    world.run(1, asked_once)


def expanded(group, device):
    """Scales that must be packed first are packed where the call runs, after its event."""
    buffer, cuda, x, keys = prepared(group, device)
    made, real = [], torch.Tensor.contiguous

    def contiguous(tensor, *args, **kwargs):
        made.append(cuda.current.name)
        return real(tensor, *args, **kwargs)
    torch.Tensor.contiguous = contiguous
    scales = torch.arange(3.0).expand(T, 3)
    for previous in (False, True):
        early = epx.Buffer.capture() if previous else None
        (_, recv), *_, handle, _ = buffer.dispatch((x, scales), previous_event=early, **keys)
        assert made[0] == ("comm" if previous else "main") and recv.equal(scales[:len(recv)])
        made.clear()
    buffer.destroy()


def test_expanded_scales():
    world.run(1, expanded)
