"""Differentiable dispatch and combine, as torch.library custom ops with fake kernels: autograd runs through them (the
backward of one is the other) and torch.compile traces them.

A handle travels as a tensor: int64 [1] on CPU, the number under which `_handles` knows the routing. Its storage owns
the routing, so that autograd, which saves the tensor, keeps the routing alive.
"""
import ctypes
import itertools
import weakref
from typing import Tuple

import torch
from torch import Tensor

from . import _dlpack, _tensor
from .buffer import _numbered as _buffers
from .errors import InvalidArgument
from .handle import DispatchHandle

_handles = weakref.WeakValueDictionary()  # number -> _Token
_numbers = itertools.count(1)


class _Token:
    """A handle with the number that stands for it; owned by the tensor that carries the number."""

    def __init__(self, handle):
        self.handle, self.number = handle, next(_numbers)
        self.memory = ctypes.c_int64(self.number)
        _handles[self.number] = self

    def tensor(self):
        return _tensor._from_dlpack(_dlpack.capsule(self, ctypes.addressof(self.memory), (1,), _dlpack.INT, 64))


def _buffer_at(number):
    try:
        return _buffers[number]
    except KeyError:
        raise InvalidArgument("buffer: it is gone") from None


def _handle_at(tensor):
    token = _handles.get(int(tensor))
    if token is None:
        raise InvalidArgument("handle: its dispatch is gone (keep the tensor that epx.dispatch returned, not a copy)")
    return token.handle


@torch.library.custom_op("epx::dispatch", mutates_args=())
def _dispatch(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, buffer: int, num_experts: int, alignment: int,
              worst: int) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    owner = _buffer_at(buffer)
    experts = torch.empty(num_experts, dtype=torch.int32, device=x.device)  # only its length is looked at
    recv_x, recv_idx, recv_weights, counts, handle, _ = owner.dispatch(
        x, topk_idx=topk_idx, topk_weights=topk_weights, num_tokens_per_expert=experts, expert_alignment=alignment,
        num_worst_tokens=worst)
    token = _Token(handle)
    return recv_x, recv_idx, recv_weights, torch.tensor(counts, dtype=torch.int64, device="cpu"), token.tensor()


@_dispatch.register_fake
def _(x, topk_idx, topk_weights, buffer, num_experts, alignment, worst):
    owner = _buffer_at(buffer)
    rows = worst if worst else torch.library.get_ctx().new_dynamic_size()
    local = 0 if worst else len(owner._local_experts(num_experts))
    return (x.new_empty((rows, x.shape[1])), topk_idx.new_empty((rows, topk_idx.shape[1])),
            topk_weights.new_empty((rows, topk_idx.shape[1])), torch.empty(local, dtype=torch.int64, device="cpu"),
            torch.empty(1, dtype=torch.int64, device="cpu"))


@torch.library.custom_op("epx::dispatch_again", mutates_args=())
def _dispatch_again(x: Tensor, like: Tensor, handle: Tensor, buffer: int) -> Tensor:
    return _buffer_at(buffer).dispatch(x, handle=_handle_at(handle))[0]


@_dispatch_again.register_fake
def _(x, like, handle, buffer):
    return x.new_empty((like.shape[0], x.shape[1]))


@torch.library.custom_op("epx::combine", mutates_args=())
def _combine(x: Tensor, handle: Tensor, like: Tensor, buffer: int) -> Tensor:
    return _buffer_at(buffer).combine(x, _handle_at(handle))[0]


@_combine.register_fake
def _(x, handle, like, buffer):
    return x.new_empty((like.shape[0], x.shape[1]))


@torch.library.custom_op("epx::combine_weights", mutates_args=())
def _combine_weights(x: Tensor, weights: Tensor, handle: Tensor, like: Tensor, buffer: int) -> Tuple[Tensor, Tensor]:
    out, out_weights, _ = _buffer_at(buffer).combine(x, _handle_at(handle), topk_weights=weights)
    return out, out_weights


@_combine_weights.register_fake
def _(x, weights, handle, like, buffer):
    return x.new_empty((like.shape[0], x.shape[1])), weights.new_empty((like.shape[0], weights.shape[1]))


def _dispatch_setup(ctx, inputs, output):
    x, ctx.buffer = inputs[0], inputs[3]
    ctx.save_for_backward(output[4], x.new_empty((x.shape[0], 0)), output[0].new_empty((output[0].shape[0], 0)))
    ctx.hidden, ctx.dtype, ctx.topk = x.shape[1], x.dtype, inputs[1].shape[1]


def _dispatch_backward(ctx, grad_x, _grad_idx, grad_weights, _grad_counts, _grad_handle):
    handle, like, recv = ctx.saved_tensors
    if grad_x is None:
        grad_x = recv.new_zeros((recv.shape[0], ctx.hidden))
    if grad_weights is None:
        out = torch.ops.epx.combine(grad_x.contiguous(), handle, like, ctx.buffer)
        return out, None, None, None, None, None, None
    out, out_weights = torch.ops.epx.combine_weights(grad_x.contiguous(), grad_weights.contiguous(), handle, like,
                                                     ctx.buffer)
    return out, None, out_weights, None, None, None, None


def _combine_setup(ctx, inputs, output):
    x, handle, _like, ctx.buffer = inputs
    ctx.save_for_backward(handle, x.new_empty((x.shape[0], 0)))


def _combine_backward(ctx, grad):
    handle, like = ctx.saved_tensors
    return torch.ops.epx.dispatch_again(grad.contiguous(), like, handle, ctx.buffer), None, None, None


_dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)
_combine.register_autograd(_combine_backward, setup_context=_combine_setup)


def dispatch(x, topk_idx, topk_weights, buffer, num_experts, expert_alignment=1, num_worst_tokens=0):
    """Rows to the ranks of their experts; differentiable in x and topk_weights. Collective, and so is its backward.

    x bf16, fp16 or fp32 [T,H]; topk_idx int64 [T,k]; topk_weights fp32 [T,k]; buffer an epx.Buffer.
    Returns recv_x [rows,H], recv_topk_idx [rows,k] (local numbers, -1 elsewhere), recv_topk_weights [rows,k],
            rows per local expert int64 [L] on CPU (empty with num_worst_tokens), handle (a tensor, for combine).
    Raises  as Buffer.dispatch.
    """
    return torch.ops.epx.dispatch(x.contiguous(), topk_idx, topk_weights.contiguous(), buffer._op_number, num_experts,
                                  expert_alignment, num_worst_tokens)


def combine(x, handle, buffer, like):
    """Rows back to their tokens, added; differentiable in x. Collective, and so is its backward.

    x [rows,H] in the order of recv_x; handle from dispatch; like: any tensor with T rows (the x of dispatch).
    Returns [T,H]. Raises as Buffer.combine.
    """
    return torch.ops.epx.combine(x.contiguous(), handle, like, buffer._op_number)


__all__ = ["dispatch", "combine", "DispatchHandle"]
