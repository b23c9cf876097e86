"""Buffer: the deep_ep interface over the epx C library, for CPU and CUDA tensors."""
import itertools
import os
import weakref

from . import _abi
from ._abi import byref
from ._core import make_core
from ._turn import WayBack
from .config import Config
from .errors import refuse, whole
from .event import EventHandle, EventOverlap
from .lowlatency import LowLatency
from .normal import Normal
from .runtime import Runtime

_numbers = itertools.count(1)
_numbered = weakref.WeakValueDictionary()  # number -> Buffer, for the custom ops (ops.py)


def _group_of(group, comm):
    """(rank, ranks, all-gather of bytes) of a torch process group or an mpi4py communicator."""
    if group is not None:
        if not (hasattr(group, "rank") and hasattr(group, "size")):
            refuse("group: %s; it must be a torch.distributed process group (an mpi4py communicator goes to comm=)" %
                   type(group).__name__)
        import torch
        import torch.distributed as dist
        rank, ranks = group.rank(), group.size()
        try:
            backend = dist.get_backend(group)
        except Exception:  # a group that torch.distributed did not make
            backend = "gloo"
        device = _gather_device(backend)

        def gather(data):
            mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
            parts = [torch.empty_like(mine) for _ in range(ranks)]
            dist.all_gather(parts, mine, group=group)
            return [bytes(part.cpu().tolist()) for part in parts]  # (numpy need not be there; it is a few KB)
        return rank, ranks, gather
    if not (hasattr(comm, "Get_rank") and hasattr(comm, "allgather")):
        refuse("comm: %s; it must be an mpi4py communicator" % type(comm).__name__)
    return comm.Get_rank(), comm.Get_size(), lambda data: comm.allgather(data)


def _gather_device(backend):
    """Whose tensors a process group of that backend gathers: "nccl" and "cuda:nccl" GPUs'; "gloo", "cpu:gloo,cuda:nccl" and
    "undefined" (torch chose both) the CPU's, and what is not known as well."""
    return "cuda" if "nccl" in backend and "cpu:" not in backend else "cpu"


def _number_from_env(name):
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        refuse("%s=%s in the environment: it is a number" % (name, text))
    return int(text) if text else 0


class Buffer(Normal, LowLatency):
    """Dispatch and combine over the ranks of a group; a drop-in for ``deep_ep.Buffer``.

    group               torch process group (NCCL or gloo), or None
    num_nvl_bytes       window bytes for received rows; 0: EPX_LEASE_BYTES (512 MiB)
    num_rdma_bytes      with low_latency_mode and get_low_latency_rdma_size_hint's answer, or more, the low-latency window is
                        made now, of that shape; else by the first low-latency call
    low_latency_mode    kept, to be read back; all calls work either way
    comm                mpi4py communicator, with group=None
    num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl
                        taken; epx finds its links by itself
    enable_shrink       a rank that misses a low-latency deadline is masked instead of being an error
    explicitly_destroy  kept, to be read back; a buffer is destroyed by destroy(), when it dies, or at exit

    Only by keyword, and not in deep_ep (0 or None is the default; docs/python.md says what they mean):
    backend ("cpu", "cuda"), device (GPU number), ranks_per_domain, net, threads, timeout_ms, lease_bytes, reserve_bytes,
    tokens_max, topk_max, experts_max, handles_max, leases_max, expert_rank (the rank of each expert), ll_slots, and
    unique_id with rank and ranks (bytes from epx.unique_id()) where there is neither group nor comm.

    Collective. Raises epx.InvalidArgument before anything is made; epx.Timeout, epx.Mismatch and others from the
    group's start.

    R ranks, C channels (half of num_sms), T local tokens, k top-k, E experts, H hidden, D domains.
    """

    num_sms = 20

    def __init__(self, group=None, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
                 allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False,
                 enable_shrink=False, comm=None, *, backend=None, device=None, ranks_per_domain=0, net=None, threads=0,
                 timeout_ms=0, lease_bytes=0, reserve_bytes=0, tokens_max=0, topk_max=0, experts_max=0, handles_max=0,
                 leases_max=0, expert_rank=None, ll_slots=0, unique_id=None, rank=0, ranks=0):
        import torch

        from . import _tensor
        self._tensor = _tensor  # not imported with epx, which loads no torch; nor at every call, which takes a microsecond
        num_nvl_bytes, num_rdma_bytes = whole("num_nvl_bytes", num_nvl_bytes), whole("num_rdma_bytes", num_rdma_bytes)
        whole("num_qps_per_rank", num_qps_per_rank)
        given = dict(ranks_per_domain=ranks_per_domain, threads=threads, timeout_ms=timeout_ms, lease_bytes=lease_bytes,
                     reserve_bytes=reserve_bytes, tokens_max=tokens_max, topk_max=topk_max, experts_max=experts_max,
                     handles_max=handles_max, leases_max=leases_max, ll_slots=ll_slots)
        for name, value in given.items():
            whole(name, value)
        if expert_rank is not None:
            expert_rank = [whole("expert_rank[%d]" % e, one) for e, one in enumerate(expert_rank)]
        if group is not None and comm is not None:
            refuse("group and comm: give one of them")
        if backend not in (None, "cpu", "cuda", "auto"):
            refuse('backend: %r; it must be "cpu" or "cuda"' % (backend,))
        gather = None
        if unique_id is not None:
            if group is not None or comm is not None:
                refuse("unique_id: it takes the place of group and comm; give one of them")
            if not isinstance(unique_id, (bytes, bytearray)) or not 0 <= rank < ranks:
                refuse("unique_id: bytes from epx.unique_id(), with rank= and ranks=")
        elif group is not None or comm is not None:
            rank, ranks, gather = _group_of(group, comm)

        wanted = {None: _abi.BACKEND_AUTO, "auto": _abi.BACKEND_AUTO, "cpu": _abi.BACKEND_CPU,
                  "cuda": _abi.BACKEND_CUDA}[backend]
        group_options = {"backend": wanted, "ranks_per_domain": ranks_per_domain, "threads": threads,
                         "timeout_ms": timeout_ms}
        if net:
            group_options["net"] = net.encode()
        if wanted != _abi.BACKEND_CPU and os.environ.get("EPX_BACKEND", "auto") != "cpu" and torch.cuda.is_available():
            # Programs choose their GPU by torch.cuda.set_device.
            if _abi.library().epx_backend_usable(_abi.BACKEND_CUDA, byref(_abi.c_char_p())) == _abi.OK:
                group_options["device"] = 1 + (torch.cuda.current_device() if device is None else whole("device", device))
        # The window: what the program asked for; a low-latency-only program asks for none.
        if not lease_bytes:
            lease_bytes = num_nvl_bytes or (64 << 20 if low_latency_mode else 0)
            lease_bytes = (lease_bytes + (2 << 20) - 1) >> 21 << 21
        buffer_options = {
            "lease_bytes": lease_bytes, "reserve_bytes": reserve_bytes, "timeout_ms": timeout_ms,
            "tokens_max": tokens_max or _number_from_env("EPX_TOKENS_MAX"),
            "topk_max": topk_max or _number_from_env("EPX_TOPK_MAX"),
            "experts_max": experts_max or _number_from_env("EPX_EXPERTS_MAX"),
            "handles_max": handles_max or _number_from_env("EPX_HANDLES_MAX"), "leases_max": leases_max,
            "expert_rank": expert_rank}

        core = make_core(rank, ranks, gather, unique_id, group_options, buffer_options)
        self._core = core
        self._finalizer = weakref.finalize(self, core.close)
        self.group, self.comm = group, comm
        self.rank, self.group_size = core.rank, core.ranks
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.enable_shrink = enable_shrink
        self._device = torch.device("cuda", core.device) if core.cuda else torch.device("cpu")
        self._comm_stream = torch.cuda.Stream(self._device, priority=-1) if core.cuda else None
        core.way_back = WayBack(torch.cuda.Stream(self._device)) if core.cuda else None
        self._scratch, self._last_stream = {}, None
        self._seen_stream = (None, None)  # the current stream when it was last asked for: its address, the object
        self._expert_rank, self._window = expert_rank, lease_bytes
        self._op_number = next(_numbers)
        _numbered[self._op_number] = self
        self.runtime = Runtime(self)
        try:
            self._ll_start(dict(timeout_ms=timeout_ms, topk_max=topk_max, experts_max=experts_max, expert_rank=expert_rank,
                                ll_slots=ll_slots, ll_mask_on_timeout=int(bool(enable_shrink))))
        except BaseException:
            core.close()  # whoever catches this holds on to the half-made buffer
            raise

    # -- life --

    def destroy(self):
        """Leave the group and free the window. Not collective, ends in bounded time; further calls do nothing.

        Received tensors that are still alive stay readable: the window then goes with the last of them.
        """
        self._scratch.clear()
        self._ll_spare.clear()
        if self._ll_core is not None:
            self._ll_core.close()
        self._core.close()

    def _cores(self):
        """Of the normal calls, and of the low-latency calls once there were any."""
        return [self._core] if self._ll_core is None else [self._core, self._ll_core]

    def status(self):
        """Raise what failed late, if anything did (epx.Error subclasses). Does not wait."""
        for core in self._cores():
            with core:
                core.check(core.lib.epx_buffer_status(core.buffer))

    def barrier(self):
        """All ranks have come here (on GPUs: in their current streams). Collective."""
        with self._core as core:
            core.check(core.lib.epx_buffer_barrier(core.buffer, self._current()))

    def traffic(self):
        """Bytes this rank has moved: dict of local_bytes, domain_bytes, net_bytes, net_puts (on GPUs of net_* alone)."""
        out = _abi.Traffic()
        total = {name: 0 for name, _ in _abi.Traffic._fields_[1:]}
        for core in self._cores():
            with core:
                core.check(core.lib.epx_buffer_get_traffic(core.buffer, byref(out)))
            for name in total:
                total[name] += getattr(out, name)
        return total

    # -- statics --

    @staticmethod
    def set_num_sms(new_num_sms):
        """SMs of later calls on GPUs, for all buffers; an even number."""
        if whole("new_num_sms", new_num_sms) % 2:
            refuse("new_num_sms: %r; it must be an even number" % (new_num_sms,))
        Buffer.num_sms = whole("new_num_sms", new_num_sms)

    @staticmethod
    def capture():
        """EventOverlap of the current stream's point, to be given as previous_event."""
        return EventOverlap(EventHandle())

    @staticmethod
    def is_sm90_compiled():
        """True where the CUDA backend can be used (its kernels are for sm_90 and newer), else False."""
        return _abi.library().epx_backend_usable(_abi.BACKEND_CUDA, byref(_abi.c_char_p())) == _abi.OK

    @staticmethod
    def get_dispatch_config(num_ranks):
        """Config for dispatch over any number of ranks."""
        return Config(Buffer.num_sms, 6, 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks):
        """Config for combine over any number of ranks."""
        return Config(Buffer.num_sms, 4, 256, 6, 128)

    # -- streams --

    def get_comm_stream(self):
        """The stream that communication runs on: torch.cuda.Stream; on CPU torch.cpu's (work is done on return)."""
        import torch
        return self._comm_stream if self._comm_stream is not None else torch.cpu.current_stream()

    def _current(self):
        """Address of the current stream; None on CPU."""
        return None if self._comm_stream is None else self._current_stream().cuda_stream

    def _current_stream(self):
        """The current stream of the buffer's GPU: torch.cuda.Stream.

        torch makes an object at every question, in several microseconds; its address is cheap, so the last object serves
        while that is the same.
        """
        import torch
        address, stream = self._seen_stream
        if torch._C._cuda_getCurrentRawStream(self._core.device) != address:
            stream = torch.cuda.current_stream(self._device)
            self._seen_stream = stream.cuda_stream, stream
        return stream

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """Memory as a tensor: dtype, shape `size` (default: flat, all of it), `offset` bytes in.

        num_rdma_bytes of ordinary memory, or num_nvl_bytes of the window, at most 64 MiB. It is the same at every call and the
        program's own; peers do not write to it. Raises Busy when received tensors hold the window; InvalidArgument.
        """
        import torch
        scratch = self._scratch.get(bool(use_rdma_buffer))
        if scratch is None:
            scratch = self._scratch[bool(use_rdma_buffer)] = self._own_memory(use_rdma_buffer)
        if offset % dtype.itemsize or not 0 <= offset <= scratch.numel():
            refuse("offset: %d; it must be a multiple of %d up to %d" % (offset, dtype.itemsize, scratch.numel()))
        room = (scratch.numel() - offset) // dtype.itemsize
        flat = scratch[offset:offset + room * dtype.itemsize].view(dtype)
        if size is None:
            return flat
        count = torch.Size((size,) if isinstance(size, int) else size).numel()
        if count > room:
            refuse("size: %d elements; there are %d from that offset" % (count, room))
        return flat[:count].view(size)

    def _own_memory(self, ordinary):
        """uint8, flat."""
        import torch
        if ordinary:
            self._core.check_usable()
            return torch.empty(self.num_rdma_bytes or 16 << 20, dtype=torch.uint8, device=self._device)
        nbytes = min(self.num_nvl_bytes or 16 << 20, self._window or 16 << 20, 64 << 20)
        lease, address = self._core.lease(nbytes, self._current())
        return self._tensor.over(lease, address, (nbytes,), torch.uint8, self._device)
