"""Importing epx does nothing and needs nothing."""
import glob
import os
import shutil
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


def test_as_a_wheel_lays_it_out(tmp_path):
    """Modules and libraries in one folder, nothing else, under every Python from 3.9 that is here: no torch, no numpy."""
    from epx import _abi
    shutil.copytree(os.path.join(PACKAGE, "epx"), tmp_path / "epx", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    built = os.path.dirname(os.path.realpath(_abi.library_path()))
    for name in ("libepx.so", "libepx_cuda.so", "libepx_ofi.so"):
        if os.path.exists(os.path.join(built, name)):
            shutil.copy(os.path.join(built, name), tmp_path / "epx" / name)
    found = [sys.executable] + [path for path in map(shutil.which, ["python3.%d" % n for n in range(9, 16)]) if path]
    found += glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python"))
    found = [path for path in found if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]  # no pyenv shims
    environment = {name: value for name, value in os.environ.items() if name not in ("EPX_LIBRARY", "PYTHONPATH")}
    code = """
import sys
if sys.version_info < (3, 9):
    raise SystemExit('old')
sys.path.insert(0, %r)
sys.modules['torch'] = sys.modules['numpy'] = None
import epx
assert epx._abi.library_path() == %r + '/epx/libepx.so'
buffer = epx.ArrayBuffer()
buffer.status()
assert (buffer.rank, buffer.ranks) == (0, 1) and len(epx.unique_id()) == 128
assert epx.Buffer.is_sm90_compiled() in (False, True)
buffer.destroy()
print('works')
""" % (str(tmp_path), str(tmp_path))
    said = {path: subprocess.run([path, "-B", "-c", code], env=environment, cwd=str(tmp_path), text=True, timeout=60,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.strip() for path in sorted(set(found))}
    assert said[sys.executable] == "works" and set(said.values()) <= {"works", "old"}, said


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


def test_a_folder_of_that_name(tmp_path):
    """The two files of docs/python.md: what a program finds that starts its own processes."""
    page = open(os.path.join(ROOT, "docs", "python.md")).read()
    first, second = page.split("# deep_ep/__init__.py\n")[1].split("```")[0].split("# deep_ep/utils.py\n")
    folder = tmp_path / "deep_ep"
    folder.mkdir()
    (folder / "__init__.py").write_text(first)
    (folder / "utils.py").write_text(second)
    out = python("""
import sys
sys.path.insert(0, %r)
from deep_ep import Buffer, Config, topk_idx_t
from deep_ep.utils import EventHandle, EventOverlap
import deep_ep, epx, torch
assert Buffer is epx.Buffer and deep_ep.EventOverlap is EventOverlap is epx.EventOverlap and topk_idx_t is torch.int64
assert not hasattr(deep_ep, 'ElasticBuffer')
""" % str(tmp_path))
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
