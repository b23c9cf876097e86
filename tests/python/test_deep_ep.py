"""A program written for deep_ep runs unchanged."""
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


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_low_latency(ranks):
    if not epx._abi.library().has_ll:
        pytest.skip("no low latency in this build of libepx.so")
    world.run(ranks, program, "low_latency")
