"""The structures of epx._abi against the C compiler's, member by member; status codes; the constants."""
import ctypes
import os
import re
import shutil
import subprocess

import pytest

import epx
from epx import _abi, errors
from conftest import ROOT

CC = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)


@pytest.mark.skipif(CC is None, reason="no C compiler")
def test_structures(tmp_path):
    lines = []
    for name, kind in _abi.STRUCTURES.items():
        lines.append('printf("%s %%zu\\n", sizeof(%s));' % (name, name))
        for field, _ in kind._fields_:
            lines.append('printf("%s.%s %%zu\\n", offsetof(%s, %s));' % (name, field, name, field))
    source = tmp_path / "sizes.c"
    source.write_text("#include <stdio.h>\n#include <epx/ll.h>\nint main(void) {\n%s\nreturn 0; }\n" % "\n".join(lines))
    program = tmp_path / "sizes"
    subprocess.run([CC, "-I", os.path.join(ROOT, "include"), str(source), "-o", str(program)], check=True)
    seen = dict(line.split() for line in subprocess.check_output([str(program)], text=True).splitlines())
    for name, kind in _abi.STRUCTURES.items():
        assert int(seen[name]) == ctypes.sizeof(kind), name
        for field, _ in kind._fields_:
            assert int(seen["%s.%s" % (name, field)]) == getattr(kind, field).offset, (name, field)


def test_no_member_is_missing():
    """Every member of every structure in the header has its field here (sizes alone could hide one in padding)."""
    text = "".join(open(os.path.join(ROOT, "include", "epx", name)).read() for name in ("epx.h", "ll.h"))
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    for name, kind in _abi.STRUCTURES.items():
        body = re.search(r"typedef struct \w+ \{([^}]*)\} %s;" % name, text).group(1)
        members = re.findall(r"\*?(\w+)(?:\[\w+\])?\s*[,;]", body)
        assert members == [field for field, _ in kind._fields_], name


def test_status_codes():
    text = open(os.path.join(ROOT, "include", "epx", "status.h")).read()
    codes = {name: int(value) for name, value in re.findall(r"X\((EPX_\w+), (\d+),", text)}
    assert codes.pop("EPX_OK") == 0
    assert {c.name: c.status for c in errors.BY_STATUS.values()} == codes


def test_version_and_words():
    lib = _abi.library()
    version = lib.epx_version()
    assert "%d.%d.%d" % (version >> 16, version >> 8 & 255, version & 255) == epx.__version__
    with pytest.raises(epx.InvalidArgument) as caught:
        _abi.check(lib.epx_buffer_status(None))
    assert str(caught.value) and caught.value.name == "EPX_E_INVALID"
