"""EventHandle and EventOverlap: points of a CUDA stream. On CPU tensors work is done when a call returns, so an event
there is complete from the start."""
import sys


def _cuda():
    """torch.cuda when this process uses it, else None. Never imports or initialises anything."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda
    return None


class EventHandle:
    """Records the current CUDA stream when made (with CUDA in use; else it is complete).

    event   torch.cuda.Event or None.
    """

    def __init__(self, stream=None):
        cuda = _cuda()
        self.event = None
        if cuda is not None:
            stream = stream if stream is not None else cuda.current_stream()
            self.device = stream.device
            self.event = cuda.Event()
            self.event.record(stream)

    def current_stream_wait(self):
        """Later work on the current stream (of the GPU where the event was recorded) comes after this event. The host
        does not wait."""
        if self.event is not None:
            _cuda().current_stream(self.device).wait_event(self.event)


class EventOverlap:
    """What calls return as their event. ``event`` is None after a synchronous call.

    As a context manager it waits (on the current stream) at the end of the block, so that what is inside overlaps::

        with event:
            other_work()
    """

    def __init__(self, event=None, extra_tensors=None):
        self.event = event
        self.extra_tensors = extra_tensors  # kept alive with the event: a capture may need that

    def current_stream_wait(self):
        """Later work on the current stream comes after this event; nothing to do when there is none."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.current_stream_wait()
