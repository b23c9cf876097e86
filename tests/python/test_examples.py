"""The examples under torchrun."""
import os
import subprocess
import sys

import pytest

import epx  # noqa: F401

torch = pytest.importorskip("torch")
import ranks as world  # noqa: E402
from conftest import ROOT  # noqa: E402


def torchrun(ranks, *arguments, folder):
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.path.dirname(os.path.dirname(epx.__file__)),
                       EPX_LIBRARY=os.path.abspath(epx._abi.library_path()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    out = subprocess.run(command + list(arguments), env=environment, cwd=folder, text=True, timeout=240,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert out.returncode == 0, out.stdout
    return out.stdout


def test_train(tmp_path):
    """50 losses on 4 ranks equal those on one (the example compares them); curve and routing file are written."""
    world.need(4)
    said = torchrun(4, os.path.join(ROOT, "examples", "train_moe.py"), "--steps", "50", "--layers", "1", "--batch", "8", "--compare", "--device",
                    world.DEVICE, "--curve", "curve.png", "--routing", "routing.txt", "--routing-tokens", "64",
                    folder=tmp_path)
    assert "first 50 losses against one rank" in said and "WRONG" not in said
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = [line for line in (tmp_path / "routing.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "epx-routing 1 ranks 4 topk 2 experts 8" and lines[1] == "tokens 64 64 64 64"
    assert len(lines) == 2 + 256
    for line in lines[2:]:
        ids = [int(word) for word in line.split()]
        assert len(set(ids)) == 2 and all(0 <= i < 8 for i in ids)
    tool = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(epx._abi.library_path()))), "bin", "epx")
    if os.path.exists(tool):  # a wheel has none
        out = subprocess.run([tool, "bench", "--routing", "routing.txt", "--ranks", "4", "--backend", "cpu", "--hidden", "64",
                              "--iters", "1", "--warmup", "0", "--no-floor"], cwd=tmp_path, text=True, timeout=60,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert out.returncode == 0 and "top-2 of 8 experts, routing routing.txt" in out.stdout, out.stdout
    losses = [float(line.split("loss")[1].split()[0]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 1


def test_the_page(tmp_path):
    """The worked example of docs/python.md, as it stands there."""
    world.need(4)
    page = open(os.path.join(ROOT, "docs", "python.md")).read()
    code = page.split("```python\n# torchrun")[1].split("```")[0]
    if world.DEVICE == "cuda":
        code = "import os\nos.environ['EPX_BACKEND'] = 'cpu'\n" + code  # its tensors are on the CPU
    (tmp_path / "example.py").write_text("# torchrun" + code + "print('ran')\n")
    assert torchrun(4, "example.py", folder=tmp_path).count("ran") == 4


def test_serve(tmp_path):
    if not epx._abi.library().has_ll:
        pytest.skip("no low latency in this build of libepx.so")
    world.need(2)
    said = torchrun(2, os.path.join(ROOT, "examples", "serve_moe.py"), "--steps", "4", "--device", world.DEVICE,
                    folder=tmp_path)
    assert "tokens decoded" in said
