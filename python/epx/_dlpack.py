"""DLPack capsules over memory that another object owns.

capsule() makes a DLManagedTensor whose deleter drops the owner. Several capsules may share one owner: the memory goes
back when the last tensor is gone. The blocks are recycled, so that calls keep memory flat.
"""
import ctypes
import struct
from ctypes import Structure, c_int32, c_int64, c_uint16, c_uint64, c_uint8, c_void_p

CPU, CUDA = 1, 2
INT, UINT, FLOAT, BFLOAT = 0, 1, 2, 4
_DIMS = 4


class _Tensor(Structure):
    _fields_ = [("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
                ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16), ("shape", c_void_p), ("strides", c_void_p),
                ("byte_offset", c_uint64)]


class _Block(Structure):  # a DLManagedTensor, then its shape
    _fields_ = [("tensor", _Tensor), ("context", c_void_p), ("deleter", c_void_p), ("dims", c_int64 * _DIMS)]


_WHOLE = struct.Struct("PiiiBBHPPQPP%dq" % _DIMS)  # a _Block, written at once: field by field takes several times as long
_DIMS_AT = _Block.dims.offset
_REST = tuple((0,) * (_DIMS - n) for n in range(_DIMS + 1))  # dims that a shape of n leaves over

_live = {}   # address of a block -> (block, owner)
_free = []   # blocks without a tensor; a list's append and pop are atomic
_NAME = b"dltensor"  # the capsule keeps the pointer, not a copy
_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype, _capsule_new.argtypes = ctypes.py_object, [c_void_p, ctypes.c_char_p, c_void_p]


@ctypes.CFUNCTYPE(None, c_void_p)
def _deleter(address):
    block, owner = _live.pop(address)
    if len(_free) < 1024:
        _free.append(block)
    del owner  # its __del__ may give a lease back


_DELETER = ctypes.cast(_deleter, c_void_p).value


def capsule(owner, address, shape, code, bits, device_type=CPU, device_id=0):
    """A DLPack capsule of a packed array at `address`. It must be imported once, or `owner` lives on."""
    try:
        block = _free.pop()
    except IndexError:
        block = _Block()
    where, n = ctypes.addressof(block), len(shape)
    _WHOLE.pack_into(block, 0, address, device_type, device_id, n, code, bits, 1, where + _DIMS_AT, 0, 0, 0, _DELETER,
                     *shape, *_REST[n])
    _live[where] = (block, owner)
    return _capsule_new(where, _NAME, None)


def alive():
    """How many tensors made here are alive."""
    return len(_live)


def disarm():
    """At exit: no tensor calls back any more. The blocks stay allocated, since consumers still read them."""
    for block, owner in list(_live.values()):
        block.deleter = None
        for thing in (block, owner):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
