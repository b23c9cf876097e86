"""The interface itself: names, keywords and defaults, as programs written for deep_ep use them."""
import inspect
import os
import subprocess
import sys
import weakref

import pytest

import epx

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402
from conftest import ROOT  # noqa: E402

# Parameters in order, with their defaults. REQUIRED has none.
REQUIRED = inspect.Parameter.empty
EVENTS = dict(previous_event=None, async_finish=False, allocate_on_comm_stream=False)
DISPATCH = dict(x=REQUIRED, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
                num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0,
                config=None, **EVENTS)
COMBINE = dict(x=REQUIRED, handle=REQUIRED, topk_weights=None, bias=None, config=None, **EVENTS)
CONTRACT = {
    "get_dispatch_layout": dict(topk_idx=REQUIRED, num_experts=REQUIRED, **EVENTS),
    "dispatch": DISPATCH, "combine": COMBINE,
    "low_latency_dispatch": dict(
        x=REQUIRED, topk_idx=REQUIRED, num_max_dispatch_tokens_per_rank=REQUIRED, num_experts=REQUIRED,
        cumulative_local_expert_recv_stats=None, dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False,
        use_ue8m0=False, async_finish=False, return_recv_hook=False),
    "low_latency_combine": dict(
        x=REQUIRED, topk_idx=REQUIRED, topk_weights=REQUIRED, handle=REQUIRED, use_logfmt=False, zero_copy=False,
        async_finish=False, return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None),
    "clean_low_latency_buffer": dict(num_max_dispatch_tokens_per_rank=REQUIRED, hidden=REQUIRED, num_experts=REQUIRED),
    "get_next_low_latency_combine_buffer": dict(handle=REQUIRED),
    "low_latency_update_mask_buffer": dict(rank_to_mask=REQUIRED, mask=False),
    "low_latency_query_mask_buffer": dict(mask_status=REQUIRED),
    "low_latency_clean_mask_buffer": {},
    "get_local_buffer_tensor": dict(dtype=REQUIRED, size=None, offset=0, use_rdma_buffer=False),
    "get_comm_stream": {}, "destroy": {},
}
STATICS = {
    "set_num_sms": dict(new_num_sms=REQUIRED), "capture": {}, "is_sm90_compiled": {},
    "get_dispatch_config": dict(num_ranks=REQUIRED), "get_combine_config": dict(num_ranks=REQUIRED),
    "get_low_latency_rdma_size_hint": dict(num_max_dispatch_tokens_per_rank=REQUIRED, hidden=REQUIRED, num_ranks=REQUIRED,
                                           num_experts=REQUIRED),
}
CONSTRUCTOR = dict(group=None, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
                   allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False,
                   enable_shrink=False, comm=None)
CONFIG = dict(num_sms=20, num_max_nvl_chunked_send_tokens=6, num_max_nvl_chunked_recv_tokens=256,
              num_max_rdma_chunked_send_tokens=6, num_max_rdma_chunked_recv_tokens=256)


def parameters(function, positional_only=False):
    """{name: default} in order, without self."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found
            if p.name != "self" and (p.kind is p.POSITIONAL_OR_KEYWORD or not positional_only)}


def test_signatures():
    for name, wanted in CONTRACT.items():
        assert list(parameters(getattr(epx.Buffer, name)).items()) == list(wanted.items()), name
        assert not isinstance(inspect.getattr_static(epx.Buffer, name), staticmethod), name
    for name, wanted in STATICS.items():
        assert list(parameters(getattr(epx.Buffer, name))) == list(wanted), name
        assert isinstance(inspect.getattr_static(epx.Buffer, name), staticmethod), name
    for name in ("intranode_dispatch", "intranode_combine", "internode_dispatch", "internode_combine"):
        assert callable(getattr(epx.Buffer, name))
    assert list(parameters(epx.Buffer.__init__, True).items()) == list(CONSTRUCTOR.items())
    assert list(parameters(epx.Config.__init__).items()) == list(CONFIG.items())
    assert epx.Buffer.num_sms == 20 and list(parameters(epx.EventOverlap.__init__))[:1] == ["event"]


def test_config():
    assert {name: getattr(epx.Config(), name) for name in CONFIG} == CONFIG
    assert [getattr(epx.Config(2, 3, 4, 5, 6), name) for name in CONFIG] == [2, 3, 4, 5, 6]
    for ranks in (1, 2, 3, 7, 8, 16, 40, 160, 1000):
        for config in (epx.Config(), epx.Buffer.get_dispatch_config(ranks), epx.Buffer.get_combine_config(ranks)):
            for hint in (config.get_nvl_buffer_size_hint, config.get_rdma_buffer_size_hint):
                assert type(hint(7168 * 2, ranks)) is int and hint(7168 * 2, ranks) > 0
    for ranks in (1, 3, 8):
        assert type(epx.Buffer.get_low_latency_rdma_size_hint(64, 2048, ranks, 8 * ranks)) is int
    for value in (1.5, "24", None, -1):
        with pytest.raises(epx.InvalidArgument, match="num_max_nvl_chunked_send_tokens"):
            epx.Config(20, value)
        with pytest.raises(epx.InvalidArgument, match="new_num_sms"):
            epx.Buffer.set_num_sms(value)
    assert epx.Buffer.num_sms == 20


def test_events():
    empty = epx.EventOverlap(None)
    assert empty.event is None and empty.current_stream_wait() is None
    with empty as same:
        assert same is empty
    event = epx.Buffer.capture()
    assert isinstance(event, epx.EventOverlap) and isinstance(event.event, epx.EventHandle)
    event.event.current_stream_wait()
    assert epx.EventOverlap(epx.EventHandle()).event is not None


def test_modules_can_be_probed():
    """Programs look for a module before they import it, or import it by name."""
    code = """
import importlib, importlib.util, epx
epx.install_as_deep_ep()
for name in ("deep_ep", "deep_ep.utils", "deep_ep.buffer", "deep_ep_cpp"):
    assert importlib.util.find_spec(name) is not None, name
    assert importlib.import_module(name).__name__ == name
import deep_ep, deep_ep.utils, deep_ep_cpp
assert deep_ep.utils.EventOverlap is deep_ep.EventOverlap is epx.EventOverlap
assert set(n for n in dir(deep_ep) if n[0] != '_') == {
    'Buffer', 'Config', 'EventOverlap', 'EventHandle', 'topk_idx_t', 'utils', 'buffer'}
assert isinstance(deep_ep.__version__, str)
from deep_ep import *
"""
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(os.path.dirname(epx.__file__)))
    out = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=60)
    assert out.returncode == 0, out.stderr


def attributes(group, device):
    """Every keyword at once, by position and by name; what can be read back; integers that are not int."""
    class Whole:
        def __init__(self, value):
            self.value = value

        def __index__(self):
            return self.value

    by_name = epx.Buffer(group=group, num_nvl_bytes=Whole(1 << 21), num_rdma_bytes=Whole(0), low_latency_mode=False,
                         num_qps_per_rank=Whole(12), allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False,
                         explicitly_destroy=False, enable_shrink=False, comm=None)
    by_place = epx.Buffer(group, 1 << 21, 0, True, 24, False, True, True, True, None)
    for buffer, mode in ((by_name, False), (by_place, True)):
        read = {name: getattr(buffer, name) for name in
                ("group_size", "rank", "num_nvl_bytes", "num_rdma_bytes", "low_latency_mode", "explicitly_destroy")}
        assert read == dict(group_size=group.size(), rank=group.rank(), num_nvl_bytes=1 << 21, num_rdma_bytes=0,
                            low_latency_mode=mode, explicitly_destroy=mode)
        assert type(buffer.num_nvl_bytes) is int and buffer.group is group and buffer.runtime is not None
        assert weakref.ref(buffer)() is buffer
        assert buffer.clean_low_latency_buffer(4, 128, 8 * group.size()) is None
    reserve = [by_place.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=flag) for flag in (False, True)]
    assert all(one.dim() == 1 and one.numel() > 0 for one in reserve)
    # Programs use it as a workspace of the size that they gave, however small the window is.
    sized = epx.Buffer(group, 1 << 21, (100 << 20) + 256)
    local = sized.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
    assert local.numel() == (100 << 20) + 256 and sized.get_local_buffer_tensor(torch.int32).numel() == 1 << 19
    assert sized.get_local_buffer_tensor(torch.int32, (2, 3), 64, True).data_ptr() == local.data_ptr() + 64
    sized.destroy()
    with pytest.raises(epx.Broken):
        sized.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
    del local
    del reserve
    # The runtime's destroy is the buffer's: its low-latency window goes too.
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
    if epx._abi.library().has_ll:
        by_place.low_latency_dispatch(torch.ones(1, 128, dtype=torch.bfloat16, device=device), ids, 4, group.size())
        inner = by_place._ll_core
        group.barrier() if hasattr(group, "barrier") else None
        by_place.runtime.destroy()
        assert not inner.buffer
    assert not by_place.runtime.is_available() and by_name.runtime.is_available()
    by_name.destroy()
    by_place.destroy()


def test_attributes():
    world.run(2, attributes)


def test_whose_tensors_a_group_gathers():
    from epx.buffer import _gather_device
    for backend, device in (("nccl", "cuda"), ("cuda:nccl", "cuda"), ("gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu"),
                            ("undefined", "cpu"), ("mpi", "cpu"), ("cpu:gloo", "cpu"), ("fake", "cpu")):
        assert _gather_device(backend) == device, backend


def patched(group, device):
    """Configs patched on epx.Buffer itself, and sizes from the environment."""
    asked = []
    epx.Buffer.get_dispatch_config = staticmethod(lambda ranks: asked.append(("dispatch", ranks)) or epx.Config(8))
    epx.Buffer.get_combine_config = staticmethod(lambda ranks: asked.append(("combine", ranks)) or epx.Config(6))
    os.environ.update(EPX_TOKENS_MAX="7", EPX_TOPK_MAX="3", EPX_EXPERTS_MAX="9", EPX_HANDLES_MAX="2")
    buffer = epx.Buffer(group, 1 << 21)
    x, ids = torch.ones(7, 16, device=device), torch.zeros((7, 3), dtype=torch.int64, device=device)
    keys = dict(num_tokens_per_expert=torch.zeros(8, dtype=torch.int32, device=device))
    recv, _, _, _, handle, _ = buffer.dispatch(x, topk_idx=ids, **keys)
    buffer.combine(recv, handle)
    buffer.combine(recv, handle, config=epx.Config(4))
    assert asked == [("dispatch", group.size()), ("combine", group.size())] and handle[1].shape[1] == 4
    for words, more, wide, experts in (("tokens_max", 1, 0, 8), ("topk_max", 0, 1, 8), ("experts_max", 0, 0, 10)):
        with pytest.raises(epx.InvalidArgument, match="%s.*EPX_%s" % (words, words.upper())):
            buffer.dispatch(torch.ones(7 + more, 16, device=device),
                            topk_idx=torch.zeros((7 + more, 3 + wide), dtype=torch.int64, device=device),
                            num_tokens_per_expert=torch.zeros(experts, dtype=torch.int32, device=device))
    second = buffer.dispatch(x, topk_idx=ids, **keys)
    with pytest.raises(epx.Busy, match="all 2 handles.*EPX_HANDLES_MAX"):
        buffer.dispatch(x, topk_idx=ids, **keys)
    os.environ["EPX_TOPK_MAX"] = "many"
    with pytest.raises(epx.InvalidArgument, match="EPX_TOPK_MAX=many"):
        epx.Buffer(group)
    del second
    buffer.destroy()


def test_patched_configs_and_environment():
    world.run(2, patched)


def other_default_device(group, device):
    """A program's torch.set_default_device is its own business."""
    ranks, experts = group.size(), 2 * group.size()
    buffer = epx.Buffer(group, 1 << 21)
    ids = (torch.arange(12, device=device).view(6, 2) * 3) % experts
    x, weights = torch.ones(6, 16, device=device), torch.ones(6, 2, device=device)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    status = torch.ones(ranks, dtype=torch.int32, device=device)
    with torch.device("meta"):
        other = epx.Buffer(group, 1 << 21)
        other.destroy()
        per_rank, *_ = buffer.get_dispatch_layout(ids, experts)
        recv, recv_ids, recv_weights, _, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights,
                                                                     num_tokens_per_expert=counts)
        tables = tuple(handle)
        out, out_weights, _ = buffer.combine(recv, handle, topk_weights=recv_weights)
        mask = tables[4]
        by_mask = buffer.dispatch(x, is_token_in_rank=mask, num_tokens_per_expert=counts)[0]
        made = epx.dispatch(x, ids, weights, buffer, experts)
        back = epx.combine(made[0], made[4], buffer, x)
        if epx._abi.library().has_ll:
            got = buffer.low_latency_dispatch(torch.ones(6, 128, device=device, dtype=torch.bfloat16), ids, 6, experts)
            buffer.low_latency_query_mask_buffer(status)
            assert all(t.device == device for t in got[2][:2] + got[0])
    for t in (per_rank, recv, recv_ids, recv_weights, out, out_weights, by_mask, back) + tables:
        assert t.device == device
    assert made[3].device.type == "cpu" and status.tolist() == [0] * ranks
    fan = mask.sum(1, keepdim=True)
    assert out.equal(x * fan) and back.equal(x * fan)
    buffer.destroy()


def test_other_default_device():
    world.run(2, other_default_device)


def test_documented():
    """Every public thing has its docstring; every keyword and failure has its place in docs/python.md."""
    page = open(os.path.join(ROOT, "docs", "python.md")).read()
    for word in parameters(epx.Buffer.__init__):
        if word not in ("group", "explicitly_destroy", "comm"):
            assert "`%s`" % word in page or "`%s=" % word in page, word
    for kind in epx.errors.BY_STATUS.values():
        assert "`%s`" % kind.__name__ in page and kind.__doc__, kind
    owners = [epx.Buffer, epx.Config, epx.EventOverlap, epx.EventHandle, epx.ArrayBuffer, epx.MoELayer, epx.runtime.Runtime]
    for owner in owners:
        assert owner.__doc__
        for name, value in inspect.getmembers(owner):
            mine = (getattr(value, "__module__", None) or "").startswith("epx")
            if not name.startswith("_") and callable(value) and mine and owner is not epx.MoELayer:
                assert inspect.getdoc(value), (owner, name)
    for value in (epx.dispatch, epx.combine, epx.unique_id, epx.install_as_deep_ep):
        assert inspect.getdoc(value)
