"""Every setting of the YAML is checked against the installed libraries, and none of them is imported."""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

from pipeline.config.library_names import MANAGED, MOVED
from pipeline.config.settings import _hidden, problem, settings
from pipeline.errors import ConfigError

SFT = "trl.trainer.sft_config:SFTConfig"
DPO = "trl.trainer.dpo_config:DPOConfig"
KTO = "trl.trainer.kto_config:KTOConfig"
REWARD = "trl.trainer.reward_config:RewardConfig"
LORA = "peft.tuners.lora.config:LoraConfig"
GPTQ = "gptqmodel.quantization.config:GPTQConfig"
REFERENCES = {reference.partition(":")[2]: reference for reference in (SFT, DPO, KTO, REWARD, LORA, GPTQ)}
FOLDER = "is set by the pipeline (every stage writes into its own folder); remove it"


def isolated(code, **env):
    """What a fresh interpreter prints."""
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    return subprocess.run(run, check=True, capture_output=True, text=True, env={**os.environ, **env}).stdout


@pytest.mark.parametrize(
    ("reference", "name", "value", "expected"),
    [
        (SFT, "lerning_rate", 1e-5, "SFTConfig has no setting `lerning_rate`; did you mean `learning_rate`?"),
        (SFT, "zzzzzz", 1, "SFTConfig has no setting `zzzzzz`"),
        (LORA, "loraalpha", 1, "LoraConfig has no setting `loraalpha`; did you mean `lora_alpha`?"),
        (
            SFT,
            "max_seq_length",
            512,
            "`max_seq_length` is not a setting of SFTConfig; it is now `max_length`",
        ),
        (
            SFT,
            "lora_rank",
            8,
            "`lora_rank` is not a setting of SFTConfig; it is now `lora: {r: …}`",
        ),
        (DPO, "pref_beta", 0.1, "`pref_beta` is not a setting of DPOConfig; it is now `beta`"),
        (LORA, "rank", 8, "`rank` is not a setting of LoraConfig; it is now `r`"),
        (GPTQ, "wbits", 4, "`wbits` is not a setting of GPTQConfig; it is now `bits`"),
    ],
)
def test_a_wrong_name(reference, name, value, expected):
    assert problem(reference, name, value) == expected


@pytest.mark.parametrize(
    ("reference", "name", "value", "expected"),
    [
        (SFT, "learning_rate", "fast", "`learning_rate` is `fast`; SFTConfig wants a number (float)"),
        (SFT, "learning_rate", None, "`learning_rate` is `null`; SFTConfig wants a number (float)"),
        (SFT, "learning_rate", True, "`learning_rate` is `true`; SFTConfig wants a number (float)"),
        (SFT, "max_steps", 10.0, "`max_steps` is `10.0`; SFTConfig wants a whole number (int)"),
        (SFT, "bf16", "yes", "`bf16` is `yes`; SFTConfig wants true or false"),
        (SFT, "packing", 1, "`packing` is `1`; SFTConfig wants true or false"),
        (SFT, "run_name", 7, "`run_name` is `7`; SFTConfig wants text (str)"),
        (SFT, "run_name", {"a": None}, '`run_name` is `{"a": null}`; SFTConfig wants text (str)'),
        (SFT, "max_length", "", '`max_length` is `""`; SFTConfig wants a whole number (int)'),
        (
            SFT,
            "max_length",
            "x" * 70,
            f"`max_length` is `{'x' * 59}…`; SFTConfig wants a whole number (int)",
        ),
        (
            SFT,
            "model_init_kwargs",
            ["dtype"],
            '`model_init_kwargs` is `["dtype"]`; SFTConfig wants a mapping or text (str)',
        ),
        (
            DPO,
            "loss_weights",
            1.0,
            "`loss_weights` is `1.0`; DPOConfig wants a list, each item a number (float)",
        ),
        (DPO, "loss_type", 3, "`loss_type` is `3`; DPOConfig wants a list, each item text (str)"),
        (
            LORA,
            "target_modules",
            ["q", 1],
            '`target_modules` is `["q", 1]`; LoraConfig wants text (str) or a list, each item text (str)',
        ),
        (
            LORA,
            "modules_to_save",
            "lm_head",
            "`modules_to_save` is `lm_head`; LoraConfig wants a list, each item text (str)",
        ),
        (LORA, "bias", 0, "`bias` is `0`; LoraConfig wants `none` or `all` or `lora_only`"),
        (
            GPTQ,
            "group_size",
            "128",
            '`group_size` is `"128"`; GPTQConfig wants a whole number (int); remove the quotes',
        ),
        (
            SFT,
            "learning_rate",
            "2e-4",
            '`learning_rate` is `"2e-4"`; SFTConfig wants a number (float); remove the quotes',
        ),
        (SFT, "bf16", "true", '`bf16` is `"true"`; SFTConfig wants true or false; remove the quotes'),
        (GPTQ, "damp_percent", "auto", "`damp_percent` is `auto`; GPTQConfig wants a number (float)"),
    ],
)
def test_a_wrong_type(reference, name, value, expected):
    assert problem(reference, name, value) == expected


@pytest.mark.parametrize(
    ("reference", "name", "value", "expected"),
    [
        (
            DPO,
            "loss_type",
            "sigmiod",
            "`loss_type` has no choice `sigmiod` of DPOConfig; did you mean `sigmoid`?",
        ),
        (
            DPO,
            "loss_type",
            ["sft", "hing"],
            "`loss_type` has no choice `hing` of DPOConfig; did you mean `hinge`?",
        ),
        (
            SFT,
            "loss_type",
            "ce",
            "`loss_type` has no choice `ce` of SFTConfig; there is `chunked_nll`, `dft`, `nll`",
        ),
        (
            SFT,
            "lr_scheduler_type",
            "cosin",
            "`lr_scheduler_type` has no choice `cosin` of SFTConfig; did you mean `cosine`?",
        ),
        (
            SFT,
            "save_strategy",
            "never",
            "`save_strategy` has no choice `never` of SFTConfig; there is `best`, `epoch`, `no`, `steps`",
        ),
        (
            SFT,
            "optim",
            "adamw_torch_fusd",
            "`optim` has no choice `adamw_torch_fusd` of SFTConfig; did you mean `adamw_torch_fused`?",
        ),
        (
            SFT,
            "report_to",
            ["tensorbord"],
            "`report_to` has no choice `tensorbord` of SFTConfig; did you mean `tensorboard`?",
        ),
        (
            LORA,
            "init_lora_weights",
            "pisa",
            "`init_lora_weights` has no choice `pisa` of LoraConfig; did you mean `pissa`?",
        ),
        (
            GPTQ,
            "bits",
            9,
            "`bits` has no choice `9` of GPTQConfig; there is `2`, `3`, `4`, `5`, `6`, `7`, `8`",
        ),
        (
            GPTQ,
            "rotation",
            "spin",
            "`rotation` has no choice `spin` of GPTQConfig; there is `hadamard`, `random`",
        ),
        (
            GPTQ,
            "gc_mode",
            "always",
            "`gc_mode` has no choice `always` of GPTQConfig; there is `interval`, `on_stage_end`",
        ),
    ],
)
def test_a_wrong_choice(reference, name, value, expected):
    assert problem(reference, name, value) == expected


@pytest.mark.parametrize(
    ("reference", "name", "value", "expected"),
    [
        (SFT, "output_dir", "saves", f"`output_dir` {FOLDER}"),
        (
            DPO,
            "hub_token",
            "secret",
            "`hub_token` has no place in a file (tokens come from the environment only); remove it",
        ),
        (
            SFT,
            "deepspeed",
            "zero3.json",
            "`deepspeed` is set by the pipeline (from `launch: {processes: N, strategy: zero2}`, or `zero3`); "
            "remove it",
        ),
        (SFT, "logging_dir", "logs", f"`logging_dir` {FOLDER}"),
        (
            LORA,
            "peft_type",
            "LORA",
            "`peft_type` is set by the pipeline (`lora:` trains LoRA, always); remove it",
        ),
        (GPTQ, "offload_to_disk_path", "/tmp", f"`offload_to_disk_path` {FOLDER}"),
        (GPTQ, "format", "marlin", "`format` is `marlin`; quantize writes the `gptq` format only"),
        (GPTQ, "method", "awq", "`method` is `awq`; quantize writes the `gptq` format only"),
    ],
)
def test_what_is_not_the_users(reference, name, value, expected):
    assert problem(reference, name, value) == expected


@pytest.mark.parametrize(
    ("reference", "name", "value"),
    [
        (SFT, "learning_rate", 1),
        (SFT, "warmup_steps", 0.03),
        (SFT, "max_length", None),
        (SFT, "lr_scheduler_type", "cosine_with_min_lr"),
        (SFT, "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        (SFT, "report_to", "none"),
        (SFT, "report_to", ["tensorboard", "wandb"]),
        (SFT, "log_level", "passive"),
        (SFT, "use_liger_kernel", True),
        (SFT, "gradient_checkpointing", False),
        (SFT, "loss_type", "dft"),
        (SFT, "pad_to_multiple_of", 8),
        (SFT, "debug", "underflow_overflow"),
        (DPO, "loss_type", "ipo"),
        (DPO, "loss_type", ["sigmoid", "bco_pair", "sft"]),
        (DPO, "f_divergence_type", "js_divergence"),
        (LORA, "target_modules", "all-linear"),
        (LORA, "target_modules", ["q_proj", "v_proj"]),
        (LORA, "init_lora_weights", False),
        (LORA, "init_lora_weights", "pissa_niter_16"),
        (LORA, "layers_to_transform", [0, 1]),
        (LORA, "layer_replication", [[0, 4], [2, 5]]),
        (LORA, "loftq_config", {"loftq_bits": 4}),
        (GPTQ, "bits", 4),
        (GPTQ, "dynamic", {"-:.*down": {}}),
        (GPTQ, "format", "gptq"),
        (GPTQ, "method", "gptq"),
        (GPTQ, "rotation", None),
        (GPTQ, "offload_to_disk", False),
        (GPTQ, "pack_dtype", "int32"),
    ],
)
def test_what_the_library_takes(reference, name, value):
    assert problem(reference, name, value) is None


def test_the_choices_that_stand_in_code_are_still_found():
    """After an upgrade: a smaller set means that a pattern in HIDDEN no longer fits."""
    losses = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
    losses += "discopop sft sigmoid_norm"
    assert set(_hidden("DPOConfig", "loss_type")) == set(losses.split())
    divergences = "reverse_kl forward_kl js_divergence alpha_divergence"
    assert set(_hidden("DPOConfig", "f_divergence_type")) == set(divergences.split())
    levels = "detail debug info warning error critical passive"
    assert set(_hidden("SFTConfig", "log_level")) == set(levels.split())
    assert {"all", "none", "tensorboard", "wandb", "swanlab"} <= set(_hidden("SFTConfig", "report_to"))
    assert set(settings(SFT)["loss_type"].choices) == {"nll", "dft", "chunked_nll"}
    assert set(settings(SFT)["packing_strategy"].choices) == {"bfd", "bfd_split", "wrapped"}
    assert set(settings(DPO)["truncation_mode"].choices) == {"keep_start", "keep_end"}


@pytest.mark.parametrize("owner", sorted(REFERENCES))
def test_moved_names_are_gone_and_lead_somewhere(owner):
    known, lora = settings(REFERENCES[owner]), settings(LORA)
    assert not MOVED[owner].keys() & (known.keys() | MANAGED[owner].keys())
    for advice in MOVED[owner].values():
        if inner := re.match(r"`lora: \{(\w+):", advice):
            assert inner[1] in lora
        elif target := re.match(r"`(\w+)(`$|:|` \()", advice):
            assert target[1] in known


def test_a_setting_as_it_is_written():
    rank = settings(LORA)["r"]
    assert (rank.name, rank.annotation, rank.default) == ("r", "int", "8")
    assert settings(DPO)["learning_rate"].default == "1e-06"
    assert settings(SFT)["learning_rate"].default == "2e-05"
    assert settings(DPO)["loss_type"].default == "lambda: ['sigmoid']"


BASE = '''
from enum import Enum
from outside import Elsewhere

class Colour(Enum):
    RED = 'r'

@dataclass
class Base(Elsewhere):
    """Words.

    Args:
        no: field
    """

    first: int = 1
    second: "str | None" = None
    dropped: int = 0

    def method(self):
        inside: int = 2

    late: Colour = Colour.RED
'''
TOP = """
from .. import Base as Parent

class Top(Parent):
    second: float = 2.0
    _hidden: int = 0
    shared: ClassVar[int] = 0
    dropped: int = field(init=False)
    made: list = field(default_factory=list)
"""


def test_inheritance_imports_and_what_is_no_setting(tmp_path, monkeypatch):
    package = tmp_path / "somelib"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from .base import (\n    Base,  # kept\n)\n")
    (package / "base.py").write_text(BASE)
    (package / "inner" / "__init__.py").write_text("raise AssertionError('imported')\n")
    (package / "inner" / "top.py").write_text(TOP)
    monkeypatch.syspath_prepend(tmp_path)
    found = settings("somelib.inner.top:Top")
    assert {name: (s.annotation, s.default) for name, s in found.items()} == {
        "first": ("int", "1"),
        "second": ("float", "2.0"),
        "late": ("Colour", "Colour.RED"),
        "made": ("list", "list"),
    }
    assert problem("somelib.base:Base", "second", 1) == "`second` is `1`; Base wants text (str)"
    assert problem("somelib.base:Base", "late", "g") == "`late` has no choice `g` of Base; there is `r`"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (
            "nolib.config:Some",
            "`nolib` is not installed, or has no `Some`; `pip install -e .` brings it",
        ),
        (
            "trl.trainer.sft_config:XConfig",
            "`trl` is not installed, or has no `XConfig`; `pip install -e .` brings it",
        ),
    ],
)
def test_a_library_that_is_not_there(reference, expected):
    with pytest.raises(ConfigError) as error:
        problem(reference, "a", 1)
    assert error.value.problems == [expected]


def test_no_library_is_imported():
    loaded = isolated(f"""
        import sys
        from pipeline.config.settings import problem
        for reference in {list(REFERENCES.values())!r}:
            problem(reference, "lr_scheduler_type", "cosin"), problem(reference, "loss_type", "x")
        heavy = ("torch", "transformers", "trl", "peft", "accelerate", "gptqmodel", "numpy")
        print([name for name in heavy if name in sys.modules])
    """)
    assert loaded == "[]\n"


@pytest.mark.train
def test_the_names_are_those_of_the_imported_classes():
    code = f"""
        import dataclasses, importlib, json
        found = {{}}
        for reference in {list(REFERENCES.values())!r}:
            module, name = reference.split(":")
            fields = dataclasses.fields(getattr(importlib.import_module(module), name))
            found[reference] = [field.name for field in fields if field.init]
        print("\\n" + json.dumps(found))
    """
    found = json.loads(isolated(code, GPTQMODEL_CPU_WORKERS="2", HF_HUB_OFFLINE="1").splitlines()[-1])
    assert {reference: set(settings(reference)) for reference in found} == {
        reference: set(names) for reference, names in found.items()
    }


@pytest.mark.parametrize("owner", sorted(REFERENCES))
def test_the_library_may_write_its_own_defaults(owner):
    reference = REFERENCES[owner]
    for setting in settings(reference).values():
        with contextlib.suppress(ValueError):  # a default made by code is not a value of YAML
            default = ast.literal_eval(setting.default)
            assert setting.name in MANAGED[owner] or problem(reference, setting.name, default) is None


ELSEWHERE = {
    "simpo": "SimPO has no reference model: TRL's CPOTrainer, which no stage runs; `sigmoid_norm` also goes by the "
    "mean of an answer's tokens",
    "orpo": "ORPO has no reference model: TRL's ORPOTrainer, which no stage runs; `[sigmoid, sft]` with "
    "`loss_weights` also trains on the chosen answer",
    "kto_pair": "the stage `kto` does that, with rows of `format: labelled`",
    "dpo": "it is `sigmoid`",
}


@pytest.mark.parametrize(("loss", "where"), ELSEWHERE.items())
def test_a_loss_of_another_trainer_is_sent_to_its_place(loss, where):
    told = f"`loss_type` has no choice `{loss}` of DPOConfig; {where}"
    assert problem(DPO, "loss_type", loss) == problem(DPO, "loss_type", [loss]) == told
