"""The tuples that dispatch returns as handles.

Programs unpack and index them, so they have the arity and the tables of deep_ep; the opaque C handle travels as
``handle.core``. The tables are made when somebody looks (they cost several kernels; combine does not need them).

Programs also keep the members alone (autograd's save_for_backward) and give a tuple of them later. So the memory of one
member, which is never empty, owns the routing too, and its address is known.
"""
import weakref

from ._abi import HandleTables, byref
from .errors import Broken, InvalidArgument

_OWNING = {6: 0, 10: 6}  # members: which of them
_known = weakref.WeakValueDictionary()  # address -> _Memory


class _Memory:
    """Of an owning member: the tensor that has it, and the CoreHandle."""

    __slots__ = ("tensor", "core", "__weakref__")

    def __init__(self, tensor, core):
        self.tensor, self.core = tensor, core
        _known[tensor.data_ptr()] = self


class DispatchHandle(tuple):
    """A dispatch's routing. One domain, 6 members:

    rank_prefix_matrix i32[R,R], channel_prefix_matrix i32[R,C], recv_channel_prefix_matrix i32[R,C],
    recv_src_idx i32[rows], is_token_in_rank bool[T,R], send_head i32[T,R].

    Several domains, 10: is_token_in_rank, rdma_channel_prefix_matrix i32[D,C], gbl_channel_prefix_matrix i32[R,C],
    recv_rdma_channel_prefix_matrix i32[D,C], recv_rdma_rank_prefix_sum i32[D], recv_gbl_channel_prefix_matrix i32[R,C],
    recv_gbl_rank_prefix_sum i32[R], recv_src_meta u8[rows,8], send_rdma_head i32[T,D], send_nvl_head i32[rows,R/D].

    It gives its place in the handle pool back when it dies.
    """

    def __new__(cls, core, channels, device, in_rank=None):
        self = tuple.__new__(cls, (None,) * (6 if core.core.domains == 1 else 10))
        self.core, self._channels, self._device, self._in_rank, self._made = core, max(1, channels), device, in_rank, None
        return self

    def _members(self):
        if self._made is None:
            self._made = _tables(self)
        return self._made

    def __iter__(self):
        return iter(self._members())

    def __getitem__(self, index):
        return self._members()[index]

    def __contains__(self, value):
        return any(value is member for member in self._members())

    def __eq__(self, other):
        return self is other

    def __ne__(self, other):
        return self is not other

    __hash__ = object.__hash__

    def __add__(self, other):
        return tuple(self) + other

    def __radd__(self, other):
        return other + tuple(self)

    def index(self, value):
        return next(i for i, member in enumerate(self) if member is value)

    def count(self, value):
        return sum(member is value for member in self)

    def __reduce__(self):
        raise InvalidArgument("handle: it belongs to this process and cannot be pickled")

    def __copy__(self):
        return self

    def __deepcopy__(self, _memo):
        return self

    def __repr__(self):
        return "<epx.DispatchHandle of %d tokens, %d members>" % (self.core.tokens, len(self))


def check_handle(handle, core):
    """The CoreHandle in `handle`, or InvalidArgument that says what it is instead."""
    inner = handle.core if isinstance(handle, DispatchHandle) else _of_members(handle)
    if inner is None:
        raise InvalidArgument("handle: %s; it must be what dispatch() returned, or a tuple of its members themselves" %
                              type(handle).__name__)
    if inner.core is not core:
        raise InvalidArgument("handle: it was made by another buffer's dispatch")
    return inner


def _of_members(handle):
    """The CoreHandle of a tuple put together of a handle's members, None for anything else."""
    if not isinstance(handle, (tuple, list)) or len(handle) not in _OWNING:
        return None
    member = handle[_OWNING[len(handle)]]
    memory = _known.get(member.data_ptr()) if hasattr(member, "data_ptr") else None
    return memory.core if memory is not None else None


def _tables(handle):
    import torch

    from . import _tensor
    inner, device = handle.core, handle._device
    core = inner.core
    if inner.event is not None:
        inner.event.current_stream_wait()
    tables = HandleTables()
    with core:
        core.check(core.lib.epx_handle_get_tables(inner.pointer, byref(tables)))
        t, rows, slots, ranks = tables.tokens, tables.rows, tables.slots, core.ranks
        matrix = torch.tensor(tables.rows_matrix[:ranks * ranks], dtype=torch.int64, device="cpu").view(ranks, ranks)
        tokens_of = tables.tokens_of[:ranks]
        # The C tables live as long as the handle; the tuple's members may live longer: copies.
        dst_rank = _tensor.copy_of(inner, tables.dst_rank, (t, slots), torch.int32, device).long()
        src_token = _tensor.copy_of(inner, tables.src_token, (rows,), torch.int32, device)
    if not core.buffer:
        raise Broken("this epx buffer was destroyed")
    c = handle._channels
    in_rank = torch.zeros((t, ranks + 1), dtype=torch.bool, device=device)
    in_rank.scatter_(1, torch.where(dst_rank < 0, ranks, dst_rank), True)
    in_rank = in_rank[:, :ranks].contiguous()
    given = handle._in_rank if handle._in_rank is not None else in_rank

    def channel_starts(tokens):
        """First token of each channel, and one past the last: int64 [c + 1]. Tokens go in equal consecutive blocks."""
        return torch.clamp(torch.arange(c + 1, device=device) * ((tokens + c - 1) // c), max=tokens)

    def prefix(flags):
        """flags [t, n] -> (inclusive counts at each channel's end i32 [n, c], place within the channel or -1 i32 [t, n])"""
        n = flags.shape[1]
        sums = torch.zeros((t + 1, n), dtype=torch.int32, device=device)
        torch.cumsum(flags.int(), 0, dtype=torch.int32, out=sums[1:])
        starts = channel_starts(t)
        channel = torch.clamp(torch.arange(t, device=device) // max(1, (t + c - 1) // c), max=c - 1)
        head = torch.where(flags, sums[:t] - sums[starts[channel]], -1)
        return sums[starts[1:]].t().contiguous(), head.int()

    def received(sources):
        """Rows of `sources` before each of their channels, exclusive: int64 [len(sources), c], counted from the first."""
        mine = matrix[:, core.rank]
        first = torch.cumsum(mine, 0) - mine
        out = torch.zeros((len(sources), c), dtype=torch.int64, device=device)
        for i, source in enumerate(sources):
            n, begin = int(mine[source]), int(first[source])
            if n:
                tokens = src_token[begin:begin + n].contiguous().long()
                out[i] = torch.searchsorted(tokens, channel_starts(tokens_of[source])[:c].contiguous())
        return out

    def owning(tensor):
        return _tensor.over(_Memory(tensor, inner), tensor.data_ptr(), tensor.shape, tensor.dtype, device)

    rank_prefix = torch.cumsum(matrix, 0).int().to(device)
    channel_prefix, send_head = prefix(in_rank)
    recv_channel = received(range(ranks))
    if core.domains == 1:
        return (owning(rank_prefix), channel_prefix, recv_channel.int(), src_token, given, send_head)

    domain_of = torch.tensor(core.domain_of, device=device)
    in_domain = torch.zeros((t, core.domains), dtype=torch.int32, device=device)
    in_domain = in_domain.index_add_(1, domain_of, in_rank.int()).bool()
    rdma_prefix, rdma_head = prefix(in_domain)
    mine = matrix[:, core.rank].to(device)
    rank_sum = torch.cumsum(mine, 0)
    rails = [r for r in range(ranks) if r % core.ranks_per_domain == core.domain_index]
    recv_rdma = received(rails)
    rdma_sum = torch.cumsum(mine[torch.tensor(rails, device=device)], 0)
    source = torch.searchsorted(rank_sum.contiguous(), torch.arange(rows, device=device), right=True)
    meta = torch.zeros((rows, 2), dtype=torch.int32, device=device)
    meta[:, 0] = domain_of[torch.clamp(source, max=ranks - 1)].int()
    meta[:, 1] = 1 << core.domain_index
    nvl_head = torch.full((rows, core.ranks_per_domain), -1, dtype=torch.int32, device=device)
    nvl_head[:, core.domain_index] = torch.arange(rows, dtype=torch.int32, device=device)
    return (given, rdma_prefix, channel_prefix, recv_rdma.int(), rdma_sum.int(),
            (recv_channel + (rank_sum - mine)[:, None]).int(), owning(rank_sum.int()), meta.view(torch.uint8), rdma_head,
            nvl_head)
