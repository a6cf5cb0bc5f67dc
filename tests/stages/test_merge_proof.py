"""`merge` proves while it writes: a base is read once, and a weight that the disk changed is noticed."""

import builtins
import io
import shutil
from collections import Counter

import pytest

from stages import merge
from stages.model import shards
from stages.model.inputs import Inputs
from stages.model.lora import Adapter
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train
Q = "model.layers.0.self_attn.q_proj"


def merged(chain, out, **settings):
    return merge.run(merge.Config(model="chain", **settings), Inputs(model=list(map(str, chain))), out)


def test_with_the_proof_each_weight_of_the_base_is_read_and_folded_once(tiny, adapt, tmp_path, monkeypatch):
    base = tiny("llama", tied=False)
    chain = [base, adapt([base])]
    read, folded = Counter(), Counter()
    real_read, real_fold = shards.Weights.read, Adapter.fold

    def counting_read(self, name):
        read[name] += 1
        return real_read(self, name)

    def counting_fold(self, name, weight, **settings):
        folded[name] += 1
        return real_fold(self, name, weight, **settings)

    monkeypatch.setattr(shards.Weights, "read", counting_read)
    monkeypatch.setattr(Adapter, "fold", counting_fold)
    assert merged(chain, tmp_path)["layers"] == 14
    names = shards.Weights(base).entries.keys()
    assert read == dict.fromkeys(names, 1)
    assert folded == dict.fromkeys(names, 1)


class Faulty(io.BufferedWriter):
    """A disk that changes the last byte of the third weight."""

    writes = 0

    def write(self, data):
        self.writes += 1
        changed = bytearray(data)
        if self.writes == 4:  # the first one is the header
            changed[-1] ^= 1
        return super().write(changed)


def test_a_weight_that_is_written_wrong_is_noticed_and_named(tiny, adapt, tmp_path, monkeypatch):
    base = tiny("llama", tied=False)
    chain = [base, adapt([base], target_modules=["q_proj"])]
    third = sorted(shards.Weights(base).entries)[2]

    def opened(file, mode="r"):
        return Faulty(io.FileIO(file, "w")) if mode == "wb" else builtins.open(file, mode)

    monkeypatch.setattr(shards, "open", opened, raising=False)
    with pytest.raises(StageError) as caught:
        merged(chain, tmp_path)
    told = f"the merged model is not the chain: `{third}` is not the folded weight; please report this"
    assert str(caught.value) == told


def test_an_adapter_with_a_part_that_the_base_lacks_is_refused_for_that_reason(tiny, adapt, tmp_path):
    """Also where the outputs of the layer differ because of that part."""
    from safetensors.torch import load_file, save_file

    base = tiny("llama", tied=False)
    adapter = adapt([base], target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{Q}.lora_B.bias"
    tensors[key] = tensors[f"base_model.model.{Q}.lora_B.weight"][:, 0].clone()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(StageError) as caught:
        merged([base, adapter], tmp_path)
    assert str(caught.value) == (
        f"1 tensors of the adapter `{adapter}` have no place in the base (first `{key}`): it was trained on another "
        "model, or its kind cannot be folded"
    )


@pytest.mark.parametrize("verify", [True, False])
def test_the_number_of_threads_is_as_before(tiny, adapt, tmp_path, verify):
    import torch

    base, before = tiny("llama"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merged([base, adapt([base])], tmp_path, verify=verify)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("verify", [True, False])
def test_all_folded_weights_take_the_same_memory(tiny, adapt, tmp_path, monkeypatch, verify):
    """Memory for each weight of its own would stay with the process, and grow with the number of layers."""
    import torch
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tiny("llama", tied=False), tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").save_pretrained(base)
    chain, real, kept = [base, adapt([base], target_modules=["q_proj"])], shards.write, []

    def write(weights, change, *settings):
        def folded(name, weight):
            changed = change(name, weight)
            if "q_proj" in name:
                kept.append(changed)
            return changed

        return real(weights, folded, *settings)

    monkeypatch.setattr(shards, "write", write)
    (tmp_path / "out").mkdir()
    merged(chain, tmp_path / "out", verify=verify)
    assert [one.dtype for one in kept] == [torch.bfloat16] * 2
    assert kept[0].data_ptr() == kept[1].data_ptr()
