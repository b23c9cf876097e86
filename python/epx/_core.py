"""Group, buffer, handles and leases of the C library, and how long each of them lives.

A Core owns one epx_group_t and one epx_buffer_t. Leases (tensors over the window) and handles refer to it.

Giving back: a lease or a handle may die in any thread, at any moment, in the middle of a call on the same buffer even
(the garbage collector runs where it likes). The C library takes one call at a time per buffer. So a death only
appends to `pending`; whoever holds the lock, or can take it without waiting, gives the entries back.

What was made, or used, while a CUDA graph was being captured belongs to that graph: a replay writes there whenever it
runs, which nobody here sees. Such places are never given back; they go with the buffer.

The end: close() destroys the C objects once no lease is alive and no call is under way. Until then tensors over the
window stay readable. At interpreter exit everything is destroyed, so that peers hear a clean leave.
"""
import atexit
import ctypes
import os
import sys
import threading
import weakref
from collections import deque
from ctypes import byref, c_uint64, c_void_p

from . import _abi, _dlpack
from .errors import Broken, InvalidArgument

_cores = weakref.WeakSet()
_pid = os.getpid()  # kept, since every call compares it; a system call each time shows


def _in_child():
    global _pid
    _pid = os.getpid()


os.register_at_fork(after_in_child=_in_child)


class Core:
    """One group with one buffer on it. See make_core."""

    def __init__(self, group, buffer, info):
        self.lib = _abi.library()
        self.group, self.buffer = group, buffer
        self.pid = _pid
        self.rank, self.ranks = info.rank, info.ranks
        self.domains, self.ranks_per_domain = info.domains, info.ranks_per_domain
        self.domain, self.domain_index = info.domain, info.domain_index
        self.domain_of = list(info.domain_of[:info.ranks])
        self.cuda = info.backend == _abi.BACKEND_CUDA
        self.device = info.device
        self.lock = threading.Lock()
        self.pending = deque()
        self.leases = 0  # alive; changed with the lock held
        self.received = _abi.Received()  # where the call under way, which holds the lock, is told what came
        self.way_back = None  # on a GPU: _turn.WayBack
        self.closing = False
        _cores.add(self)
        _arm_exit()

    # -- calls --

    def __enter__(self):
        self.check_process()  # before the lock: a fork may have copied it locked, by a thread that is not in the child
        self.lock.acquire()
        try:
            self.check_usable()
            if self.pending:
                self._give_back()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_):
        self.lock.release()
        if self.pending or self.closing:
            self.drain()

    def check_usable(self):
        """Raise Broken when destroyed."""
        if self.closing or not self.buffer:
            raise Broken("this epx buffer was destroyed")

    def check_process(self):
        """Raise InvalidArgument in another process than the one that made it."""
        if _pid != self.pid:
            raise InvalidArgument("this epx buffer was made by process %d and does not work in its fork %d: make a "
                                  "buffer in the child" % (self.pid, _pid))

    def check(self, status):
        """Raise the C library's words unless `status` is EPX_OK."""
        if status != _abi.OK:
            raise _abi.error_of(status)

    # -- giving back --

    def release(self, kind, value, stream, borrowed=None):
        """From anywhere, __del__ too: give a lease or a handle back, now or with the next call. `borrowed` lives until then."""
        self.pending.append((kind, value, stream, borrowed))
        self.drain()

    def drain(self):
        while self.pending or (self.closing and self.buffer and not self.leases):
            if not self.lock.acquire(False):
                return  # its holder looks at `pending` when it is done
            try:
                if not self.buffer:
                    self.pending.clear()
                    return
                self._give_back()
                if self.closing and not self.leases:
                    self._destroy()
            finally:
                self.lock.release()

    def _give_back(self):
        """With the lock held."""
        if _pid != self.pid:
            self.pending.clear()
            return
        while self.pending:
            kind, value, stream, borrowed = self.pending.popleft()
            if kind == "lease":
                self.leases -= 1
                if borrowed is not None:
                    stream = self.way_back.after(*borrowed)
                self.lib.epx_lease_release(self.buffer, value, stream)
            elif kind == "captured_lease":
                self.leases -= 1
            elif kind == "ll_handle":
                self.lib.epx_ll_handle_release(value, stream)
            else:
                self.lib.epx_handle_release(value, stream)

    def close(self):
        """Destroy now, or when the last tensor over the window is gone. Bounded, idempotent."""
        self.closing = True
        self.drain()

    def _destroy(self):
        """With the lock held."""
        buffer, group = self.buffer, self.group
        self.buffer = self.group = None
        self.pending.clear()
        if _pid == self.pid:
            self.lib.epx_buffer_destroy(buffer)
            self.lib.epx_group_destroy(group)

    # -- leases --

    def lease(self, nbytes, stream=None):
        """Window memory of `nbytes`: (Lease, address). Raises Busy when there is no room."""
        number, memory = c_uint64(), c_void_p()
        with self:
            self.check(self.lib.epx_lease(self.buffer, nbytes, stream, byref(number), byref(memory)))
            return self.own_lease(number.value, stream), memory.value

    def own_lease(self, number, stream, captured=False, owner=None):
        """The object whose death gives lease `number` back. With the lock held. owner: torch's object of `stream`, if any."""
        self.leases += 1
        return Lease(self, number, stream, captured, owner)

    def allgather(self, data):
        """All-gather of equally long bytes over the group: a list of bytes, by rank."""
        out = ctypes.create_string_buffer(max(1, len(data) * self.ranks))
        with self:
            self.check(self.lib.epx_group_allgather(self.group, data, len(data), out))
        n = len(data)
        return [out.raw[i * n:(i + 1) * n] for i in range(self.ranks)]


class Lease:
    """Holds one lease; tensors over it hold this."""

    __slots__ = ("core", "number", "stream", "captured", "owner")

    def __init__(self, core, number, stream, captured=False, owner=None):
        self.core, self.number, self.stream, self.captured, self.owner = core, number, stream, captured, owner

    def __del__(self):
        core, streams = self.core, None
        if self.captured:
            core.release("captured_lease", self.number, None)
            return
        if self.owner is not None and core.buffer:
            streams = core.way_back.streams(self.owner)
        core.release("lease", self.number, self.stream, streams)


class CoreHandle:
    """Holds one epx_handle_t (or epx_ll_handle_t): what a dispatch decided.

    rows       received, or worst
    borrowed   what the C library may still write to: between the halves of a low-latency call a handle that is given back
               first takes out what was sent, into the outputs that the call named
    """

    __slots__ = ("core", "pointer", "stream", "kind", "captured", "borrowed", "tokens", "topk", "experts", "worst", "rows",
                 "idx_dtype", "event", "__weakref__")

    def __init__(self, core, pointer, stream, kind="handle", captured=False):
        self.core, self.pointer, self.stream, self.kind, self.captured = core, pointer, stream, kind, captured
        self.tokens = self.topk = self.experts = self.worst = self.rows = 0
        self.event = self.borrowed = self.idx_dtype = None

    def __del__(self):
        if self.pointer and self.core.buffer and not self.captured:
            self.core.release(self.kind, self.pointer, self.stream, self.borrowed)
            self.pointer = None


def make_core(rank=0, ranks=0, allgather=None, unique_id=None, group_options=None, buffer_options=None):
    """Join a group and make its buffer. Collective.

    allgather        function(bytes) -> list of bytes by rank; or
    unique_id        128 bytes from epx.unique_id(); or neither: torchrun's, mpirun's or srun's environment, else a
                     group of one.
    group_options    fields of epx_group_config_t; buffer_options of epx_buffer_config_t.
    """
    lib = _abi.library()
    config = _abi.GroupConfig(rank=rank, ranks=ranks)
    for name, value in (group_options or {}).items():
        setattr(config, name, value)
    keep, failure = [], []
    if unique_id is not None:
        if len(unique_id) != _abi.UNIQUE_ID_BYTES:
            raise InvalidArgument("unique_id: %d bytes; epx.unique_id() makes %d" %
                                  (len(unique_id), _abi.UNIQUE_ID_BYTES))
        identity = _abi.UniqueId.from_buffer_copy(bytes(unique_id))
        config.id = ctypes.pointer(identity)
        keep.append(identity)
    elif allgather is not None:
        def gather(_context, mine, nbytes, everyone):
            try:
                parts = allgather(ctypes.string_at(mine, nbytes) if nbytes else b"")
                data = b"".join(bytes(part) for part in parts)
                if len(data) != nbytes * ranks:
                    raise ValueError("the all-gather of the caller's group gave %d bytes, not %d x %d" %
                                     (len(data), ranks, nbytes))
                ctypes.memmove(everyone, data, len(data))
                return 0
            except BaseException as error:  # it cannot pass through C
                failure.append(error)
                return 1
        callback = _abi.AllgatherFn(gather)
        config.allgather = callback
        keep.append(callback)

    def check(status):
        if status != _abi.OK:
            error = _abi.error_of(status)
            raise error from (failure[0] if failure else None)

    group, buffer = c_void_p(), c_void_p()
    check(lib.epx_group_create(byref(config), byref(group)))
    try:
        info = _abi.GroupInfo()
        check(lib.epx_group_get_info(group, byref(info)))
        check(lib.epx_buffer_create(group, byref(_buffer_config(buffer_options, keep)), byref(buffer)))
    except BaseException:
        lib.epx_group_destroy(group)
        raise
    return Core(group.value, buffer.value, info)


def _buffer_config(options, keep):
    """epx_buffer_config_t of `options`; `keep` must live as long as it."""
    settings, options = _abi.BufferConfig(), dict(options or {})
    experts = options.pop("expert_rank", None)
    for name, value in options.items():
        setattr(settings, name, value)
    if experts is not None:
        array = (ctypes.c_int32 * len(experts))(*experts)
        settings.expert_rank, settings.experts = array, len(experts)
        keep.append(array)
    return settings


def sibling(core, buffer_options):
    """A Core with another buffer on the group of `core` (the C library counts who uses the group). Collective."""
    buffer, info, keep = c_void_p(), _abi.GroupInfo(), []
    with core:
        core.check(core.lib.epx_group_get_info(core.group, byref(info)))
        core.check(core.lib.epx_buffer_create(core.group, byref(_buffer_config(buffer_options, keep)), byref(buffer)))
    return Core(None, buffer.value, info)


_armed = None  # the process whose exit is taken care of


def _arm_exit():
    """Run _at_exit when this process ends. A child of multiprocessing runs no atexit functions, but its own."""
    global _armed
    if _armed == _pid:
        return
    _armed = _pid
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        from multiprocessing import util
        util.Finalize(None, _at_exit, exitpriority=0)


@atexit.register
def _at_exit():
    """Tensors that outlive the interpreter must not call back into it; peers should hear that this rank left."""
    if _abi._library is None:
        return
    _dlpack.disarm()
    for core in list(_cores):
        if _pid != core.pid or not core.lock.acquire(timeout=1.0):
            continue
        try:
            core.closing = True
            if core.buffer:
                core._destroy()
        finally:
            core.lock.release()
