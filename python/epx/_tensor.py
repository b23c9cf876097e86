"""Torch tensors: over memory of the C library, and checks that name the argument."""
import functools

import torch

from . import _abi, _dlpack
from .errors import InvalidArgument

try:
    _from_dlpack = torch._C._from_dlpack
except AttributeError:
    from torch.utils.dlpack import from_dlpack as _from_dlpack

_CODES = {torch.float64: (_dlpack.FLOAT, 64), torch.float32: (_dlpack.FLOAT, 32), torch.float16: (_dlpack.FLOAT, 16),
          torch.bfloat16: (_dlpack.BFLOAT, 16), torch.int64: (_dlpack.INT, 64), torch.int32: (_dlpack.INT, 32),
          torch.int16: (_dlpack.INT, 16), torch.int8: (_dlpack.INT, 8), torch.uint8: (_dlpack.UINT, 8)}
# What combine adds.
SUMMED = {torch.bfloat16: _abi.DTYPE_BF16, torch.float16: _abi.DTYPE_FP16, torch.float32: _abi.DTYPE_FP32}


def over(owner, address, shape, dtype, device):
    """A tensor over packed memory at `address`, which keeps `owner` alive. An empty one is ordinary."""
    if 0 in shape or not address:
        return torch.empty(shape, dtype=dtype, device=device)
    if dtype in _CODES:
        return _from_dlpack(_dlpack.capsule(owner, address, shape, *_described(dtype, device)))
    # A type that DLPack does not have: bytes, seen as that type.
    plain = tuple(shape[:-1]) + (shape[-1] * dtype.itemsize,)
    return _from_dlpack(_dlpack.capsule(owner, address, plain, *_described(torch.uint8, device))).view(dtype)


@functools.lru_cache(maxsize=None)
def _described(dtype, device):
    """(code, bits, device type, device number) for DLPack."""
    return _CODES[dtype] + ((_dlpack.CUDA, device.index) if device.type == "cuda" else (_dlpack.CPU, 0))


def copy_of(owner, address, shape, dtype, device):
    """An ordinary tensor with what lies at `address` now."""
    tensor = over(owner, address, shape, dtype, device)
    return tensor.clone() if tensor.numel() else tensor


def check(name, tensor, device, dims=None, dtypes=None, shape=None, packed=True):
    """Raise InvalidArgument, which names `name`, unless `tensor` is as asked.

    shape    None entries match anything. packed: rows one after the other without gaps.
    """
    if not isinstance(tensor, torch.Tensor):
        raise InvalidArgument("%s: %s; it must be a tensor" % (name, type(tensor).__name__))
    if tensor.device != device:
        raise InvalidArgument("%s: it is on %s; this buffer works on %s" % (name, tensor.device, device))
    if dtypes is not None and tensor.dtype not in dtypes:
        raise InvalidArgument("%s: dtype %s; it must be %s" % (name, tensor.dtype, " or ".join(map(str, dtypes))))
    if dims is not None and tensor.dim() not in dims:
        raise InvalidArgument("%s: shape %s; it must have %s dimensions" %
                              (name, tuple(tensor.shape), " or ".join(map(str, dims))))
    if shape is not None and tensor.shape != shape:
        if tensor.dim() != len(shape) or any(w is not None and w != h for w, h in zip(shape, tensor.shape)):
            raise InvalidArgument("%s: shape %s; it must be [%s]" %
                                  (name, tuple(tensor.shape), ", ".join("any" if n is None else str(n) for n in shape)))
    if packed and not tensor.is_contiguous():
        raise InvalidArgument("%s: strides %s of shape %s; it must be contiguous" %
                              (name, tuple(tensor.stride()), tuple(tensor.shape)))


def check_rows(name, tensor, device, dtypes=None):
    """Rows [T, H]: elements side by side, the row stride and the start multiples of 16 bytes.

    Returns T, H, bytes of a row, bytes between the starts of rows (0 where there are not two).
    """
    check(name, tensor, device, dims=(2,), dtypes=dtypes, packed=False)
    t, h = tensor.shape
    size = tensor.element_size()
    down, right = tensor.stride()
    if h == 0 or h * size % 16:
        raise InvalidArgument("%s: a row of %d elements has %d bytes; it must be a multiple of 16, and not 0" %
                              (name, h, h * size))
    if t and (right != 1 and h > 1 or t > 1 and (down < h or down * size % 16)):
        raise InvalidArgument("%s: strides %s of shape %s; elements of a row must lie side by side and rows start "
                              "at multiples of 16 bytes (x.contiguous() makes it so)" % (name, (down, right), (t, h)))
    if t and tensor.data_ptr() % 16:
        raise InvalidArgument("%s: it starts at an address that is not a multiple of 16 (a copy, x.clone(), will)" % name)
    return t, h, h * size, down * size if t > 1 else 0
