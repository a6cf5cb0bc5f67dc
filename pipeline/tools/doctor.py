"""This machine and its packages in; what is right, what is wrong and its cure out. Nothing is changed."""

import fcntl
import importlib.metadata as metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from stages.model.device import has_gpu
from stages.runtime.figures import size_of

State = Literal["ok", "note", "wrong"]
HUB = "https://huggingface.co"
_INSTALL = "`pip install -c constraints.txt -e .` in the project's folder"
_DISK = 20 * 2**30  # a 7B model and its 4-bit copy take more; less is worth a note
_MEMORY = 4 * 2**30
_WAIT = 300  # seconds for torch to start and to ask the driver
_OTHERS = {
    "auto-gptq": "it does not load with transformers 5, and GPTQModel takes its place: `pip uninstall auto-gptq`",
    "unsloth": "it patches transformers and TRL when it is imported: use an environment without it",
}
"""Packages that break this project when they are installed beside it."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    text: str
    cure: str = ""


def examine(saves: Path) -> list[Finding]:
    """Everything that is looked at, in the order of the report; `saves` is the folder of the outputs."""
    parts: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _gpu, _machine, lambda: _files(saves), _hub]
    return [finding for part in parts for finding in part()]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    cure = "" if good else "install Python 3.11 or newer"
    yield Finding("Python", "ok" if good else "wrong", f"{version}, {sys.prefix}", cure)
    encoding = (sys.stdout.encoding or "").lower()
    if encoding.replace("-", "") not in ("utf8", "gb18030", "gbk", "cp65001"):
        yield Finding("terminal", "note", f"its encoding is {encoding}", "Chinese shows as `?`: `export LANG=C.UTF-8`")


# Packages


def _packages() -> Iterator[Finding]:
    """The packages that the project needs, those that they need in turn, and packages that break it."""
    wrong: list[Finding] = []
    shown = []
    for name, ranges in _needed().items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(Finding(name, "wrong", "is not installed", _INSTALL))
            continue
        misfit = [f"{by} needs {wanted}" for by, wanted in ranges if not _allows(wanted, version)]
        if misfit:
            wrong.append(Finding(name, "wrong", f"{version} is installed; {'; '.join(misfit)}", _INSTALL))
        if any(by == "stagewise" for by, _ in ranges):
            shown.append(f"{name} {version}")
    state: State = "wrong" if wrong else "ok"
    yield Finding("packages", state, ", ".join(shown))
    yield from wrong
    for name, why in _OTHERS.items():
        if _version(name) is not None:
            yield Finding(name, "wrong", f"{_version(name)} is installed", why)
    if _version("gptqmodel") and not _version("optimum"):
        yield Finding("optimum", "wrong", "is missing, so PEFT refuses every LoRA", "`pip install optimum`")
    for name, extra in (("fastapi", "serve"), ("lm_eval", "harness")):
        if _version(name) is None:
            yield Finding(extra, "note", f"`{extra}` is not installed", f"`pip install 'stagewise[{extra}]'` adds it")


def _needed() -> dict[str, list[tuple[str, Requirement]]]:
    """Package → who needs it, and which versions; of this project and of everything that it needs."""
    found: dict[str, list[tuple[str, Requirement]]] = {}
    todo = ["stagewise"]
    seen = set(todo)
    while todo:
        owner = todo.pop(0)
        try:
            lines = metadata.requires(owner) or []
        except metadata.PackageNotFoundError:
            continue
        for wanted in map(Requirement, lines):
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            name = canonicalize_name(wanted.name)
            found.setdefault(name, []).append((owner, wanted))
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return found


def _allows(wanted: Requirement, version: str) -> bool:
    return wanted.specifier.contains(version.partition("+")[0], prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# The machine


def _gpu() -> Iterator[Finding]:
    if not has_gpu():
        yield Finding(
            "GPU", "note", "there is none", "small models train on the CPU; see the hardware table in README.md"
        )
        return
    code = (
        "import torch; n = torch.cuda.device_count(); print(torch.version.cuda or torch.version.hip); "
        "[print(torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory, "
        "torch.cuda.is_bf16_supported()) for i in range(n)]"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_WAIT, check=False)
    except subprocess.TimeoutExpired:
        cure = "look at `nvidia-smi` or `rocm-smi`; a driver that hangs needs a restart of the machine"
        yield Finding("GPU", "wrong", f"the driver has one, and torch does not answer within {_WAIT} s", cure)
        return
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) < 2:
        build = _version("torch") or ""
        why = (
            "torch is a CPU build" if "+cpu" in build else (done.stderr.strip().splitlines() or ["torch sees none"])[-1]
        )
        cure = "install the torch build for your driver, or update the driver"
        yield Finding("GPU", "wrong", f"the driver has one, and torch cannot use it: {why}", cure)
        return
    for line in lines[1:]:
        name, memory, bf16 = line.rsplit(" ", 2)
        text = f"{name}, {size_of(int(memory))}, CUDA {lines[0]}{'' if bf16 == 'True' else ', without bfloat16'}"
        yield Finding("GPU", "ok", text)


def _machine() -> Iterator[Finding]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    small = memory < _MEMORY
    cure = "the demo needs 4 GB" if small else ""
    yield Finding("memory", "note" if small else "ok", f"{size_of(memory)}, {cores} CPU cores", cure)
    compiler = os.environ.get("CC", "").strip() or "cc"
    if shutil.which(compiler.split()[0]) is None:
        text = "is not there; Triton, DeepSpeed and GPTQModel compile kernels when they first run"
        yield Finding(f"C compiler `{compiler}`", "note", text, "on Debian and Ubuntu: `apt install build-essential`")
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
    if policy == "active":
        yield Finding("threads", "note", "OMP_WAIT_POLICY is ACTIVE", "on a machine that others use, unset it")


def _files(saves: Path) -> Iterator[Finding]:
    """Disk space, locks and renames where outputs go."""
    folder = saves if saves.is_dir() else saves.absolute().parent
    free = shutil.disk_usage(folder).free
    state: State = "ok" if free > _DISK else "note"
    yield Finding(
        "disk", state, f"{size_of(free)} free in {folder}", "" if free > _DISK else "`pipeline gc` frees some"
    )
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            first = Path(name, "a")
            with open(first, "a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            first.rename(Path(name, "b"))
    except OSError as error:
        text = f"{folder}: {error.strerror}"
        yield Finding("file system", "wrong", text, "choose a folder that you can write, with `--saves DIR`")
    else:
        yield Finding("file system", "ok", f"locks and renames work in {folder}")


# The Hub


def _hub() -> Iterator[Finding]:
    address = os.environ.get("HF_ENDPOINT", HUB)
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE"):
        yield Finding("Hub", "note", "HF_HUB_OFFLINE is set, so nothing is fetched", "unset it to fetch models")
        return
    trouble = _unreachable(address)
    if trouble is not None:
        cure = "name folders in place of Hub names, or a mirror in HF_ENDPOINT"
        yield Finding("Hub", "note", f"{address} cannot be reached ({trouble})", cure)
        return
    key = "with a token" if os.environ.get("HF_TOKEN") else "without a token (HF_TOKEN), so gated models stay closed"
    yield Finding("Hub", "ok", f"{address} answers, {key}")


def _unreachable(address: str) -> str | None:
    """Why an address cannot be reached; None if it answers, whatever it says."""
    import http.client
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    except http.client.HTTPException as error:
        return f"its answer is not HTTP: {type(error).__name__}"
    return None
