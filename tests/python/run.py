"""ctest's way to one file of tests: run.py FILE. Exit code 77, with the reason last, when nothing in it could run."""
import os
import sys

sys.dont_write_bytecode = True


def main(path):
    try:
        import pytest
    except ImportError:
        print("no pytest in %s: tools/setup_python.sh makes .venv with it" % sys.executable)
        return 77

    class Watch:
        passed, reasons = 0, []

        def pytest_runtest_logreport(self, report):
            self.passed += report.when == "call" and not report.skipped
            if report.skipped:
                self.reasons.append(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))

        def pytest_collectreport(self, report):
            if report.skipped:
                self.reasons.append(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))

    watch = Watch()
    code = pytest.main(["-q", "-rs", "-p", "no:cacheprovider", "--durations=3", path], plugins=[watch])
    if code in (0, 5) and not watch.passed:
        print("skipped: " + (watch.reasons[0] if watch.reasons else "no test was found"))
        return 77
    return int(code)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1]))
