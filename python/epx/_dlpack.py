"""DLPack capsules over memory that another object owns.

capsule() makes a DLManagedTensor whose deleter drops the owner. Several capsules may share one owner: the memory goes
back when the last tensor is gone.

The deleter is C (epx_owner_drop): a tensor may die while an exception is on its way (a temporary of the expression that
raised, say). A function of Python's, called then, fails or worse; __del__ alone puts the exception aside.
"""
import ctypes
import struct
from ctypes import Structure, c_int, c_int32, c_int64, c_uint16, c_uint64, c_uint8, c_void_p

from . import _abi

CPU, CUDA = 1, 2
INT, UINT, FLOAT, BFLOAT = 0, 1, 2, 4
_DIMS = 4


class _Tensor(Structure):
    _fields_ = [("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
                ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16), ("shape", c_void_p), ("strides", c_void_p),
                ("byte_offset", c_uint64)]


class _Block(Structure):
    """A DLManagedTensor, then the epx_owner_t that is its context, and its shape. The tensor's own; with it goes `keeps`."""

    _fields_ = [("tensor", _Tensor), ("context", c_void_p), ("deleter", c_void_p), ("owner", c_void_p * 5),
                ("dims", c_int64 * _DIMS)]


_WHOLE = struct.Struct("PiiiBBHPPQPPPPPPP%dq" % _DIMS)  # a _Block, written at once: field by field takes several times as long
_OWNER_AT, _DIMS_AT = _Block.owner.offset, _Block.dims.offset
_REST = tuple((0,) * (_DIMS - n) for n in range(_DIMS + 1))  # dims that a shape of n leaves over

_NAME = b"dltensor"  # the capsule keeps the pointer, not a copy
_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype, _capsule_new.argtypes = ctypes.py_object, [c_void_p, ctypes.c_char_p, c_void_p]
_keep = ctypes.pythonapi.Py_IncRef
_keep.restype, _keep.argtypes = None, [ctypes.py_object]
_enter, _drop, _leave = [ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p).value
                         for name in ("PyGILState_Ensure", "Py_DecRef", "PyGILState_Release")]
_gone = c_int(0)
_keep(_gone)  # tensors look at it when all this is no more
_deleter = []  # address of epx_owner_drop


def capsule(owner, address, shape, code, bits, device_type=CPU, device_id=0):
    """A DLPack capsule of a packed array at `address`. It must be imported once, or `owner` lives on."""
    if not _deleter:
        _deleter.append(ctypes.cast(_abi.library().epx_owner_drop, c_void_p).value)
    block, n = _Block(), len(shape)
    block.keeps, where = owner, ctypes.addressof(block)
    _WHOLE.pack_into(block, 0, address, device_type, device_id, n, code, bits, 1, where + _DIMS_AT, 0, 0,
                     where + _OWNER_AT, _deleter[0], _enter, _drop, _leave, id(block), ctypes.addressof(_gone), *shape,
                     *_REST[n])
    _keep(block)
    return _capsule_new(where, _NAME, None)


def disarm():
    """At exit: no tensor calls back any more. The blocks stay allocated, since consumers still read them."""
    _gone.value = 1
