"""The interfaces of GPTQModel: that they are there, what happens where one is not, and rounding on its grid."""

import shutil
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from stages.model import gptq
from stages.runtime.errors import StageError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the source of GPTQModel that is looked at in place of the installed one."""
    installed = Path(find_spec("gptqmodel").submodule_search_locations[0])
    for file in {file for file, _, _ in gptq.USED}:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(installed / file, tmp_path / file)
    spec = ModuleSpec("gptqmodel", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(gptq, "find_spec", lambda name: spec)
    return tmp_path


def test_the_installed_version_has_all_that_is_used(package):
    gptq.check_interfaces()


GRID = "quantization/quantizer.py"
CHANGES = {
    "GPTQModel.load.quantize_config": ("models/auto.py", "quantize_config: Optional", "config: Optional"),
    "BaseQModel.extract_layers_node": ("models/base.py", "def extract_layers_node", "def layers_nodes"),
    "BaseQModel.quantize.batch_size": ("models/base.py", "batch_size: int", "rows: int"),
    "BaseQModel.save.max_shard_size": ("models/base.py", "max_shard_size: Optional", "shard_size: Optional"),
    "gptqmodel/models/writer.py.QUANT_LOG_LOSS = 'loss'": ("models/writer.py", '"loss"', '"avg_loss"'),
    "Quantizer.find_params": (GRID, "def find_params", "def fit"),
    "Quantizer.find_params.weight": (GRID, "def find_params(self, x, weight", "def find_params(self, x, of"),
    "quantize.maxq": (GRID, "def quantize(x, scale, zero, maxq", "def quantize(x, scale, zero, most"),
}


@pytest.mark.parametrize("missing", CHANGES)
def test_an_interface_that_is_gone_is_named_with_the_version_that_works(package, missing):
    file, old, new = CHANGES[missing]
    text = (package / file).read_text(encoding="utf-8")
    assert old in text
    (package / file).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(StageError) as caught:
        gptq.check_interfaces()
    assert str(caught.value) == (
        f"gptqmodel {version('gptqmodel')} has no `{missing}`, which this stage needs; "
        "gptqmodel 7.6.0 is known to work: `pip install gptqmodel==7.6.0`"
    )


def test_a_file_that_is_gone_is_an_interface_that_is_gone(package):
    (package / "quantization/quantizer.py").unlink()
    with pytest.raises(StageError, match=r"has no `Quantizer\.configure`, which this stage needs"):
        gptq.check_interfaces()


def test_how_the_log_says_that_a_module_was_only_rounded():
    assert gptq._loss("0.0000279413") == 0.0000279413
    for text in ("fallback(rtn): 0.0016098", "rtn fallback", "999999999.0000000000", "unknown"):
        assert gptq._loss(text) is None


@pytest.mark.train
def test_rounding_is_to_the_nearest_of_the_grid(apart):
    cases = ({"sym": False}, 4), ({"sym": True}, 8), ({"sym": True}, -1), ({"sym": False, "bits": 2}, 5)
    settings = [{"bits": 4, "group_size": size, "meta": {}, **changes} for changes, size in cases]
    made = apart(near, settings)
    for chosen, (matrix, found) in zip(settings, made, strict=True):
        size = chosen["group_size"] if chosen["group_size"] > 0 else 12
        for row, rounded in zip(matrix, found, strict=True):
            for start in range(0, 12, size):  # the last group may be smaller
                group = row[start : start + size]
                assert rounded[start : start + size] == pytest.approx(grid(group, chosen), abs=1e-6)


def near(settings):
    import torch

    matrix = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    return [(matrix.tolist(), gptq.round_to_nearest(matrix, chosen).tolist()) for chosen in settings]


def grid(group, settings):
    """Rounding to nearest, one number after the other."""
    most = 2 ** settings["bits"] - 1
    low, high = min(*group, 0), max(*group, 0)
    if settings["sym"]:
        high = max(-low, high)
        low = -high if low < 0 else low
    step = (high - low) / most
    zero = (most + 1) // 2 if settings["sym"] else round(-low / step)
    return [step * (min(max(round(number / step) + zero, 0), most) - zero) for number in group]
