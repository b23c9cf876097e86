"""Importing epx does nothing and needs nothing."""
import os
import subprocess
import sys

from conftest import ROOT

PACKAGE = os.path.join(ROOT, "python")


def python(code, *flags):
    environment = dict(os.environ, PYTHONPATH=PACKAGE)
    return subprocess.run([sys.executable, *flags, "-c", code], env=environment, text=True, capture_output=True,
                          timeout=60)


def test_no_side_effects():
    out = python("""
import os, sys, threading
before, modules = dict(os.environ), set(sys.modules)
import epx
assert dict(os.environ) == before
new = {m.split('.')[0] for m in set(sys.modules) - modules}
assert not new & {'torch', 'numpy', 'deep_ep', 'deep_ep_cpp'}, new
assert threading.active_count() == 1
assert epx._abi._library is None
assert not hasattr(epx, 'ElasticBuffer') and not hasattr(epx, 'HybridEPBuffer')
for name in 'Buffer Config EventOverlap EventHandle __version__ Error ArrayBuffer unique_id install_as_deep_ep'.split():
    assert hasattr(epx, name), name
""")
    assert out.returncode == 0, out.stderr


def test_without_torch():
    out = python("""
import sys
sys.modules['torch'] = None   # an import of torch fails
import epx
buffer = epx.ArrayBuffer()
assert (buffer.rank, buffer.ranks) == (0, 1)
buffer.destroy()
try:
    epx.Buffer()
except ImportError:
    pass
else:
    raise SystemExit('Buffer without torch')
""")
    assert out.returncode == 0, out.stderr


def test_library_not_there():
    out = python("""
import os, epx
os.environ['EPX_LIBRARY'] = '/nowhere/libepx.so'
try:
    epx.unique_id()
except epx.Unsupported as error:
    assert '/nowhere/libepx.so' in str(error)
else:
    raise SystemExit('loaded?')
""")
    assert out.returncode == 0, out.stderr


def test_install_as_deep_ep():
    out = python("""
import sys, epx
assert 'deep_ep' not in sys.modules
epx.install_as_deep_ep()
epx.install_as_deep_ep()
import deep_ep, deep_ep_cpp
from deep_ep import Buffer, Config, EventOverlap, EventHandle, topk_idx_t
from deep_ep.utils import EventOverlap as E2, EventHandle as H2
from deep_ep_cpp import Config as C2, EventHandle as H3
import torch
assert Buffer is epx.Buffer and E2 is EventOverlap and H2 is EventHandle is H3 and C2 is Config
assert topk_idx_t is torch.int64 and deep_ep.__version__ == epx.__version__
assert not hasattr(deep_ep, 'ElasticBuffer') and not hasattr(deep_ep, 'HybridEPBuffer')
""")
    assert out.returncode == 0, out.stderr


def test_refuses_beside_the_real_one():
    out = python("""
import sys, types, epx
sys.modules['deep_ep'] = types.ModuleType('deep_ep')
try:
    epx.install_as_deep_ep()
except epx.Error as error:
    assert 'loaded already' in str(error)
else:
    raise SystemExit(1)
""")
    assert out.returncode == 0, out.stderr
