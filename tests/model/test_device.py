"""How many GPUs the installed torch can use, found without importing torch. The driver is a library of these tests."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from stages.model import device
from stages.runtime import interfaces

NODES = {"0": "cpu_cores_count 16\nsimd_count 0\n", "1": "simd_count 256\n", "2": "mem_banks_count 1\nsimd_count 440\n"}
LIBRARY = """
int cuInit(unsigned flags) { return FAILS; }
int cuDeviceGetCount(int *count) { *count = 3; return 0; }
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    device._gpus_here.cache_clear()
    interfaces.source.cache_clear()
    for name in device.VISIBLE:
        monkeypatch.delenv(name, raising=False)
    yield
    device._gpus_here.cache_clear()
    interfaces.source.cache_clear()


def torch_of(monkeypatch, folder, *lines):
    """An installed torch whose `version.py` has these lines."""
    (folder / "version.py").write_text("from typing import Optional\n" + "\n".join(lines), encoding="utf-8")
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(interfaces, "find_spec", lambda name: spec if name == "torch" else None)


CUDA = ("cuda: Optional[str] = '13.0'", "hip: Optional[str] = None")
ROCM = ("cuda: Optional[str] = None", "hip: Optional[str] = '7.1'")
CPU = ("cuda: Optional[str] = None", "hip: Optional[str] = None")


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Let the CUDA driver be a library of ours that has 3 GPUs, or fails to start."""

    def made(*, fails):
        if (compiler := shutil.which("cc")) is None:
            pytest.skip("needs a C compiler")
        source = tmp_path / "driver.c"
        source.write_text(LIBRARY.replace("FAILS", "999" if fails else "0"), encoding="utf-8")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        monkeypatch.setattr(device, "_NVIDIA", (str(tmp_path),))

    return made


@pytest.mark.parametrize(("fails", "count"), [(False, 3), (True, 0)])
def test_the_cuda_driver_is_asked_and_not_a_program(monkeypatch, tmp_path, driver, fails, count):
    driver(fails=fails)
    torch_of(monkeypatch, tmp_path, *CUDA)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))  # without nvidia-smi, as in many containers
    assert (device.gpus(), device.has_gpu()) == (count, count > 0)


def test_a_torch_for_cpus_uses_no_gpu_that_is_there(monkeypatch, tmp_path, driver):
    driver(fails=False)
    torch_of(monkeypatch, tmp_path, *CPU)
    assert device.gpus() == 0


def test_without_a_driver_or_its_library_there_is_no_gpu(monkeypatch, tmp_path):
    torch_of(monkeypatch, tmp_path, *CUDA)
    monkeypatch.setattr(device, "_NVIDIA", ())
    assert device.gpus() == 0
    device._gpus_here.cache_clear()
    monkeypatch.setattr(device, "_NVIDIA", (str(tmp_path),))
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    assert device.gpus() == 0


@pytest.mark.parametrize(
    ("environment", "count"), [({}, 2), ({"HIP_VISIBLE_DEVICES": "1"}, 1), ({"CUDA_VISIBLE_DEVICES": ""}, 0)]
)
def test_amd_gpus_are_those_of_the_driver_that_are_not_hidden(monkeypatch, tmp_path, environment, count):
    torch_of(monkeypatch, tmp_path, *ROCM)
    for name, text in NODES.items():
        (tmp_path / "nodes" / name).mkdir(parents=True)
        (tmp_path / "nodes" / name / "properties").write_text(text, encoding="utf-8")
    monkeypatch.setattr(device, "_NODES", tmp_path / "nodes")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert device.gpus() == count
