"""The devices of this machine."""

import ast
import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from stages.runtime.interfaces import source

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # lists of the GPUs to use
# Asks the CUDA driver as torch will ask it, so CUDA_VISIBLE_DEVICES counts.
_ASK_CUDA = """
import ctypes
count, driver = ctypes.c_int(0), ctypes.CDLL("libcuda.so.1")
print(0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value)
"""
_ASK_MEMORY = """
import ctypes
device, size, driver = ctypes.c_int(0), ctypes.c_size_t(0), ctypes.CDLL("libcuda.so.1")
failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
print(0 if failed or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device) else size.value)
"""
_NVIDIA = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")  # of an NVIDIA driver; the last one under WSL
_NODES = Path("/sys/class/kfd/kfd/topology/nodes")  # AMD's driver has a folder for each CPU and each GPU


def has_bf16() -> bool:
    """Whether there is a GPU that computes in bfloat16 without emulation (Ampere and newer)."""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))


def gpus() -> int:
    """The number of GPUs that the installed torch can use, asked of the driver; or that of `planned_for`.

    torch is not imported, and no GPU is opened in this process. It is 0 for a torch that was built for CPUs only.
    """
    return _gpus_here() if _gpus_there is None else _gpus_there


_gpus_there: int | None = None  # of the machine that is planned for


@contextmanager
def planned_for(count: int | None) -> Iterator[None]:
    """Let this process plan for another machine with so many GPUs, as that of a cluster; None for this machine."""
    global _gpus_there
    before, _gpus_there = _gpus_there, count
    try:
        yield
    finally:
        _gpus_there = before


@cache
def _gpus_here() -> int:
    built = _built_for()
    if built == "cuda" and any(Path(file).exists() for file in _NVIDIA):
        asked = subprocess.run([sys.executable, "-I", "-S", "-c", _ASK_CUDA], capture_output=True, check=False)
        return int(asked.stdout or 0)
    if built == "hip":
        return _amd_gpus()
    return 0


@cache
def gpu_memory() -> int | None:
    """The bytes of memory of the first GPU, asked of NVIDIA's driver; None where they are not known."""
    if not gpus() or _gpus_there is not None or _built_for() != "cuda":
        return None
    asked = subprocess.run([sys.executable, "-I", "-S", "-c", _ASK_MEMORY], capture_output=True, check=False)
    return int(asked.stdout or 0) or None


def _built_for() -> str | None:
    """`cuda` or `hip`, by the text of torch's `version.py`; None for a torch that was built for CPUs only."""
    text = source("torch", "version.py")
    lines = [line for line in ast.parse(text).body if isinstance(line, ast.AnnAssign) and line.value is not None]
    values = {ast.unparse(line.target): ast.literal_eval(line.value) for line in lines if line.value is not None}
    return next((name for name in ("cuda", "hip") if values.get(name) is not None), None)


def _amd_gpus() -> int:
    """AMD's GPUs: the nodes of its driver with SIMD units, without those that the environment hides."""
    texts = [file.read_text(encoding="utf-8") for file in _NODES.glob("*/properties")]
    count = sum(re.search(r"^simd_count [1-9]", text, re.M) is not None for text in texts)
    for name in VISIBLE:
        if name in os.environ:
            count = min(count, len([word for word in os.environ[name].split(",") if word.strip()]))
    return count


def device_memory() -> int | None:
    """The bytes of memory of the device that models compute on, whatever is free of it; None if that is not known."""
    return gpu_memory() if gpus() else main_memory()


def main_memory() -> int:
    """The bytes of main memory, whatever is free of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def has_gpu() -> bool:
    """Whether the installed torch can use a GPU, found without opening it."""
    return gpus() > 0


def hide_all_gpus_but_one() -> None:
    """Let this process see the first of the GPUs that it may use. Call it before torch opens a GPU.

    TRL refuses several GPUs in one process.
    """
    given = [name for name in VISIBLE if name in os.environ]
    for name in given:
        os.environ[name] = os.environ[name].partition(",")[0]
    if not given:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # AMD's runtime reads it too


def torch_device() -> str:
    """The device that models compute on: `cuda` if torch sees a GPU, or else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def on_gpus(model: Any) -> Any:
    """A model in main memory, moved to the GPU; with several GPUs spread over all of them, as `device_map: auto` does.

    Layers for which the GPUs have no room stay in main memory. Without a GPU the model stays as it is.
    """
    if torch_device() == "cpu":
        return model
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or [])
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def compute_dtype() -> str:
    """The dtype that models compute in, whatever they are stored in: bfloat16 if the GPU has it, or else float32."""
    return "bfloat16" if has_bf16() else "float32"


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more, so that the next model has it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
