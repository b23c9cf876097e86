"""Buffer: the deep_ep interface over the epx C library, for CPU and CUDA tensors."""
import os
import weakref

from . import _abi
from ._abi import byref, c_void_p
from ._core import CoreHandle, make_core
from .config import Config
from .errors import InvalidArgument, refuse
from .event import EventHandle, EventOverlap
from .handle import DispatchHandle, check_handle
from .lowlatency import LowLatency
from .runtime import Runtime


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
            device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        except Exception:  # a group that torch.distributed did not make
            device = "cpu"

        def gather(data):
            mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
            parts = [torch.empty_like(mine) for _ in range(ranks)]
            dist.all_gather(parts, mine, group=group)
            return [bytes(part.cpu().tolist()) if len(data) < 4096 else bytes(part.cpu().untyped_storage())
                    for part in parts]
        return rank, ranks, gather
    if not (hasattr(comm, "Get_rank") and hasattr(comm, "allgather")):
        refuse("comm: %s; it must be an mpi4py communicator" % type(comm).__name__)
    return comm.Get_rank(), comm.Get_size(), lambda data: comm.allgather(data)


def _number_from_env(name):
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        refuse("%s=%s in the environment: it is a number" % (name, text))
    return int(text) if text else 0


class Buffer(LowLatency):
    """Dispatch and combine over the ranks of a group; a drop-in for ``deep_ep.Buffer``.

    group               torch process group (NCCL or gloo), or None
    num_nvl_bytes       window bytes for received rows; 0: EPX_LEASE_BYTES (512 MiB)
    num_rdma_bytes      with get_low_latency_rdma_size_hint's answer and low_latency_mode, the low-latency window is made
                        now, of that shape; else by the first low-latency call
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
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes),
                            ("num_qps_per_rank", num_qps_per_rank)):
            if not isinstance(value, int) or value < 0:
                refuse("%s: %r; it is a number from 0" % (name, value))
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
                group_options["device"] = 1 + (torch.cuda.current_device() if device is None else int(device))
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
        self._scratch = None
        self.runtime = Runtime(self)
        self._ll_start(dict(timeout_ms=timeout_ms, topk_max=topk_max, experts_max=experts_max, expert_rank=expert_rank,
                            ll_slots=ll_slots, ll_mask_on_timeout=int(enable_shrink)))

    # -- life --

    def destroy(self):
        """Leave the group and free the window. Not collective, ends in bounded time; further calls do nothing.

        Received tensors that are still alive stay readable: the window then goes with the last of them.
        """
        self._scratch = None
        if self._ll_core is not None:
            self._ll_core.close()
        self._core.close()

    def status(self):
        """Raise what failed late, if anything did (epx.Error subclasses). Does not wait."""
        with self._core as core:
            core.check(core.lib.epx_buffer_status(core.buffer))

    def barrier(self):
        """All ranks have come here (on GPUs: in their current streams). Collective."""
        with self._core as core:
            core.check(core.lib.epx_buffer_barrier(core.buffer, self._current()))

    def traffic(self):
        """Bytes this rank has moved: dict of local_bytes, domain_bytes, net_bytes, net_puts."""
        out = _abi.Traffic()
        with self._core as core:
            core.check(core.lib.epx_buffer_get_traffic(core.buffer, byref(out)))
        return {name: getattr(out, name) for name, _ in _abi.Traffic._fields_[1:]}

    # -- statics --

    @staticmethod
    def set_num_sms(new_num_sms):
        """SMs of later calls on GPUs, for all buffers; an even number."""
        if int(new_num_sms) != new_num_sms or new_num_sms < 0 or new_num_sms % 2:
            refuse("new_num_sms: %r; it must be an even number" % (new_num_sms,))
        Buffer.num_sms = int(new_num_sms)

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
        if self._comm_stream is None:
            return None
        import torch
        return torch.cuda.current_stream(self._device).cuda_stream

    def get_local_buffer_tensor(self, dtype, size=None, offset=0, use_rdma_buffer=False):
        """Window memory as a tensor: dtype, shape `size` (default: flat, all of it), `offset` bytes in.

        The piece is the same at every call and the program's own; peers do not write to it.
        """
        import torch

        from . import _tensor
        if self._scratch is None:
            want = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
            nbytes = min(want or 16 << 20, 64 << 20)
            lease, address = self._core.lease(nbytes, self._current())
            self._scratch = _tensor.over(lease, address, (nbytes,), torch.uint8, self._device)
        if offset % dtype.itemsize or not 0 <= offset <= self._scratch.numel():
            refuse("offset: %d; it must be a multiple of %d up to %d" % (offset, dtype.itemsize, self._scratch.numel()))
        room = (self._scratch.numel() - offset) // dtype.itemsize
        flat = self._scratch[offset:offset + room * dtype.itemsize].view(dtype)
        if size is None:
            return flat
        count = torch.Size(size).numel()
        if count > room:
            refuse("size: %d elements; there are %d from that offset" % (count, room))
        return flat[:count].view(torch.Size(size))

    # -- layout --

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False,
                            allocate_on_comm_stream=False):
        """Count where tokens would go. Local.

        topk_idx  int64 (or int32) [T,k], -1 is nobody
        Returns   num_tokens_per_rank i32[R], num_tokens_per_rdma_rank i32[D] or None in one domain,
                  num_tokens_per_expert i32[E], is_token_in_rank bool[T,R], event
        Raises    InvalidArgument
        """
        import torch

        from . import _tensor
        core, device = self._core, self._device
        _tensor.check("topk_idx", topk_idx, device, dims=(2,), dtypes=(torch.int64, torch.int32))
        tokens, topk = topk_idx.shape
        with _Turn(self, previous_event, async_finish, allocate_on_comm_stream, (topk_idx,)) as turn:
            per_rank, per_expert, in_rank, per_domain = turn.allocate(lambda: (
                torch.empty(core.ranks, dtype=torch.int32, device=device),
                torch.empty(num_experts, dtype=torch.int32, device=device),
                torch.empty((tokens, core.ranks), dtype=torch.bool, device=device),
                torch.empty(core.domains, dtype=torch.int32, device=device) if core.domains > 1 else None))
            args = _abi.Layout(topk_idx=_pointer(topk_idx), topk_idx_bits=topk_idx.element_size() * 8, tokens=tokens,
                               topk=topk, experts=num_experts, tokens_per_rank=_pointer(per_rank),
                               tokens_per_domain=_pointer(per_domain), tokens_per_expert=_pointer(per_expert),
                               in_rank=_pointer(in_rank))
            core.check(core.lib.epx_layout(core.buffer, byref(args), turn.stream))
            turn.outputs(per_rank, per_expert, in_rank, per_domain)
        return per_rank, per_domain, per_expert, in_rank, turn.event

    # -- dispatch --

    def dispatch(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
                 num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0,
                 config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        """Send each token's row to the ranks that hold its experts. Collective.

        x             [T,H] of any dtype, a row a multiple of 16 bytes; or a tuple (x, scales): scales [T,n] or [T] of
                      any dtype and strides (fp32 [T,H/128] with e4m3 rows, say)
        handle        of an earlier dispatch: the same routing, no ids or weights travel, no host wait
        topk_idx      int64 (or int32) [T,k], -1 is nobody; topk_weights fp32 [T,k]
        is_token_in_rank, num_tokens_per_rank, num_tokens_per_expert
                      from get_dispatch_layout; with topk_idx only num_tokens_per_expert's length (E) is used
        num_worst_tokens  > 0: so many rows come back, the list is empty, the tail's ids are -1, no host wait
        Returns       recv_x [rows,H] (or (recv_x, recv_scales)) in the order (source rank, token index),
                      recv_topk_idx [rows,k] local expert numbers or -1, recv_topk_weights fp32 [rows,k] (0 at -1),
                      rows per local expert as a list of int, each rounded up to expert_alignment,
                      handle, event. With a handle: (recv_x, None, None, None, None, event).
        Raises        InvalidArgument (nothing was done), Busy (too many handles alive), Timeout, PeerFailure, Mismatch,
                      Broken, Overflow (worst case too small), BadData (ids out of range, told late)
        """
        import torch

        from . import _tensor
        core, device = self._core, self._device
        config = self._config(config, "dispatch")
        x, scales = _split(x, self._device)
        if handle is not None:
            inner = check_handle(handle, core)
            if topk_idx is not None or topk_weights is not None:
                refuse("topk_idx, topk_weights: they do not travel with a handle (the routing is the handle's)")
            if x.shape[0] != inner.tokens:
                refuse("x: %d tokens; the handle's dispatch had %d" % (x.shape[0], inner.tokens))
            return self._again(x, scales, inner, previous_event, async_finish, allocate_on_comm_stream)

        tokens, topk = x.shape[0], 0
        if num_tokens_per_expert is None:
            refuse("num_tokens_per_expert: it is needed without a handle (get_dispatch_layout makes it)")
        _tensor.check("num_tokens_per_expert", num_tokens_per_expert, device, dims=(1,), dtypes=(torch.int32,))
        if topk_idx is not None:
            _tensor.check("topk_idx", topk_idx, device, dtypes=(torch.int64, torch.int32), shape=(tokens, None))
            topk = topk_idx.shape[1]
            if topk_weights is not None:
                _tensor.check("topk_weights", topk_weights, device, dtypes=(torch.float32,), shape=(tokens, topk))
        else:
            if topk_weights is not None:
                refuse("topk_weights: they need topk_idx")
            if is_token_in_rank is None:
                refuse("topk_idx or is_token_in_rank: one of them is needed without a handle")
        if is_token_in_rank is not None:
            _tensor.check("is_token_in_rank", is_token_in_rank, device, dtypes=(torch.bool,), shape=(tokens, core.ranks))
        if num_worst_tokens < 0 or expert_alignment < 1:
            refuse("num_worst_tokens: from 0, expert_alignment: from 1; they are %r and %r" %
                   (num_worst_tokens, expert_alignment))

        args = _abi.Dispatch(tokens=tokens, experts=num_tokens_per_expert.numel(), expert_alignment=expert_alignment,
                             recv_tokens_max=num_worst_tokens, sms=config.num_sms if core.cuda else 0)
        _fill_rows(args.rows, x, scales)
        if topk_idx is not None:
            args.topk_idx, args.topk_idx_bits, args.topk = _pointer(topk_idx), topk_idx.element_size() * 8, topk
            args.topk_weights = _pointer(topk_weights)
        else:
            args.in_rank = _pointer(is_token_in_rank)
        totals = None
        if topk_idx is None and not num_worst_tokens:
            totals = self._expert_totals(num_tokens_per_expert, expert_alignment)

        inputs = (x, scales, topk_idx, topk_weights, is_token_in_rank)
        with _Turn(self, previous_event, async_finish, allocate_on_comm_stream, inputs) as turn:
            pointer = c_void_p()
            core.check(core.lib.epx_dispatch_begin(core.buffer, byref(args), turn.stream, byref(pointer)))
            inner = CoreHandle(core, pointer.value, turn.owner_stream)
            inner.tokens, inner.topk, inner.experts, inner.worst = tokens, topk, args.experts, num_worst_tokens
            rows, per_expert = num_worst_tokens, []
            if not num_worst_tokens:
                counts = _abi.Counts()
                core.check(core.lib.epx_handle_counts(inner.pointer, byref(counts)))
                rows = counts.rows
                per_expert = totals if totals is not None else counts.rows_per_expert[:counts.local_experts]
            ids = topk_idx.dtype if topk_idx is not None else None
            recv = self._receive(turn, inner, rows, x, scales, ids, topk, topk_weights is not None,
                                 lambda place, got: core.lib.epx_dispatch_end(inner.pointer, place, turn.stream, got))
            turn.outputs(*recv)
        inner.event = turn.event.event
        if not core.cuda:
            self._tell_bad_data()
        recv_x, recv_scales, recv_idx, recv_weights = recv
        out = DispatchHandle(inner, config.num_sms // 2, device, is_token_in_rank)
        return (recv_x if scales is None else (recv_x, recv_scales), recv_idx, recv_weights, per_expert, out, turn.event)

    def intranode_dispatch(self, *args, **kwargs):
        """As dispatch()."""
        return self.dispatch(*args, **kwargs)

    def internode_dispatch(self, *args, **kwargs):
        """As dispatch()."""
        return self.dispatch(*args, **kwargs)

    def _again(self, x, scales, inner, previous_event, async_finish, allocate_on_comm_stream):
        core = self._core
        rows = _abi.Rows()
        _fill_rows(rows, x, scales)
        with _Turn(self, previous_event, async_finish, allocate_on_comm_stream, (x, scales)) as turn:
            count = inner.worst
            if not count:
                counts = _abi.Counts()
                core.check(core.lib.epx_handle_counts(inner.pointer, byref(counts)))
                count = counts.rows
            recv = self._receive(turn, inner, count, x, scales, None, 0, False, lambda place, got:
                                 core.lib.epx_dispatch_again(inner.pointer, byref(rows), place, turn.stream, got))
            turn.outputs(*recv)
        return (recv[0] if scales is None else tuple(recv[:2]), None, None, None, None, turn.event)

    def _receive(self, turn, inner, rows, x, scales, ids, topk, weights, call):
        """Rows into a lease, or, where the window has no room, into ordinary tensors."""
        import torch

        from . import _tensor
        core, device, hidden = self._core, self._device, x.shape[1]
        shapes = [((rows, hidden), x.dtype),
                  None if scales is None else ((rows,) + tuple(scales.shape[1:]), scales.dtype),
                  None if ids is None else ((rows, topk), ids),
                  ((rows, topk), torch.float32) if weights else None]
        got = _abi.Received()
        status = call(None, byref(got))
        if status == _abi.OK:
            lease = core.own_lease(got.lease, turn.owner_stream) if got.lease else None
            memory = (got.x, got.side, got.topk_idx, got.topk_weights)
            return [None if shape is None else _tensor.over(lease, address, shape[0], shape[1], device)
                    for shape, address in zip(shapes, memory)]
        if status != _abi.E_BUSY:
            core.check(status)
        tensors = turn.allocate(lambda: [None if shape is None else torch.empty(shape[0], dtype=shape[1], device=device)
                                         for shape in shapes])
        place = _abi.Place(x=_pointer(tensors[0]), side=_pointer(tensors[1]), topk_idx=_pointer(tensors[2]),
                           topk_weights=_pointer(tensors[3]))
        core.check(call(byref(place), byref(got)))
        return tensors

    def _expert_totals(self, num_tokens_per_expert, alignment):
        """Rows per local expert when only a mask travels: from everybody's num_tokens_per_expert."""
        import torch
        core = self._core
        mine = num_tokens_per_expert.cpu()
        parts = core.allgather(bytes(mine.untyped_storage())[:mine.numel() * 4] if mine.numel() else b"")
        total = sum(torch.frombuffer(bytearray(part), dtype=torch.int32).long() for part in parts)
        local = total.numel() // core.ranks
        return [(n + alignment - 1) // alignment * alignment
                for n in total[core.rank * local:(core.rank + 1) * local].tolist()]

    def _tell_bad_data(self):
        """On CPU the ids were read by now: say at this call, not at the next, that some were wrong."""
        with self._core as core:
            status = core.lib.epx_buffer_status(core.buffer)
            if status == _abi.E_DATA:
                core.check(status)

    # -- combine --

    def combine(self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False,
                allocate_on_comm_stream=False):
        """Bring every row back to its token and add, unweighted, in fp32. Collective.

        x             [rows,H] bf16, fp16 or fp32, in the order of recv_x; read in place when it is recv_x itself
        handle        of the dispatch
        topk_weights  fp32 [rows,k], or None: summed the same way
        bias          None, one or two tensors [T,H] like x, added at the end
        Returns       combined_x [T,H], combined_topk_weights fp32 [T,k] or None, event
        Raises        as dispatch
        """
        import torch

        from . import _tensor
        core, device = self._core, self._device
        config = self._config(config, "combine")
        inner = check_handle(handle, core)
        kinds = {torch.bfloat16: _abi.DTYPE_BF16, torch.float16: _abi.DTYPE_FP16, torch.float32: _abi.DTYPE_FP32}
        _tensor.check_rows("x", x, device, dtypes=tuple(kinds))
        rows, hidden = x.shape
        expected = self._rows_of(inner)
        if expected is not None and rows != expected:
            refuse("x: %d rows; the handle's dispatch received %d here" % (rows, expected))
        if topk_weights is not None:
            if not inner.topk:
                refuse("topk_weights: the handle's dispatch had no topk_idx, so nothing says how many there are")
            _tensor.check("topk_weights", topk_weights, device, dtypes=(torch.float32,), shape=(rows, inner.topk))
        biases = () if bias is None else tuple(bias) if isinstance(bias, (tuple, list)) else (bias,)
        if len(biases) > 2:
            refuse("bias: %d tensors; at most two" % len(biases))
        for i, one in enumerate(biases):
            if one is not None:
                _tensor.check("bias" if len(biases) == 1 else "bias[%d]" % i, one, device, dtypes=(x.dtype,),
                              shape=(inner.tokens, hidden))
        with _Turn(self, previous_event, async_finish, allocate_on_comm_stream, (x, topk_weights) + biases) as turn:
            out, out_weights = turn.allocate(lambda: (
                torch.empty((inner.tokens, hidden), dtype=x.dtype, device=device),
                None if topk_weights is None else
                torch.empty((inner.tokens, inner.topk), dtype=torch.float32, device=device)))
            args = _abi.Combine(x=_pointer(x), x_stride_bytes=x.stride(0) * x.element_size() if rows > 1 else 0,
                                dtype=kinds[x.dtype], hidden=hidden, topk_weights=_pointer(topk_weights),
                                out=_pointer(out), out_topk_weights=_pointer(out_weights),
                                sms=config.num_sms if core.cuda else 0)
            for i, one in enumerate(biases):
                args.bias[i] = _pointer(one)
            core.check(core.lib.epx_combine(inner.pointer, byref(args), turn.stream))
            turn.outputs(out, out_weights)
        return out, out_weights, turn.event

    def intranode_combine(self, *args, **kwargs):
        """As combine()."""
        return self.combine(*args, **kwargs)

    def internode_combine(self, *args, **kwargs):
        """As combine()."""
        return self.combine(*args, **kwargs)

    # -- small things --

    def _rows_of(self, inner):
        """Rows this rank received by `inner`, where the host knows them."""
        if inner.worst:
            return inner.worst
        counts = _abi.Counts()
        with self._core as core:
            core.check(core.lib.epx_handle_counts(inner.pointer, byref(counts)))
        return counts.rows

    def _config(self, config, call):
        # Programs replace get_*_config on the class.
        if config is None:
            config = getattr(type(self), "get_%s_config" % call)(self.group_size)
        if not hasattr(config, "num_sms"):
            refuse("config: %s; it must be an epx.Config" % type(config).__name__)
        return config


class _Turn:
    """One call's stream handling, under the buffer's lock.

    On a GPU the call runs on the communication stream, after `previous_event` or what the current stream holds now.
    Afterwards the current stream waits for it, or (async_finish) an event is returned. On CPU there is nothing to order.
    """

    def __init__(self, buffer, previous_event, async_finish, allocate_on_comm_stream, inputs):
        if previous_event is not None and not hasattr(previous_event, "current_stream_wait"):
            refuse("previous_event: %s; it must be an EventOverlap" % type(previous_event).__name__)
        self.previous = getattr(previous_event, "event", None)
        if allocate_on_comm_stream and not (previous_event is not None and async_finish):
            refuse("allocate_on_comm_stream: it needs previous_event and async_finish")
        self.core, self.asynchronous, self.on_comm = buffer._core, async_finish, allocate_on_comm_stream
        self.comm, self.device = buffer._comm_stream, buffer._device
        self.inputs, self.stream, self.owner_stream, self.current = inputs, None, None, None
        self.event = None

    def __enter__(self):
        self.core.__enter__()
        if self.comm is not None:
            import torch
            self.current = torch.cuda.current_stream(self.device)
            self.stream = self.comm.cuda_stream
            # Leases and handles go back in the order of the stream whose owner drops them.
            self.owner_stream = self.stream if self.on_comm else self.current.cuda_stream
            if self.previous is not None:
                self.comm.wait_event(self.previous.event)
            else:
                self.comm.wait_stream(self.current)
        return self

    def allocate(self, make):
        """Call `make` with the stream current that the tensors shall belong to."""
        if self.comm is None or not self.on_comm:
            return make()
        import torch
        with torch.cuda.stream(self.comm):
            return make()

    def outputs(self, *tensors):
        """What the call made: with an asynchronous end it is in use on both streams."""
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
        if self.asynchronous:
            self.event = EventOverlap(EventHandle(self.comm))
            for tensor in self.inputs + tuple(self.made):
                if tensor is not None:
                    tensor.record_stream(self.comm)
                    if self.on_comm:
                        tensor.record_stream(self.current)
        else:
            self.event = EventOverlap(None)
            self.current.wait_stream(self.comm)


def _pointer(tensor):
    """Address of a tensor, None for None. An empty tensor has address 0, but "given, and empty" is not "not given"
    to the C library (the ranks must agree on it): it gets an address that nobody follows."""
    return (tensor.data_ptr() or 16) if tensor is not None else None


def _split(x, device):
    """(rows, scales or None) of dispatch's x, checked."""
    from . import _tensor
    scales = None
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            refuse("x: a tuple of %d; it must be (x, scales)" % len(x))
        x, scales = x
    _tensor.check_rows("x", x, device)
    if scales is not None:
        _tensor.check("x[1] (scales)", scales, device, dims=(1, 2), packed=False)
        if scales.shape[0] != x.shape[0]:
            refuse("x[1] (scales): %d tokens; x[0] has %d" % (scales.shape[0], x.shape[0]))
        if scales[:1].numel() * scales.element_size() % 4 and x.shape[0]:
            refuse("x[1] (scales): %d bytes a token; it must be a multiple of 4" %
                   (scales[:1].numel() * scales.element_size()))
    return x, scales


def _fill_rows(rows, x, scales):
    size = x.element_size()
    rows.x, rows.row_bytes = _pointer(x), x.shape[1] * size
    rows.x_stride_bytes = x.stride(0) * size if x.shape[0] > 1 else 0
    if scales is not None:
        size = scales.element_size()
        rows.side, rows.side_elem_bytes = _pointer(scales), size
        rows.side_elems = scales.shape[1] if scales.dim() == 2 else 1
        rows.side_token_stride_bytes = scales.stride(0) * size
        rows.side_elem_stride_bytes = scales.stride(1) * size if scales.dim() == 2 else size
