"""A program written for deep_ep runs unchanged."""
import os

import pytest

import epx

pytest.importorskip("torch")
import ranks as world  # noqa: E402


def program(group, device, name):
    epx.install_as_deep_ep()
    import deep_ep_program
    return getattr(deep_ep_program, name)(group, device)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_intranode(ranks):
    world.run(ranks, program, "intranode")


@pytest.mark.parametrize("ranks, size", [(2, 1), (4, 2), (8, 4), (6, 2)])
def test_internode(ranks, size):
    folder = os.path.dirname(os.path.realpath(epx._abi.library_path()))
    if not os.path.exists(os.path.join(folder, "libepx_ofi.so")):
        pytest.skip("no libepx_ofi.so: built without libfabric")
    world.run(ranks, program, "internode", environment={"EPX_RANKS_PER_DOMAIN": str(size)})


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_low_latency(ranks):
    if not epx._abi.library().has_ll:
        pytest.skip("no low latency in this build of libepx.so")
    world.run(ranks, program, "low_latency")
