"""The C ABI of include/epx/epx.h and ll.h: structures, functions, and where the shared library is.

The library is loaded by the first call that needs it, never by the import. tests/python/test_abi.py compares every
structure here with the C compiler's.
"""
import ctypes
import os
import re
from ctypes import (CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_ubyte,
                    c_uint32, c_uint64, c_uint8, c_void_p)

from .errors import BY_STATUS, Busy, Error, InvalidArgument, Unsupported

OK, E_INVALID, E_BUSY, E_DATA = 0, 1, 3, 13
BACKEND_AUTO, BACKEND_CPU, BACKEND_CUDA = 0, 1, 2
DTYPE_BF16, DTYPE_FP16, DTYPE_FP32 = 1, 2, 3
UNIQUE_ID_BYTES = 128
TOPK_MAX = 32

AllgatherFn = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p)


class _Sized(Structure):
    """A structure that begins with `size`."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.size = ctypes.sizeof(self)


class UniqueId(Structure):
    _fields_ = [("bytes", c_ubyte * UNIQUE_ID_BYTES)]


class GroupConfig(_Sized):
    _fields_ = [("size", c_size_t), ("rank", c_int), ("ranks", c_int), ("id", POINTER(UniqueId)),
                ("allgather", AllgatherFn), ("allgather_context", c_void_p), ("backend", c_int), ("device", c_int),
                ("ranks_per_domain", c_int), ("net", c_char_p), ("threads", c_int), ("timeout_ms", c_uint64)]


class GroupInfo(_Sized):
    _fields_ = [("size", c_size_t), ("rank", c_int), ("ranks", c_int), ("domains", c_int),
                ("ranks_per_domain", c_int), ("domain", c_int), ("domain_index", c_int),
                ("domain_of", POINTER(c_int32)), ("backend", c_int), ("device", c_int), ("threads", c_int),
                ("backend_why", c_char_p), ("domain_why", c_char_p), ("threads_why", c_char_p),
                ("net_why", c_char_p), ("net", c_char_p)]


class BufferConfig(_Sized):
    _fields_ = [("size", c_size_t), ("lease_bytes", c_size_t), ("reserve_bytes", c_size_t), ("tokens_max", c_uint32),
                ("topk_max", c_uint32), ("experts_max", c_uint32), ("handles_max", c_uint32),
                ("leases_max", c_uint32), ("expert_rank", POINTER(c_int32)), ("experts", c_uint32), ("sms", c_int),
                ("timeout_ms", c_uint64), ("ll_tokens_max", c_uint32), ("ll_hidden_max", c_uint32),
                ("ll_slots", c_uint32), ("ll_zero_copy", c_int), ("ll_mask_on_timeout", c_int)]


class Layout(_Sized):
    _fields_ = [("size", c_size_t), ("topk_idx", c_void_p), ("topk_idx_bits", c_int), ("tokens", c_uint32),
                ("topk", c_uint32), ("experts", c_uint32), ("tokens_per_rank", c_void_p),
                ("tokens_per_domain", c_void_p), ("tokens_per_expert", c_void_p), ("in_rank", c_void_p)]


class Rows(Structure):
    _fields_ = [("x", c_void_p), ("row_bytes", c_size_t), ("x_stride_bytes", c_size_t), ("side", c_void_p),
                ("side_elem_bytes", c_size_t), ("side_elems", c_uint32), ("side_token_stride_bytes", c_int64),
                ("side_elem_stride_bytes", c_int64)]


class Dispatch(_Sized):
    _fields_ = [("size", c_size_t), ("rows", Rows), ("tokens", c_uint32), ("topk_idx", c_void_p),
                ("topk_idx_bits", c_int), ("topk", c_uint32), ("experts", c_uint32), ("topk_weights", c_void_p),
                ("in_rank", c_void_p), ("expert_alignment", c_uint32), ("recv_tokens_max", c_uint32), ("sms", c_int),
                ("timeout_ms", c_uint64)]


class Place(Structure):
    _fields_ = [("x", c_void_p), ("side", c_void_p), ("topk_idx", c_void_p), ("topk_weights", c_void_p),
                ("src_token", c_void_p)]


class Received(_Sized):
    _fields_ = [("size", c_size_t), ("rows", c_uint32), ("x", c_void_p), ("side", c_void_p), ("topk_idx", c_void_p),
                ("topk_weights", c_void_p), ("src_token", c_void_p), ("lease", c_uint64)]


class Counts(_Sized):
    _fields_ = [("size", c_size_t), ("rows", c_uint32), ("local_experts", c_uint32),
                ("rows_per_expert", POINTER(c_int32)), ("rows_matrix", POINTER(c_int32)), ("tokens", POINTER(c_int32))]


class HandleTables(_Sized):
    _fields_ = [("size", c_size_t), ("tokens", c_uint32), ("rows", c_uint32), ("slots", c_uint32),
                ("dst_rank", c_void_p), ("dst_row", c_void_p), ("src_token", c_void_p),
                ("rows_matrix", POINTER(c_int32)), ("tokens_of", POINTER(c_int32))]


class Combine(_Sized):
    _fields_ = [("size", c_size_t), ("x", c_void_p), ("x_stride_bytes", c_size_t), ("dtype", c_int),
                ("hidden", c_uint32), ("topk_weights", c_void_p), ("bias", c_void_p * 2), ("out", c_void_p),
                ("out_topk_weights", c_void_p), ("sms", c_int), ("timeout_ms", c_uint64)]


class EnvEntry(_Sized):
    _fields_ = [("size", c_size_t), ("name", c_char_p), ("value", c_char_p), ("default_text", c_char_p),
                ("meaning", c_char_p)]


class Traffic(_Sized):
    _fields_ = [("size", c_size_t), ("local_bytes", c_uint64), ("domain_bytes", c_uint64), ("net_bytes", c_uint64),
                ("net_puts", c_uint64)]


class LlDispatch(_Sized):
    _fields_ = [("size", c_size_t), ("x", c_void_p), ("tokens", c_uint32), ("hidden", c_uint32),
                ("topk_idx", c_void_p), ("topk_idx_bits", c_int), ("topk", c_uint32), ("experts", c_uint32),
                ("topk_weights", c_void_p), ("format", c_int), ("round_scale", c_int), ("ue8m0", c_int),
                ("order", c_int), ("recv_x", c_void_p), ("recv_scales", c_void_p), ("recv_count", c_void_p),
                ("src_info", c_void_p), ("layout_range", c_void_p), ("recv_topk_idx", c_void_p),
                ("recv_topk_weights", c_void_p), ("expert_stats", c_void_p), ("wait_ns", c_void_p), ("sms", c_int),
                ("timeout_ms", c_uint64)]


class LlCombine(_Sized):
    _fields_ = [("size", c_size_t), ("x", c_void_p), ("pre_reduced", c_int), ("topk_idx", c_void_p),
                ("topk_weights", c_void_p), ("out", c_void_p), ("weight_left", c_void_p), ("wait_ns", c_void_p),
                ("sms", c_int), ("timeout_ms", c_uint64)]


class LlPlan(_Sized):
    _fields_ = [("size", c_size_t), ("ranks", c_uint32), ("tokens_max", c_uint32), ("hidden", c_uint32),
                ("topk", c_uint32), ("experts", c_uint32), ("slots", c_uint32), ("dispatch_bytes", c_uint64),
                ("combine_bytes", c_uint64), ("ids_bytes", c_uint64), ("words_bytes", c_uint64),
                ("window_bytes", c_uint64), ("zero_copy_bytes", c_uint64),
                ("staging_bytes", c_uint64)]


# C name of each structure, for the test.
STRUCTURES = {"epx_unique_id_t": UniqueId, "epx_group_config_t": GroupConfig, "epx_group_info_t": GroupInfo,
              "epx_buffer_config_t": BufferConfig, "epx_layout_t": Layout, "epx_rows_t": Rows,
              "epx_dispatch_t": Dispatch, "epx_place_t": Place, "epx_received_t": Received, "epx_counts_t": Counts,
              "epx_handle_tables_t": HandleTables, "epx_combine_t": Combine, "epx_env_entry_t": EnvEntry,
              "epx_traffic_t": Traffic, "epx_ll_dispatch_t": LlDispatch, "epx_ll_combine_t": LlCombine,
              "epx_ll_plan_t": LlPlan}

# name: arguments. All return epx_status_t, except those below.
_FUNCTIONS = {
    "epx_unique_id_create": [c_char_p, POINTER(UniqueId)],
    "epx_group_create": [POINTER(GroupConfig), POINTER(c_void_p)],
    "epx_group_barrier": [c_void_p, c_uint64],
    "epx_group_allgather": [c_void_p, c_void_p, c_size_t, c_void_p],
    "epx_group_get_info": [c_void_p, POINTER(GroupInfo)],
    "epx_buffer_create": [c_void_p, POINTER(BufferConfig), POINTER(c_void_p)],
    "epx_buffer_status": [c_void_p],
    "epx_buffer_barrier": [c_void_p, c_void_p],
    "epx_layout": [c_void_p, POINTER(Layout), c_void_p],
    "epx_dispatch_begin": [c_void_p, POINTER(Dispatch), c_void_p, POINTER(c_void_p)],
    "epx_handle_counts": [c_void_p, POINTER(Counts)],
    "epx_dispatch_end": [c_void_p, POINTER(Place), c_void_p, POINTER(Received)],
    "epx_dispatch_again": [c_void_p, POINTER(Rows), POINTER(Place), c_void_p, POINTER(Received)],
    "epx_handle_get_tables": [c_void_p, POINTER(HandleTables)],
    "epx_combine": [c_void_p, POINTER(Combine), c_void_p],
    "epx_lease": [c_void_p, c_size_t, c_void_p, POINTER(c_uint64), POINTER(c_void_p)],
    "epx_lease_release": [c_void_p, c_uint64, c_void_p],
    "epx_backend_usable": [c_int, POINTER(c_char_p)],
    "epx_env_get": [c_uint32, POINTER(EnvEntry)],
    "epx_buffer_get_traffic": [c_void_p, POINTER(Traffic)],
}
# Low latency (ll.h): a library without it serves all the rest.
_LL_FUNCTIONS = {
    "epx_ll_dispatch": [c_void_p, POINTER(LlDispatch), c_void_p, POINTER(c_void_p)],
    "epx_ll_dispatch_send": [c_void_p, POINTER(LlDispatch), c_void_p, POINTER(c_void_p)],
    "epx_ll_dispatch_recv": [c_void_p, c_void_p],
    "epx_ll_combine": [c_void_p, POINTER(LlCombine), c_void_p],
    "epx_ll_combine_send": [c_void_p, POINTER(LlCombine), c_void_p],
    "epx_ll_combine_recv": [c_void_p, c_void_p],
    "epx_ll_mask_set": [c_void_p, c_int, c_int, c_void_p],
    "epx_ll_mask_get": [c_void_p, POINTER(c_int32)],
    "epx_ll_mask_clear": [c_void_p, c_void_p],
    "epx_ll_plan": [POINTER(LlPlan)],
}
_LL_RELEASE = "epx_ll_handle_release"
_OTHERS = {
    "epx_version": (c_uint32, []),
    "epx_status_name": (c_char_p, [c_int]),
    "epx_status_text": (c_char_p, [c_int]),
    "epx_error_detail": (c_char_p, []),
    "epx_group_destroy": (None, [c_void_p]),
    "epx_buffer_destroy": (None, [c_void_p]),
    "epx_handle_release": (None, [c_void_p, c_void_p]),
    "epx_owner_drop": (None, [c_void_p]),
}

_library = None


def library_path():
    """Where libepx.so is: EPX_LIBRARY, the wheel's own folder, or the build folder of a checkout."""
    asked = os.environ.get("EPX_LIBRARY")
    if asked:
        return asked
    here = os.path.dirname(os.path.abspath(__file__))
    tried = [os.path.join(here, "libepx.so"),
             os.path.join(os.path.dirname(os.path.dirname(here)), "build", "lib", "libepx.so")]
    for path in tried:
        if os.path.exists(path):
            return path
    raise Unsupported("libepx.so was not found; looked at " + " and ".join(tried) +
                      ". Build it (make), install the package (pip install .), or set EPX_LIBRARY to its path.")


def library():
    """The loaded library with its prototypes set."""
    global _library
    if _library is None:
        path = library_path()
        try:
            lib = ctypes.CDLL(path)
        except OSError as error:
            raise Unsupported("cannot load %s: %s" % (path, error)) from None
        for name, arguments in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, c_int
        for name, (result, arguments) in _OTHERS.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = arguments, result
        lib.has_ll = hasattr(lib, _LL_RELEASE)
        if lib.has_ll:
            for name, arguments in _LL_FUNCTIONS.items():
                function = getattr(lib, name)
                function.argtypes, function.restype = arguments, c_int
            release = getattr(lib, _LL_RELEASE)
            release.argtypes, release.restype = [c_void_p, c_void_p], None
        _library = lib
    return _library


_LIMIT = re.compile(r"\b(tokens|topk|experts|handles)_max\b")  # words name these; programs of deep_ep have no keyword for them


def error_of(status):
    """The exception for `status`, with the calling thread's words."""
    lib = library()
    words = (lib.epx_error_detail() or b"").decode("utf-8", "replace")
    if not words:
        words = (lib.epx_status_text(status) or b"unknown failure").decode()
    kind = BY_STATUS.get(status, Error)
    limit = _LIMIT.search(words)
    if limit and kind in (InvalidArgument, Busy):
        words += " (epx.Buffer's keyword, or EPX_%s in the environment)" % limit[0].upper()
    return kind(words)


def check(status):
    """Raise the status as an exception unless it is EPX_OK."""
    if status != OK:
        raise error_of(status)


__all__ = ["byref", "c_char_p", "c_float", "c_int32", "c_uint8", "c_uint64", "c_void_p", "library", "check", "error_of"]
