"""The low-latency calls of Buffer, for decoding: few tokens, no host wait, graph capture.

They run on a C buffer of their own, made for a shape (M tokens a rank, hidden H): at the Buffer's start when the
program asked for the size of that shape (get_low_latency_rdma_size_hint), else by the first call, collectively.

R ranks, L = E/R local experts, M tokens per rank at most, T tokens here, H hidden, k top-k.
"""
import weakref

from . import _abi
from ._abi import byref, c_void_p
from ._core import CoreHandle, sibling
from ._turn import Turn, after_calls, capturing, pointer
from .errors import InvalidArgument, Unsupported, refuse, whole
from .event import EventOverlap

_hints = {}  # bytes -> (M, H, R, E) that get_low_latency_rdma_size_hint was asked


class LowLatencyHandle(tuple):
    """(src_info i32[L,R*M], layout_range i64[L,R] (begin << 32 | count), M, H, E), with the routing as ``core``."""

    def __new__(cls, core, members):
        self = tuple.__new__(cls, members)
        self.core, self.combine_x = core, None
        return self

    def __reduce__(self):
        raise InvalidArgument("handle: it belongs to this process and cannot be pickled")

    def __copy__(self):
        return self

    def __deepcopy__(self, _memo):
        return self


def _present():
    if not _abi.library().has_ll:
        raise Unsupported("the low-latency calls are not in this build of libepx.so (it has no epx_ll_dispatch); "
                          "dispatch() and combine() work")


class LowLatency:
    """Mixed into Buffer."""

    _ll_core = None

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts):
        """Bytes (int > 0) of the low-latency window for that shape. It does not grow with the number of experts."""
        m, h = whole("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1), whole("hidden", hidden, 1)
        r, e = whole("num_ranks", num_ranks, 1), whole("num_experts", num_experts, 1)
        size, lib = 0, _abi.library()
        if lib.has_ll:
            plan = _abi.LlPlan(ranks=r, tokens_max=m, hidden=h, topk=16, experts=e, slots=2)
            _abi.check(lib.epx_ll_plan(byref(plan)))
            size = plan.window_bytes
        size = max(size, 1) if size else 2 * 2 * m * r * (2 * h + 512)
        _hints[size] = (m, h, r, e)
        return size

    def _ll_start(self, options):
        """At the Buffer's start: make the window now if all ranks know its shape."""
        self._ll_options, self._ll_shape, self._ll_masks = options, (0, 0, 0, 0), {}
        self._ll_spare = {}  # shape -> [tensor, weak reference to the handle that uses it]
        if not (self.low_latency_mode and _abi.library().has_ll):
            return
        # Programs give the answer itself, or the largest of several sizes.
        fits = [size for size, shape in _hints.items() if size <= self.num_rdma_bytes and shape[2] == self.group_size]
        shape = _hints[max(fits)] if fits else (0, 0, 0, 0)
        answers = self._core.allgather(b"".join(n.to_bytes(8, "little") for n in shape))
        if fits and all(one == answers[0] for one in answers):
            self._ll(shape[0], shape[1], shape[3], 0)

    def _ll(self, m, h, e, k):
        """The Core whose buffer serves that shape. Collective when it must be made."""
        _present()
        now = self._ll_shape
        if self._ll_core is None or m > now[0] or h > now[1] or e > now[2] or k > now[3]:
            if self._comm_stream is not None and capturing(self._current_stream()):
                refuse("low latency: there is no window for %d tokens a rank, hidden %d, %d experts and top-%d yet, and it "
                       "cannot be made while a CUDA graph is captured: make one such call before" % (m, h, e, k))
            old = self._ll_core
            shape = (max(m, now[0]), max(h, now[1]), max(e, now[2], 1024, self._ll_options["experts_max"]),
                     max(k, now[3], 16, self._ll_options["topk_max"]))
            options = dict(self._ll_options, lease_bytes=1 << 16, reserve_bytes=1 << 16, tokens_max=64, handles_max=1,
                           leases_max=1, ll_tokens_max=shape[0], ll_hidden_max=shape[1], experts_max=shape[2],
                           topk_max=shape[3])
            self._ll_core = core = sibling(self._core, options)
            self._ll_shape = shape
            self._ll_spare.clear()
            weakref.finalize(self, core.close)
            for rank, mask in self._ll_masks.items():
                with core:
                    core.check(core.lib.epx_ll_mask_set(core.buffer, rank, mask, self._current()))
            if old is not None:
                old.close()
        return self._ll_core

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts):
        """There is nothing to clean: counters only grow and slots are reused once consumed."""

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                             cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, use_fp8=True,
                             round_scale=False, use_ue8m0=False, async_finish=False, return_recv_hook=False):
        """Send tokens to their experts, expert-major. Collective; no host wait.

        x          bf16 [T,H], T at most M; topk_idx int64 or int32 [T,k], -1 is nobody
        cumulative_local_expert_recv_stats   int32 [L], received rows are added to it
        dispatch_wait_recv_cost_stats        int64 [R], nanoseconds waited for each rank are added
        use_fp8    e4m3 with a scale per 128 elements (H a multiple of 128); round_scale: powers of two; use_ue8m0: packed
                   exponents, four to an int32 (H a multiple of 512)
        Returns    recv_x [L,R*M,H] bf16, or (e4m3, scales fp32 [L,R*M,H/128] or int32 [L,R*M,H/512], the row fastest),
                   recv_count int32 [L], handle, event, hook. With return_recv_hook rows arrive when hook() is called;
                   else hook is None. Rows past the counts are not written.
        Raises     InvalidArgument, Busy (every slot owned by a handle not yet combined), Unsupported, Timeout, PeerFailure,
                   BadData (ids out of range counted as -1; told late on a GPU)
        """
        import torch
        _present()
        device, r, _tensor = self._device, self.group_size, self._tensor
        m = whole("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
        e = whole("num_experts", num_experts, 1)
        _tensor.check("x", x, device, dims=(2,), dtypes=(torch.bfloat16,))
        tokens, hidden = x.shape
        _tensor.check("topk_idx", topk_idx, device, dtypes=(torch.int64, torch.int32), shape=(tokens, None))
        if tokens > m:
            refuse("num_max_dispatch_tokens_per_rank: %d; x has %d tokens" % (m, tokens))
        if self._expert_rank is None and e % r:
            refuse("num_experts: %d; it must be a multiple of the %d ranks" % (e, r))
        self._ll_exclusive(async_finish, return_recv_hook)
        if use_fp8 and hidden % (512 if use_ue8m0 else 128):
            refuse("x: hidden %d; fp8 needs a multiple of %d" % (hidden, 512 if use_ue8m0 else 128))
        local = len(self._local_experts(e))
        for name, stats, dtype, n in (("cumulative_local_expert_recv_stats", cumulative_local_expert_recv_stats,
                                       torch.int32, local),
                                      ("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats, torch.int64, r)):
            if stats is not None:
                _tensor.check(name, stats, device, dtypes=(dtype,), shape=(n,))
        core = self._ll(m, hidden, e, topk_idx.shape[1])
        # The window may serve a larger M than this call names: the outputs are the window's size, seen as this call's.
        rows, topk = r * self._ll_shape[0], topk_idx.shape[1]

        inputs = (x, topk_idx, cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
        with Turn(self, None, async_finish, False, inputs, core=core) as turn:
            recv_x = torch.empty((local, rows, hidden), dtype=torch.float8_e4m3fn if use_fp8 else torch.bfloat16,
                                 device=device)
            scales = None
            if use_fp8:
                scales = torch.empty((local, hidden // (512 if use_ue8m0 else 128), rows),
                                     dtype=torch.int32 if use_ue8m0 else torch.float32, device=device)
            count = torch.empty(local, dtype=torch.int32, device=device)
            src_info = torch.empty((local, rows), dtype=torch.int32, device=device)
            layout = torch.empty((local, r), dtype=torch.int64, device=device)
            args = _abi.LlDispatch()  # one field after the other: by keyword it takes four times as long
            args.x, args.tokens, args.hidden = pointer(x), tokens, hidden
            args.topk_idx, args.topk_idx_bits = pointer(topk_idx), topk_idx.element_size() * 8
            args.topk, args.experts = topk, e
            args.format, args.round_scale, args.ue8m0 = bool(use_fp8), bool(round_scale), bool(use_ue8m0)
            args.recv_x, args.recv_scales, args.recv_count = pointer(recv_x), pointer(scales), pointer(count)
            args.src_info, args.layout_range = pointer(src_info), pointer(layout)
            args.expert_stats = pointer(cumulative_local_expert_recv_stats)
            args.wait_ns = pointer(dispatch_wait_recv_cost_stats)
            made, call = c_void_p(), core.lib.epx_ll_dispatch
            if return_recv_hook:
                call = core.lib.epx_ll_dispatch_send
            core.check(call(core.buffer, byref(args), turn.stream, byref(made)))
            inner = CoreHandle(core, made.value, turn.owner_stream, "ll_handle")
            inner.tokens, inner.topk, inner.experts, inner.idx_dtype = tokens, topk, e, topk_idx.dtype
            turn.outputs(recv_x, scales, count, src_info, layout)
            keep = inputs + (recv_x, scales, count, src_info, layout, args)
            if return_recv_hook:
                inner.borrowed = keep
            self._tell_bad_data(core)
        if rows != r * m:
            src_info, recv_x = src_info[:, :r * m], recv_x[:, :r * m]
            scales = scales if scales is None else scales[:, :, :r * m]
        handle = LowLatencyHandle(inner, (src_info, layout, m, hidden, e))
        hook = None
        if return_recv_hook:
            hook = self._ll_hook(core, inner, core.lib.epx_ll_dispatch_recv, turn.stream)
        event = EventOverlap(turn.event.event, keep) if async_finish else turn.event
        return recv_x if scales is None else (recv_x, scales.transpose(1, 2)), count, handle, event, hook

    def low_latency_combine(self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False,
                            async_finish=False, return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None):
        """Bring the experts' outputs back: the weighted sum in fp32, in top-k order. Collective; no host wait.

        x             bf16 [L,R*M,H] in the order of recv_x (with zero_copy: get_next_low_latency_combine_buffer's tensor,
                      already written)
        topk_idx      of the dispatch; topk_weights fp32 [T,k]; handle of the dispatch
        use_logfmt    taken; rows travel as bf16
        out           bf16 [T,H] to write to, or None
        combine_wait_recv_cost_stats   int64 [R], nanoseconds waited for each rank are added
        Returns       out [T,H], event, hook (None without return_recv_hook)
        """
        import torch
        _present()
        device, r, _tensor = self._device, self.group_size, self._tensor
        if not isinstance(handle, LowLatencyHandle):
            refuse("handle: %s; it must be what low_latency_dispatch() returned (its members alone do not do)" %
                   type(handle).__name__)
        inner, (src_info, _, m, hidden, _) = handle.core, handle
        core = inner.core
        self._ll_mine(handle)
        self._ll_exclusive(async_finish, return_recv_hook)
        tokens, local = inner.tokens, src_info.shape[0]
        _tensor.check("topk_idx", topk_idx, device, dtypes=(inner.idx_dtype,), shape=(tokens, inner.topk))
        _tensor.check("topk_weights", topk_weights, device, dtypes=(torch.float32,), shape=(tokens, inner.topk))
        if zero_copy:
            if handle.combine_x is None:
                refuse("zero_copy: write to get_next_low_latency_combine_buffer(handle) first")
            x = handle.combine_x
        else:
            _tensor.check("x", x, device, dtypes=(torch.bfloat16,), shape=(local, r * m, hidden), packed=False)
            x = self._ll_whole(x, local, r, hidden)
        if out is not None:
            _tensor.check("out", out, device, dtypes=(torch.bfloat16,), shape=(tokens, hidden))
        if combine_wait_recv_cost_stats is not None:
            _tensor.check("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats, device, dtypes=(torch.int64,),
                          shape=(r,))
        inputs = (x, topk_idx, topk_weights, combine_wait_recv_cost_stats)
        with Turn(self, None, async_finish, False, inputs, core=core) as turn:
            if out is None:
                out = torch.empty((tokens, hidden), dtype=torch.bfloat16, device=device)
            args = _abi.LlCombine()
            args.x, args.topk_idx, args.topk_weights = pointer(x), pointer(topk_idx), pointer(topk_weights)
            args.out, args.wait_ns = pointer(out), pointer(combine_wait_recv_cost_stats)
            call = core.lib.epx_ll_combine_send if return_recv_hook else core.lib.epx_ll_combine
            core.check(call(inner.pointer, byref(args), turn.stream))
            keep, hook = inputs + (out, args), None
            if return_recv_hook:
                inner.borrowed = keep
            else:
                inner.pointer = None  # the C handle is free again, and soon another dispatch's
            turn.outputs(out)
        if return_recv_hook:
            hook = self._ll_hook(core, inner, core.lib.epx_ll_combine_recv, turn.stream, last=True)
        event = EventOverlap(turn.event.event, keep) if async_finish else turn.event
        return out, event, hook

    def get_next_low_latency_combine_buffer(self, handle):
        """bf16 [L,R*M,H]: write the experts' outputs there, then combine with zero_copy.

        The handle's own until it is combined or gone; then another handle's. Strided where the window serves a larger M.
        """
        import torch
        _present()
        if not isinstance(handle, LowLatencyHandle):
            refuse("handle: %s; it must be what low_latency_dispatch() returned" % type(handle).__name__)
        self._ll_mine(handle)
        if handle.combine_x is None:
            shape = (handle[0].shape[0], self.group_size * self._ll_shape[0], handle[3])
            spare = self._ll_spare.setdefault(shape, [])
            for place in spare:
                user = place[1]()
                if user is None or user.pointer is None:
                    after_calls(self)  # its combine may be under way on another stream
                    break
            else:
                place = [torch.zeros(shape, dtype=torch.bfloat16, device=self._device), None]
                spare.append(place)
            place[1] = weakref.ref(handle.core)
            handle.combine_x = place[0]
        return handle.combine_x[:, :self.group_size * handle[2]]

    # -- masks --

    def low_latency_update_mask_buffer(self, rank_to_mask, mask=False):
        """From now on that rank is neither sent to nor waited for (mask), or is again. Local to this rank.

        Raises InvalidArgument: no such rank, or this rank itself.
        """
        if whole("rank_to_mask", rank_to_mask) >= self.group_size:
            refuse("rank_to_mask: %r; there are %d ranks" % (rank_to_mask, self.group_size))
        _present()
        if rank_to_mask == self.rank:
            if mask:
                refuse("rank_to_mask: %d; that is this rank itself" % rank_to_mask)
            return
        core = self._ll_core
        if core is not None:
            with core:
                core.check(core.lib.epx_ll_mask_set(core.buffer, rank_to_mask, int(bool(mask)), self._current()))
        self._ll_masks[rank_to_mask] = int(bool(mask))

    def low_latency_query_mask_buffer(self, mask_status):
        """Write int32 [R] to `mask_status`: 1 is masked."""
        import torch
        _present()
        self._tensor.check("mask_status", mask_status, self._device, dtypes=(torch.int32,), shape=(self.group_size,))
        masks = (_abi.c_int32 * self.group_size)(*[self._ll_masks.get(i, 0) for i in range(self.group_size)])
        core = self._ll_core
        if core is not None:
            with core:
                core.check(core.lib.epx_ll_mask_get(core.buffer, masks))
        mask_status.copy_(torch.tensor(list(masks), dtype=torch.int32, device="cpu"))

    def low_latency_clean_mask_buffer(self):
        """No rank is masked."""
        _present()
        self._ll_masks.clear()
        core = self._ll_core
        if core is not None:
            with core:
                core.check(core.lib.epx_ll_mask_clear(core.buffer, self._current()))

    # -- small things --

    def _ll_mine(self, handle):
        if handle.core.core is not self._ll_core:
            refuse("handle: it was made by another buffer's dispatch, or before this buffer grew for a larger shape")
        if handle.core.pointer is None:
            refuse("handle: it has been combined")

    @staticmethod
    def _ll_exclusive(async_finish, return_recv_hook):
        if async_finish and return_recv_hook:
            refuse("async_finish and return_recv_hook: not both")

    def _ll_whole(self, x, local, r, hidden):
        """x [L,R*m,H] as the window's [L,R*M,H]: itself when it is recv_x or m is M, else a copy with room."""
        rows = r * self._ll_shape[0]
        if x.shape[1] == rows:
            return x.contiguous()
        if x.stride() == (rows * hidden, hidden, 1):
            return x
        whole = x.new_empty((local, rows, hidden))
        whole[:, :x.shape[1]] = x
        return whole

    @staticmethod
    def _ll_hook(core, inner, call, stream, last=False):
        """The deferred receive: a function that does its work once."""
        todo = [True]

        def hook():
            if todo:
                with core:
                    core.check(call(inner.pointer, stream))
                    inner.borrowed = None
                    if last:
                        inner.pointer = None
                todo.clear()
        return hook
