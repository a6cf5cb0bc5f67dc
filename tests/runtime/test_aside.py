"""Packages that no stage of a run needs are not found by the libraries that would import them."""

import importlib.util
import sys

import pytest

from stages.runtime import aside


@pytest.fixture
def modules(monkeypatch):
    """sys.modules without the packages, so that none of them counts as imported."""
    for name in (*aside.OPTIONAL, *aside.QUANTIZED):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv(aside.VARIABLE, raising=False)
    yield sys.modules
    aside.bring_back(*aside.OPTIONAL, *aside.QUANTIZED)


def test_a_package_that_no_stage_needs_is_not_found_until_it_is_brought_back(modules):
    aside.choose(["bitsandbytes"])
    aside.set_aside()
    assert [name for name in aside.OPTIONAL if name in modules] == ["torchao", "scipy"]
    assert importlib.util.find_spec("torchao") is None
    with pytest.raises(ModuleNotFoundError):
        import torchao  # noqa: F401
    aside.bring_back("torchao", "scipy")
    assert importlib.util.find_spec("torchao") is not None


def test_all_that_the_stages_need_is_kept_however_it_is_told(modules):
    """The runner hands out the packages of one stage after the other, once."""
    aside.choose(name for name in ("scipy", "torchao"))
    aside.set_aside()
    assert [name for name in aside.OPTIONAL if name in modules] == ["bitsandbytes"]


def test_a_package_that_is_imported_stays(modules, monkeypatch):
    monkeypatch.setitem(modules, "torchao", sys)
    aside.set_aside(["torchao"])
    aside.bring_back("torchao")
    assert modules["torchao"] is sys


@pytest.mark.parametrize(
    ("settings", "packages"),
    [
        ({}, set()),
        ({"quantized_base": "nf4", "lora": {}}, {"bitsandbytes"}),
        ({"trainer": {"optim": "adamw_torch"}}, set()),
        ({"trainer": {"optim": "paged_adamw_8bit"}}, {"bitsandbytes"}),
        ({"trainer": {"optim": "adamw_torch_8bit"}}, {"torchao"}),
    ],
)
def test_the_settings_say_which_packages_a_stage_needs(settings, packages):
    from stages import sft

    config = sft.Config.model_validate({"model": "x", "data": [{"path": "x.jsonl", "format": "alpaca"}], **settings})
    assert config.training().packages == packages
