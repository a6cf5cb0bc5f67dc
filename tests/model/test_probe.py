"""Before an adapter is trained, a small layer of each kind shows that what will be trained can be folded."""

import re

import pytest

from stages import sft
from stages.model import probe
from stages.model.lora import Adapter
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

EVERYWHERE = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "lora_alpha": 3},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": False, "lora_dropout": 0.5},
    {"fan_in_fan_out": True},
    {"modules_to_save": ["lm_head"], "r": 300},
    {
        "rank_pattern": {"o_proj": 2, "c_proj": 3, "dense": 5},
        "alpha_pattern": {"q_proj": 5, "h.1.*": 3},
        "use_dora": True,
    },
]
Q = "`model.layers.0.self_attn.q_proj`, a Linear, cannot be folded into the base: "


@pytest.fixture(scope="module")
def model(tiny, foreign):
    def load(kind):
        return probe.skeleton(foreign(kind) if kind in ("gpt2", "qwen3_moe") else tiny(kind, tied=False))[0]

    return load


def check(model, **lora):
    from peft import LoraConfig

    probe.check_fold(
        type(model), model.config, LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **lora})
    )


@pytest.mark.parametrize("lora", EVERYWHERE, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_what_can_be_folded_is_let_through(model, kind, lora):
    check(model(kind), **lora)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
        ("llama", {"target_modules": r".*\.1\..*_proj"}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
        ("llama", {"trainable_token_indices": [1, 2]}),
        ("gpt2", {"target_modules": ["wte", "attn.c_proj", "c_attn"], "use_dora": True}),
        ("gpt2", {"lora_bias": True}),
        ("bloom", {"lora_bias": True}),
        ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}),
    ],
    ids=str,
)
def test_each_kind_of_layer_and_target(model, kind, lora):
    check(model(kind), **lora)


@pytest.mark.parametrize(
    ("kind", "lora", "told"),
    [
        (
            "llama",
            {"lora_bias": True},
            f"what these settings under `lora` train on {Q}the fold has no place for "
            "`base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias`; change them, or leave this layer out of "
            "the targets",
        ),
        (
            "qwen3_moe",
            {"target_modules": ["gate", "q_proj"]},
            "what these settings under `lora` train on `model.layers.0.mlp.gate`, a Qwen3MoeTopKRouter, cannot be "
            "folded into the base: of this kind of layer no adapter can; change them, or leave this layer out of the "
            "targets",
        ),
        (
            "llama",
            {"layer_replication": [[0, 2], [1, 2]]},
            "with `layer_replication` later stages could not fold the adapter into its base; remove it",
        ),
        (
            "llama",
            {"target_modules": ["nope"]},
            "PEFT refuses the settings under `lora`: Target modules {'nope'} not found in the base model. Please check "
            "the target modules and try again.",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_folded_is_refused(model, kind, lora, told):
    with pytest.raises(StageError) as caught:
        check(model(kind), **lora)
    assert str(caught.value) == told


def test_a_fold_that_is_not_what_peft_trains_is_noticed(model, monkeypatch):
    """DoRA on GPT-2's Conv1D was divided by the norm of the inputs, and not of the outputs."""

    def norm_of_inputs(self, name, weight, *, transposed):
        module = name.removesuffix(".weight")
        a, b = self.take(f"{module}.lora_A.weight"), self.take(f"{module}.lora_B.weight")
        if a is None:
            return weight
        folded = weight + self.scale(module) * (b @ a).T
        return folded * (self.take(f"{module}.lora_magnitude_vector") / folded.norm(dim=1)).unsqueeze(1)

    monkeypatch.setattr(Adapter, "fold", norm_of_inputs)
    with pytest.raises(StageError) as caught:
        check(model("gpt2"), use_dora=True, target_modules=["attn.c_proj"])
    assert re.fullmatch(
        r"what these settings under `lora` train on `transformer\.h\.0\.attn\.c_proj`, a Conv1D, cannot be folded into "
        r"the base: outputs differ by up to [0-9.]+ of [0-9.]+; change them, or leave this layer out of the targets",
        str(caught.value),
    )


def test_a_stage_does_not_train_what_could_not_be_folded(tiny, train, rows, monkeypatch):
    real, seen = Adapter.scale, []
    monkeypatch.setattr(Adapter, "scale", lambda self, module: 1.25 * real(self, module))
    asked = {"lora": {"r": 4, "target_modules": ["q_proj"]}}
    with pytest.raises(StageError) as caught:
        train(sft, [tiny("qwen3")], rows("alpaca", 4), callback=seen.append, **asked)
    assert str(caught.value).startswith(f"what these settings under `lora` train on {Q}outputs differ by up to ")
    assert seen == []
    monkeypatch.undo()
    assert train(sft, [tiny("qwen3")], rows("alpaca", 4), **asked).metrics["steps"] == 3
