"""The normal-mode calls of Buffer: layout, dispatch, combine."""
from array import array

from . import _abi
from ._abi import byref, c_void_p
from ._core import CoreHandle
from ._turn import Turn, pointer as _pointer
from .errors import refuse, whole
from .handle import DispatchHandle, check_handle


class Normal:
    """Mixed into Buffer. R ranks, D domains, T local tokens, k top-k, E experts, H hidden."""

    # -- layout --

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False,
                            allocate_on_comm_stream=False):
        """Count where tokens would go. Local.

        topk_idx  int64 (or int32) [T,k], -1 is nobody
        Returns   num_tokens_per_rank i32[R], num_tokens_per_rdma_rank i32[D] or None in one domain,
                  num_tokens_per_expert i32[E], is_token_in_rank bool[T,R], event
        Raises    InvalidArgument; BadData (ids out of range counted as -1; told late on a GPU)
        """
        import torch
        core, device, _tensor = self._core, self._device, self._tensor
        _tensor.check("topk_idx", topk_idx, device, dims=(2,), dtypes=(torch.int64, torch.int32))
        num_experts = whole("num_experts", num_experts, 1)
        tokens, topk = topk_idx.shape
        with Turn(self, previous_event, async_finish, allocate_on_comm_stream, (topk_idx,)) as turn:
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
            self._tell_bad_data(core)
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
        is_token_in_rank, num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert
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
        core, device, _tensor = self._core, self._device, self._tensor
        if handle is None or config is not None:  # a cached dispatch needs none
            config = self._config(config, "get_dispatch_config")
        x, scales, shape = _split(x, self._tensor, device)
        if handle is not None:
            inner = check_handle(handle, core)
            if topk_idx is not None or topk_weights is not None:
                refuse("topk_idx, topk_weights: they do not travel with a handle (the routing is the handle's)")
            if shape[0] != inner.tokens:
                refuse("x: %d tokens; the handle's dispatch had %d" % (shape[0], inner.tokens))
            return self._again(x, scales, shape, inner, previous_event, async_finish, allocate_on_comm_stream)

        tokens, topk = shape[0], 0
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
        for name, one, n in (("num_tokens_per_rank", num_tokens_per_rank, core.ranks),
                             ("num_tokens_per_rdma_rank", num_tokens_per_rdma_rank, core.domains)):
            if one is not None and (n > 1 or name == "num_tokens_per_rank"):
                _tensor.check(name, one, device, dtypes=(torch.int32,), shape=(n,))
        num_worst_tokens = whole("num_worst_tokens", num_worst_tokens)
        expert_alignment = whole("expert_alignment", expert_alignment, 1)

        args = _abi.Dispatch(tokens=tokens, experts=num_tokens_per_expert.numel(), expert_alignment=expert_alignment,
                             recv_tokens_max=num_worst_tokens, sms=config.num_sms if core.cuda else 0)
        if topk_idx is not None:
            args.topk_idx, args.topk_idx_bits, args.topk = _pointer(topk_idx), topk_idx.element_size() * 8, topk
            args.topk_weights = _pointer(topk_weights)
        else:
            args.in_rank = _pointer(is_token_in_rank)
        totals = None
        if topk_idx is None and not num_worst_tokens:
            if self._expert_rank is not None and len(self._expert_rank) != args.experts:
                refuse("num_tokens_per_expert: %d experts; the buffer's expert_rank maps %d" %
                       (args.experts, len(self._expert_rank)))
            totals = self._expert_totals(num_tokens_per_expert, expert_alignment, previous_event)

        inputs = (x, scales, topk_idx, topk_weights, is_token_in_rank)
        with Turn(self, previous_event, async_finish, allocate_on_comm_stream, inputs) as turn:
            pointer, scales = c_void_p(), _fill_rows(args.rows, x, scales, shape, turn)
            core.check(core.lib.epx_dispatch_begin(core.buffer, byref(args), turn.stream, byref(pointer)))
            inner = CoreHandle(core, pointer.value, turn.owner_stream, captured=turn.captured)
            inner.tokens, inner.topk, inner.experts, inner.worst = tokens, topk, args.experts, num_worst_tokens
            inner.rows, rows, per_expert = num_worst_tokens, num_worst_tokens, []
            if not num_worst_tokens:
                counts = _abi.Counts()
                core.check(core.lib.epx_handle_counts(inner.pointer, byref(counts)))
                inner.rows = rows = counts.rows
                per_expert = totals if totals is not None else counts.rows_per_expert[:counts.local_experts]
            wanted = [((rows, shape[1]), x.dtype), _side_of(rows, scales),
                      None if topk_idx is None else ((rows, topk), topk_idx.dtype),
                      None if topk_weights is None else ((rows, topk), torch.float32)]
            recv = self._receive(turn, wanted,
                                 lambda place, got: core.lib.epx_dispatch_end(inner.pointer, place, turn.stream, got))
            self._tell_bad_data(core)
        inner.event = turn.event.event
        recv_x, recv_scales, recv_idx, recv_weights = recv
        out = DispatchHandle(inner, config.num_sms // 2, device, is_token_in_rank)
        return (recv_x if scales is None else (recv_x, recv_scales), recv_idx, recv_weights, per_expert, out, turn.event)

    def intranode_dispatch(self, *args, **kwargs):
        """As dispatch()."""
        return self.dispatch(*args, **kwargs)

    def internode_dispatch(self, *args, **kwargs):
        """As dispatch()."""
        return self.dispatch(*args, **kwargs)

    def _again(self, x, scales, shape, inner, previous_event, async_finish, allocate_on_comm_stream):
        core, rows = self._core, _abi.Rows()
        with Turn(self, previous_event, async_finish, allocate_on_comm_stream, (x, scales)) as turn:
            scales = _fill_rows(rows, x, scales, shape, turn)
            inner.captured |= turn.captured
            wanted = [((inner.rows, shape[1]), x.dtype)]
            if scales is not None:
                wanted.append(_side_of(inner.rows, scales))
            recv = self._receive(turn, wanted, lambda place, got:
                                 core.lib.epx_dispatch_again(inner.pointer, byref(rows), place, turn.stream, got))
        return (recv[0] if scales is None else tuple(recv), None, None, None, None, turn.event)

    def _receive(self, turn, wanted, call):
        """Rows into a lease, or, where the window has no room, into ordinary tensors.

        wanted    (shape, dtype) or None, of x, scales, ids, weights; those at the end may be left out
        """
        core, device, got = self._core, self._device, self._core.received
        status = call(None, byref(got))
        if status == _abi.OK:
            lease = core.own_lease(got.lease, turn.owner_stream, turn.captured, turn.current) if got.lease else None
            memory, over = (got.x, got.side, got.topk_idx, got.topk_weights), self._tensor.over
            return [None if one is None else over(lease, address, one[0], one[1], device)
                    for one, address in zip(wanted, memory)]
        if status != _abi.E_BUSY:
            core.check(status)
        import torch
        tensors = turn.allocate(lambda: [None if one is None else torch.empty(one[0], dtype=one[1], device=device)
                                         for one in wanted])
        place = _abi.Place(*map(_pointer, tensors))
        core.check(call(byref(place), byref(got)))
        turn.outputs(*tensors)
        return tensors

    def _expert_totals(self, num_tokens_per_expert, alignment, previous_event):
        """Rows per local expert when only a mask travels: from everybody's num_tokens_per_expert."""
        if hasattr(previous_event, "current_stream_wait"):  # they may be on their way still
            previous_event.current_stream_wait()
        parts = self._core.allgather(array("i", num_tokens_per_expert.tolist()).tobytes())
        total = [sum(one) for one in zip(*(memoryview(part).cast("i") for part in parts))]
        return [(total[e] + alignment - 1) // alignment * alignment for e in self._local_experts(len(total))]

    def _local_experts(self, num_experts):
        """The experts of this rank, ascending: what a local expert number stands for."""
        if self._expert_rank is not None:
            return [e for e, rank in enumerate(self._expert_rank) if rank == self.rank]
        local = num_experts // self.group_size
        return range(self.rank * local, (self.rank + 1) * local)

    @staticmethod
    def _tell_bad_data(core):
        """On CPU the ids were read by now: say at this call, not at the next, that some were wrong. With the lock held."""
        if core.cuda:
            return
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
        core, device, _tensor = self._core, self._device, self._tensor
        config = self._config(config, "get_combine_config")
        inner = check_handle(handle, core)
        rows, hidden, _, stride = _tensor.check_rows("x", x, device, dtypes=_tensor.SUMMED)
        if rows != inner.rows:
            refuse("x: %d rows; the handle's dispatch received %d here" % (rows, inner.rows))
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
        with Turn(self, previous_event, async_finish, allocate_on_comm_stream, (x, topk_weights) + biases) as turn:
            out, out_weights = turn.allocate(lambda: (
                torch.empty((inner.tokens, hidden), dtype=x.dtype, device=device),
                None if topk_weights is None else
                torch.empty((inner.tokens, inner.topk), dtype=torch.float32, device=device)))
            args = _abi.Combine()
            args.x, args.x_stride_bytes, args.dtype, args.hidden = _pointer(x), stride, _tensor.SUMMED[x.dtype], hidden
            args.out, args.sms = _pointer(out), config.num_sms if core.cuda else 0
            if topk_weights is not None:
                args.topk_weights, args.out_topk_weights = _pointer(topk_weights), _pointer(out_weights)
            for i, one in enumerate(biases):  # with no tokens there is none to read, and no address that would do
                args.bias[i] = one.data_ptr() or None if one is not None else None
            inner.captured |= turn.captured
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

    def _config(self, config, default):
        # Programs replace get_*_config on the class.
        if config is None:
            config = getattr(type(self), default)(self.group_size)
        if not hasattr(config, "num_sms"):
            refuse("config: %s; it must be an epx.Config" % type(config).__name__)
        return config


def _split(x, _tensor, device):
    """(rows, scales or None, what check_rows returns) of dispatch's x, checked."""
    scales = None
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            refuse("x: a tuple of %d; it must be (x, scales)" % len(x))
        x, scales = x
    shape = _tensor.check_rows("x", x, device)
    if scales is not None:
        _tensor.check("x[1] (scales)", scales, device, dims=(1, 2), packed=False)
        if scales.shape[0] != x.shape[0]:
            refuse("x[1] (scales): %d tokens; x[0] has %d" % (scales.shape[0], x.shape[0]))
        if scales[:1].numel() * scales.element_size() % 4 and x.shape[0]:
            refuse("x[1] (scales): %d bytes a token; it must be a multiple of 4" %
                   (scales[:1].numel() * scales.element_size()))
    return x, scales, shape


def _side_of(rows, scales):
    """(shape, dtype) of the scales of so many rows; None without."""
    return None if scales is None else ((rows,) + tuple(scales.shape[1:]), scales.dtype)


def _fill_rows(rows, x, scales, shape, turn):
    """epx_rows_t of what _split gave. Returns the scales that were named there, which must live as long as the call."""
    rows.x, rows.row_bytes, rows.x_stride_bytes = _pointer(x), shape[2], shape[3]
    if scales is not None:
        if 0 in scales.stride():  # expanded; to the C library 0 is the default
            scales = turn.packed(scales)
        size = scales.element_size()
        rows.side, rows.side_elem_bytes = _pointer(scales), size
        rows.side_elems = scales.shape[1] if scales.dim() == 2 else 1
        rows.side_token_stride_bytes = scales.stride(0) * size
        rows.side_elem_stride_bytes = scales.stride(1) * size if scales.dim() == 2 else size
    return scales
