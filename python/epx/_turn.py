"""One call's place among the streams, and addresses of tensors."""
from .errors import refuse
from .event import EventHandle, EventOverlap


class Turn:
    """One call's stream handling, under the buffer's lock.

    On a GPU an asynchronous call, or one after `previous_event`, runs on the communication stream; afterwards the current
    stream waits for it, or (async_finish) an event is returned. A synchronous call without `previous_event` runs on the
    current stream itself: a second one would only cost time. On CPU there is nothing to order.

    Leases and handles go back in the order of the stream that was current at the call, wherever the call ran: that is where
    their owner uses them, so what it enqueued there before it let go must come first. (The calls of a buffer are in order
    among themselves.) A lease also in that of the stream current where it dies (WayBack). torch's record_stream knows
    nothing of leases.

    Ordinary tensors that a call on the communication stream fills belong to that stream when it waits for `previous_event`
    alone: a block of the current stream may still be in use there by work that came after the event.

    core   another core of the same buffer
    """

    def __init__(self, buffer, previous_event, async_finish, allocate_on_comm_stream, inputs, core=None):
        self.previous = None
        if previous_event is not None:
            if not hasattr(previous_event, "current_stream_wait"):
                refuse("previous_event: %s; it must be an EventOverlap" % type(previous_event).__name__)
            handle = isinstance(previous_event, EventHandle)
            self.previous = previous_event if handle else getattr(previous_event, "event", None)
        if allocate_on_comm_stream and not (previous_event is not None and async_finish):
            refuse("allocate_on_comm_stream: it needs previous_event and async_finish")
        self.buffer, self.core = buffer, core or buffer._core
        self.asynchronous = async_finish
        self.on_comm = allocate_on_comm_stream or self.previous is not None
        self.comm = buffer._comm_stream
        self.here = not async_finish and self.previous is None
        self.inputs, self.stream, self.owner_stream, self.current = inputs, None, None, None
        self.event, self.captured, self.made = None, False, ()

    def __enter__(self):
        self.core.__enter__()
        if self.comm is not None:
            try:
                self._choose_stream()
            except BaseException:
                self.core.__exit__()
                raise
        return self

    def _choose_stream(self):
        self.current = self.buffer._current_stream()
        chosen = self.current if self.here else self.comm
        self.stream, self.owner_stream = chosen.cuda_stream, self.current.cuda_stream
        if not self.here:
            if self.previous is not None:
                if self.previous.event is not None:
                    self.comm.wait_event(self.previous.event)
            else:
                self.comm.wait_stream(self.current)
        # What waits for all of a captured stream is captured with it; after an event alone, the event decides.
        self.captured = capturing(self.current if self.previous is None else chosen)
        # Calls of one buffer come one after the other, whatever streams they are on.
        last, self.buffer._last_stream = self.buffer._last_stream, chosen
        _after(chosen, last, self.captured)

    def allocate(self, make):
        """Call `make` with the stream current that the tensors shall belong to."""
        if self.comm is None or self.here or not self.on_comm:
            return make()
        import torch
        with torch.cuda.stream(self.comm):
            return make()

    def packed(self, tensor):
        """A packed copy of an input, made where the call runs."""
        if self.comm is None or self.here:
            return tensor.contiguous()
        import torch
        with torch.cuda.stream(self.comm):
            return tensor.contiguous()

    def outputs(self, *tensors):
        """What the call made (of torch's memory): outside of the current stream it is in use on both."""
        self.made = tensors

    def __exit__(self, kind, _value, _trace):
        try:
            if kind is None:
                self._finish()
        finally:
            self.core.__exit__()

    def _finish(self):
        if self.comm is None:
            self.event = EventOverlap(EventHandle() if self.asynchronous else None)
            return
        if self.here:
            self.event = EventOverlap(None)
            return
        for tensor in tuple(self.made) + (self.inputs if self.asynchronous else ()):
            if tensor is not None:
                _in_use(tensor, self.comm)
                if self.on_comm:
                    _in_use(tensor, self.current)
        if self.asynchronous:
            self.event = EventOverlap(EventHandle(self.comm))
        else:
            self.event = EventOverlap(None)
            self.current.wait_stream(self.comm)


def _after(stream, last, captured):
    """Later work on the stream comes after that of the stream `last`, unless the border of a capture lies between."""
    if last is not stream and last is not None and last != stream and capturing(last) == captured:
        stream.wait_stream(last)


def after_calls(buffer):
    """Later work on the current stream comes after the buffer's calls so far."""
    if buffer._comm_stream is not None:
        current = buffer._current_stream()
        _after(current, buffer._last_stream, capturing(current))


class WayBack:
    """A stream for giving leases back that die while another stream is current than the owner's, the one current at the
    call: most likely that one has used them. It waits for both, so that neither of them waits for the other."""

    def __init__(self, stream):
        self.stream = stream

    def streams(self, owner):
        """Where a lease of `owner` dies: None, or (owner, the current stream). From anywhere."""
        import torch
        device = self.stream.device_index
        if torch._C._cuda_getCurrentRawStream(device) == owner.cuda_stream:
            return None
        current = torch.cuda.current_stream(device)
        return None if capturing(current) else (owner, current)

    def after(self, *streams):
        """Address of the stream, which is now after all of these."""
        for one in streams:
            if not capturing(one):
                self.stream.wait_stream(one)
        return self.stream.cuda_stream


def _in_use(tensor, stream):
    """record_stream. The allocator cudaMallocAsync refuses it for memory that is not its own: a lease, which needs none."""
    try:
        tensor.record_stream(stream)
    except RuntimeError:
        import torch
        if torch.cuda.get_allocator_backend() != "cudaMallocAsync":
            raise


def capturing(stream):
    """Is a CUDA graph being captured on it? Waiting across that border is an error, and needs no order."""
    import torch
    device = stream.device_index
    if torch.cuda.current_device() == device and torch._C._cuda_getCurrentRawStream(device) == stream.cuda_stream:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def pointer(tensor):
    """Address of a tensor, None for None. An empty tensor has address 0, but "given, and empty" is not "not given"
    to the C library (the ranks must agree on it): it gets an address that nobody follows."""
    return (tensor.data_ptr() or 16) if tensor is not None else None
