"""Finds the package and the library of this checkout; says what the tests run on."""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, HERE)
if os.environ.get("EPX_TEST_INSTALLED") != "1":  # else: the installed wheel
    sys.path.insert(0, os.path.join(ROOT, "python"))
os.environ.setdefault("EPX_TIMEOUT_MS", "20000")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_report_header(config):
    import ranks
    return "epx tests on %s" % ranks.DEVICE
