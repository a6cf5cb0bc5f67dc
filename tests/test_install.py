"""`install.sh` names what is missing on a machine where a package cannot be built."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = f"""#!/bin/sh
case "$*" in
"-m venv .venv") mkdir -p .venv/bin; printf '#!/bin/sh\\ncase "$*" in *editable*) exit 1;; esac\\n' > .venv/bin/pip
                 chmod +x .venv/bin/pip;;
*sysconfig*) echo {ROOT}/no-such-folder;;
esac
"""
CURE = "which packages without a wheel need; on Debian and Ubuntu: apt install build-essential python3-dev libpcre2-dev"


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (None, f"The installation failed, and there is no C compiler, {CURE}\n"),
        ("exit 1", f"The installation failed, and the headers of Python are missing, {CURE}\n"),
        ("! grep -q pcre2", f"The installation failed, and the headers of PCRE2 are missing, {CURE}\n"),
        ("exit 0", ""),
    ],
)
def test_what_a_build_lacks_is_named(tmp_path, compiler, said):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "dirname", "grep", "mkdir", "chmod"):
        (tools / name).symlink_to(shutil.which(name))
    scripts = {"python3": PYTHON, **({"cc": f"#!/bin/sh\n{compiler}\n"} if compiler else {})}
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("install.sh", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["bash", "install.sh"], cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, said), os.listdir(tmp_path)
