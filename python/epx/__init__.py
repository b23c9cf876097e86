"""epx: dispatch and combine for Mixture-of-Experts layers, on CPU and CUDA tensors.

``Buffer`` is a drop-in for ``deep_ep.Buffer``; ``dispatch``, ``combine`` and ``MoELayer`` are differentiable and traced by
torch.compile; ``ArrayBuffer`` takes numpy arrays and needs no torch. Importing has no side effect: neither torch nor
libepx.so is loaded before something needs it.
"""
from .config import Config
from .errors import (BadData, Broken, Busy, DeviceFailure, Error, InvalidArgument, Mismatch, NetFailure, OutOfMemory,
                     Overflow, PeerFailure, SystemFailure, Timeout, Unsupported)
from .event import EventHandle, EventOverlap
from .handle import DispatchHandle
from .compat import install_as_deep_ep
from .buffer import Buffer
from .arrays import ArrayBuffer
from ._unique_id import unique_id

__version__ = "0.1.0"

# Loaded when asked for: they need torch.
_LAZY = {"dispatch": "ops", "combine": "ops", "MoELayer": "moe"}


def __getattr__(name):
    if name == "topk_idx_t":
        import torch
        return torch.int64
    if name in _LAZY:
        from importlib import import_module
        return getattr(import_module("." + _LAZY[name], __name__), name)
    raise AttributeError("module 'epx' has no attribute %r" % name)


def __dir__():
    return sorted(list(globals()) + list(_LAZY) + ["topk_idx_t"])
