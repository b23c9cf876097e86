"""ArrayBuffer: dispatch and combine for numpy arrays (and what numpy can import by DLPack), without torch. CPU memory."""
import weakref
from collections import namedtuple

from . import _abi
from ._abi import byref, c_void_p
from ._core import CoreHandle, make_core
from .errors import InvalidArgument, refuse, whole

ArrayReceived = namedtuple("ArrayReceived", "x scales topk_idx topk_weights rows_per_expert handle")


class _Memory:
    """What numpy keeps alive for an array over a lease."""

    __slots__ = ("owner", "__array_interface__")

    def __init__(self, owner, address, shape, typestr):
        self.owner = owner
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": tuple(shape), "typestr": typestr}


def _over(owner, address, shape, dtype):
    import numpy as np
    dtype = np.dtype(dtype)
    if 0 in shape or not address:
        return np.empty(shape, dtype)
    if dtype.kind == "V":  # an extension type, ml_dtypes.bfloat16 for instance: bytes seen as that
        plain = tuple(shape[:-1]) + (shape[-1] * dtype.itemsize,)
        return np.asarray(_Memory(owner, address, plain, "|u1")).view(dtype)
    return np.asarray(_Memory(owner, address, shape, dtype.str))


def _array(name, value, shape=None, kinds=None, packed=True):
    """`value` as a numpy array of that shape (None matches anything), or InvalidArgument that names it."""
    import numpy as np
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "__dlpack__"):
            refuse("%s: %s; it must be a numpy array or have __dlpack__" % (name, type(value).__name__))
        value = np.from_dlpack(value)
    if shape is not None and (value.ndim != len(shape) or any(w is not None and w != h
                                                              for w, h in zip(shape, value.shape))):
        refuse("%s: shape %s; it must be [%s]" % (name, value.shape,
                                                  ", ".join("any" if n is None else str(n) for n in shape)))
    if kinds is not None and value.dtype.name not in kinds:
        refuse("%s: dtype %s; it must be %s" % (name, value.dtype, " or ".join(kinds)))
    if packed and not value.flags.c_contiguous:
        refuse("%s: strides %s; it must be C-contiguous" % (name, value.strides))
    return value


def _rows_of(name, x):
    x = _array(name, x, (None, None))
    if x.shape[1] == 0 or x.shape[1] * x.itemsize % 16:
        refuse("%s: a row has %d bytes; it must be a multiple of 16, and not 0" % (name, x.shape[1] * x.itemsize))
    if x.ctypes.data % 16 and x.shape[0]:
        x = _aligned_copy(x)
    return x


def _aligned_copy(x):
    import numpy as np
    room = np.empty(x.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    out = room[start:start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


class ArrayBuffer:
    """Dispatch and combine over numpy arrays.

    comm        mpi4py communicator; or
    unique_id   bytes from epx.unique_id(), with rank and ranks; or
    allgather   function(bytes) -> list of bytes by rank, with rank and ranks; or none of them: torchrun's, mpirun's or
                srun's environment, else a group of one.
    options     fields of epx_group_config_t (ranks_per_domain, net, threads, timeout_ms) and of epx_buffer_config_t
                (lease_bytes, tokens_max, topk_max, experts_max, expert_rank, ...)

    Collective. Raises epx.Error subclasses.
    """

    def __init__(self, comm=None, *, unique_id=None, allgather=None, rank=0, ranks=0, **options):
        if comm is not None:
            rank, ranks, allgather = comm.Get_rank(), comm.Get_size(), lambda data: comm.allgather(data)
        group = {"backend": _abi.BACKEND_CPU}
        for name in ("ranks_per_domain", "threads", "timeout_ms"):
            if name in options:
                group[name] = options[name]
        names = {name for name, _ in _abi.BufferConfig._fields_[1:]}
        buffer = {name: value for name, value in options.items() if name in names}
        unknown = set(options) - set(group) - set(buffer) - {"net"}
        if unknown:
            refuse("%s: no such option" % sorted(unknown)[0])
        for name, value in options.items():
            if name not in ("net", "expert_rank"):
                whole(name, value)
        if options.get("net"):
            group["net"] = options["net"].encode()
        if buffer.get("expert_rank") is not None:
            buffer["expert_rank"] = [whole("expert_rank[%d]" % e, one) for e, one in enumerate(buffer["expert_rank"])]
        self._core = make_core(rank, ranks, allgather, unique_id, group, buffer)
        self._finalizer = weakref.finalize(self, self._core.close)
        self.rank, self.ranks = self._core.rank, self._core.ranks

    def destroy(self):
        """Leave. Not collective, idempotent, ends in bounded time. Arrays that are still alive stay readable."""
        self._core.close()

    def status(self):
        """Raise what failed, if anything did (epx.Error subclasses)."""
        with self._core as core:
            core.check(core.lib.epx_buffer_status(core.buffer))

    def dispatch(self, x, topk_idx, num_experts, topk_weights=None, scales=None, expert_alignment=1):
        """Send each row of x to the ranks of its experts. Collective.

        x [T,H] of any dtype (rows a multiple of 16 bytes), topk_idx int64 or int32 [T,k] (-1 is nobody),
        topk_weights float32 [T,k], scales [T,n] of any strides.
        Returns ArrayReceived(x, scales, topk_idx, topk_weights, rows_per_expert, handle); arrays that lie in the window as
        long as the program keeps them. rows_per_expert: list of int, each rounded up to expert_alignment.
        Raises InvalidArgument (nothing was done); BadData (ids out of range counted as -1); as Buffer.dispatch.
        """
        num_experts = whole("num_experts", num_experts, 1)
        expert_alignment = whole("expert_alignment", expert_alignment, 1)
        x = _rows_of("x", x)
        ids = _array("topk_idx", topk_idx, (x.shape[0], None), ("int64", "int32"))
        args = _abi.Dispatch(tokens=x.shape[0], topk_idx=ids.ctypes.data, topk_idx_bits=ids.itemsize * 8,
                             topk=ids.shape[1], experts=num_experts, expert_alignment=expert_alignment)
        if topk_weights is not None:
            topk_weights = _array("topk_weights", topk_weights, ids.shape, ("float32",))
            args.topk_weights = topk_weights.ctypes.data
        scales = self._fill(args.rows, x, scales)
        core, pointer, counts = self._core, c_void_p(), _abi.Counts()
        with core:
            core.check(core.lib.epx_dispatch_begin(core.buffer, byref(args), None, byref(pointer)))
            handle = CoreHandle(core, pointer.value, None)
            handle.tokens, handle.topk, handle.experts = x.shape[0], ids.shape[1], num_experts
            core.check(core.lib.epx_handle_counts(handle.pointer, byref(counts)))
            shapes = [((counts.rows, x.shape[1]), x.dtype),
                      None if scales is None else ((counts.rows,) + scales.shape[1:], scales.dtype),
                      ((counts.rows, ids.shape[1]), ids.dtype),
                      None if topk_weights is None else ((counts.rows, ids.shape[1]), topk_weights.dtype)]
            got = self._receive(shapes, lambda place, out: core.lib.epx_dispatch_end(handle.pointer, place, None, out))
            per_expert = counts.rows_per_expert[:counts.local_experts]
            status = core.lib.epx_buffer_status(core.buffer)
            if status == _abi.E_DATA:
                core.check(status)
        return ArrayReceived(got[0], got[1], got[2], got[3], per_expert, handle)

    def dispatch_again(self, x, handle, scales=None):
        """Other rows by the same routing: (x, scales or None). Collective."""
        x, inner, core = _rows_of("x", x), self._handle(handle), self._core
        if x.shape[0] != inner.tokens:
            refuse("x: %d tokens; the handle's dispatch had %d" % (x.shape[0], inner.tokens))
        rows, counts = _abi.Rows(), _abi.Counts()
        scales = self._fill(rows, x, scales)
        with core:
            core.check(core.lib.epx_handle_counts(inner.pointer, byref(counts)))
            shapes = [((counts.rows, x.shape[1]), x.dtype),
                      None if scales is None else ((counts.rows,) + scales.shape[1:], scales.dtype), None, None]
            got = self._receive(shapes, lambda place, out: core.lib.epx_dispatch_again(inner.pointer, byref(rows), place,
                                                                                       None, out))
        return got[0], got[1]

    def combine(self, x, handle, topk_weights=None, bias=(), dtype=None):
        """Bring rows back and add in fp32: (out [T,H], weights float32 [T,k] or None). Collective.

        x      [rows,H] float32, float16, bfloat16 (ml_dtypes), or uint16 with dtype="bfloat16"
        bias   up to two arrays [T,H] like x
        """
        import numpy as np
        x, inner, core = _rows_of("x", x), self._handle(handle), self._core
        kinds = {"bfloat16": _abi.DTYPE_BF16, "float16": _abi.DTYPE_FP16, "float32": _abi.DTYPE_FP32}
        kind = kinds.get(dtype or x.dtype.name)
        if kind is None or x.itemsize != (4 if kind == _abi.DTYPE_FP32 else 2):
            refuse("x: dtype %s%s; it must be float32, float16, bfloat16, or uint16 with dtype='bfloat16'" %
                   (x.dtype, "" if dtype is None else " as " + str(dtype)))
        out = np.empty((inner.tokens, x.shape[1]), x.dtype)
        out_weights = None
        args = _abi.Combine(x=x.ctypes.data, dtype=kind, hidden=x.shape[1], out=out.ctypes.data)
        if topk_weights is not None:
            topk_weights = _array("topk_weights", topk_weights, (x.shape[0], inner.topk), ("float32",))
            out_weights = np.empty((inner.tokens, inner.topk), np.float32)
            args.topk_weights, args.out_topk_weights = topk_weights.ctypes.data, out_weights.ctypes.data
        bias = [_array("bias", one, out.shape, (x.dtype.name,)) for one in bias]
        if len(bias) > 2:
            refuse("bias: %d arrays; at most two" % len(bias))
        for i, one in enumerate(bias):
            args.bias[i] = one.ctypes.data
        with core:
            counts = _abi.Counts()
            core.check(core.lib.epx_handle_counts(inner.pointer, byref(counts)))
            if counts.rows != x.shape[0]:
                refuse("x: %d rows; the handle's dispatch received %d here" % (x.shape[0], counts.rows))
            core.check(core.lib.epx_combine(inner.pointer, byref(args), None))
        return out, out_weights

    def _handle(self, handle):
        if not isinstance(handle, CoreHandle) or handle.core is not self._core:
            raise InvalidArgument("handle: it must be what this buffer's dispatch() returned")
        return handle

    @staticmethod
    def _fill(rows, x, scales):
        rows.x, rows.row_bytes = x.ctypes.data, x.shape[1] * x.itemsize
        if scales is None:
            return None
        scales = _array("scales", scales, (x.shape[0], None), packed=False)
        if 0 in scales.strides:  # broadcast; to the C library 0 is the default
            scales = scales.copy()
        rows.side, rows.side_elem_bytes, rows.side_elems = scales.ctypes.data, scales.itemsize, scales.shape[1]
        rows.side_token_stride_bytes, rows.side_elem_stride_bytes = scales.strides
        return scales

    def _receive(self, shapes, call):
        """Rows into a lease, or, where the window has no room, into ordinary arrays."""
        import numpy as np
        core, got = self._core, _abi.Received()
        status = call(None, byref(got))
        if status == _abi.OK:
            lease = core.own_lease(got.lease, None) if got.lease else None
            memory = (got.x, got.side, got.topk_idx, got.topk_weights)
            return [None if shape is None else _over(lease, address, *shape) for shape, address in zip(shapes, memory)]
        if status != _abi.E_BUSY:
            core.check(status)
        arrays = [None if shape is None else _aligned_copy(np.zeros(shape[0], shape[1])) for shape in shapes]
        place = _abi.Place(*[None if one is None else one.ctypes.data for one in arrays])
        core.check(call(byref(place), byref(got)))
        return arrays
