"""Models and tokenizers are refused when they are loaded, not in the middle of a stage."""

import json
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from stages.model.facts import read_facts
from stages.model.folder import carried_files, load_model, load_tokenizer
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train


def refusal(folder):
    with pytest.raises(StageError) as caught:
        load_tokenizer([str(folder)])
    return str(caught.value)


def test_the_tokenizer_is_that_of_the_last_folder_and_pads_on_the_right(tiny):
    loaded = load_tokenizer(["not a folder", str(tiny("llama"))])
    assert (loaded.padding_side, loaded.is_fast) == ("right", True)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tiny, adapt, tmp_path):
    base, adapter = tiny("llama"), shutil.copytree(adapt([tiny("llama")]), tmp_path / "adapter")
    carried = carried_files(base, adapter)
    assert {path.parent for path in carried} == {adapter}
    for path in carried:
        path.unlink()
    assert load_tokenizer([str(base), str(adapter)]).chat_template == load_tokenizer([str(base)]).chat_template
    assert carried_files(base, adapter) == carried_files(base)
    shutil.copy(base / "tokenizer.json", adapter)
    found = {path.name: path.parent for path in carried_files(base, adapter)}
    assert found == {"tokenizer.json": adapter, "generation_config.json": base}


def test_a_missing_pad_token_becomes_the_end_of_text(tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("pad_token", None)
    file.write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_tokenizer([str(folder)])
    assert loaded.pad_token == loaded.eos_token == "</s>"
    settings.pop("eos_token")
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert refusal(folder) == f"the tokenizer of `{folder}` has no eos_token; set it in its tokenizer_config.json"


@pytest.fixture
def loaded(tiny, monkeypatch):
    """Have transformers load a tokenizer that the test makes of the real one."""
    from transformers import AutoTokenizer

    real = load_tokenizer([str(tiny("llama"))])

    def replace(change):
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: change(real))

    return replace


def without(owner, *names):
    """An object with all attributes of another but these."""
    kept = {name: getattr(owner, name, None) for name in dir(owner) if name not in names and not name.startswith("__")}
    return type(type(owner).__name__, (SimpleNamespace,), {})(**kept)


def test_a_tokenizer_of_python_is_refused(loaded):
    loaded(lambda real: SimpleNamespace(is_fast=False))
    assert refusal("model") == "the tokenizer of `model` is not a fast one; save it with its tokenizer.json"


def test_another_transformers_without_the_tokenizer_inside_is_named(loaded):
    loaded(lambda real: without(real, "backend_tokenizer"))
    assert refusal("model") == (
        f"transformers {version('transformers')} has no `TokenizersBackend.backend_tokenizer`, which this stage needs; "
        "transformers 5.23.0 is known to work: `pip install transformers==5.23.0`"
    )


@pytest.mark.parametrize(
    "name", ["encode_batch_fast", "encode_special_tokens", "no_padding", "no_truncation", "to_str"]
)
def test_another_tokenizers_without_a_method_is_named(loaded, name):
    def change(real):
        return SimpleNamespace(is_fast=True, backend_tokenizer=without(real.backend_tokenizer, name))

    loaded(change)
    assert refusal("model") == (
        f"tokenizers {version('tokenizers')} has no `Tokenizer.{name}`, which this stage needs; "
        "tokenizers 0.23.3 is known to work: `pip install tokenizers==0.23.3`"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_that_lacks_weights_is_refused(tiny, adapt, tmp_path, tied):
    from safetensors.torch import load_file, save_file

    base = tiny("llama", tied=tied)
    folder = shutil.copytree(base, tmp_path / "torn")
    kept = {name: w for name, w in load_file(folder / "model.safetensors").items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for chain in ([str(folder)], [str(folder), str(adapt([base], target_modules=["q_proj"]))]):
        with pytest.raises(StageError) as caught:
            load_model(chain)
        names = ", ".join(f"`model.layers.1.mlp.{name}_proj.weight`" for name in ("down", "gate", "up"))
        assert str(caught.value) == (
            f"the model folder `{folder}` lacks weights, which would be random: {names}; fetch it again, or save the "
            "whole model again with `save_pretrained`"
        )


@pytest.mark.parametrize("architecture", ["llama", "bloom", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_one_weight_for_both_embeddings_is_whole(tiny, architecture, tied):
    model = load_model([str(tiny(architecture, tied=tied))])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_the_first_three_weights_that_are_lacking_are_named(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("bloom"), tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if ".h.1." not in name}, folder / "model.safetensors")
    lost = sorted(name for name in weights if ".h.1." in name)
    with pytest.raises(StageError) as caught:
        load_model([str(folder)])
    named = ", ".join(f"`{name}`" for name in lost[:3])
    assert f"random: {named} and {len(lost) - 3} more; fetch it again" in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}], ids=str)
def test_an_index_that_names_no_files_is_refused(tiny, tmp_path, content):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StageError) as caught:
        read_facts(folder)
    assert str(caught.value) == f"`{index}` names no weight files; fetch it again"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_in_place_of_a_file_of_the_model_is_refused(tiny, tmp_path, name):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n", encoding="utf-8"
    )
    with pytest.raises(StageError) as caught:
        read_facts(folder)
    assert str(caught.value) == (
        f"`{folder / name}` is a Git LFS pointer, not the file; run `git lfs pull` in its folder"
    )
