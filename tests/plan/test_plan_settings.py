"""Settings that need more than this machine has, or that do less than they say: found while planning."""

import importlib.util
from pathlib import Path

import pytest
from planned import INIT, TOP

from pipeline.config.checker import load_config
from pipeline.plan import launching
from pipeline.plan.placing import build_plan
from stages.model import device
from stages.training import effects, packages, quantized_base


def refused(*problems):
    """What a run of `validate` that found these problems comes to."""
    count = [f"{len(problems)} problems; nothing was run"] if len(problems) > 1 else []
    return 2, "\n".join([*(f"x.yaml:{problem}" for problem in problems), *count]) + "\n"


# GPUs


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"{INIT}  sft: {{data: consult, launch: {{processes: 4}}}}\n", "8:44"),
        (f"launch: {{processes: 4}}\n{INIT}  sft: {{data: consult}}\n", "1:21"),
    ],
)
def test_more_processes_than_gpus_are_refused(project, monkeypatch, text, place):
    monkeypatch.setattr(launching, "gpus", lambda: 2)
    why = "`processes` is 4, one for each GPU, and this machine has 2 GPUs; write `launch: {processes: 2}`"
    assert project.validate(text) == refused(f"{place}: stage `sft`: {why}")


@pytest.mark.parametrize("there", [0, 4, 8])
def test_processes_without_a_gpu_or_with_enough_of_them_are_let_through(project, monkeypatch, there):
    monkeypatch.setattr(launching, "gpus", lambda: there)
    assert project.validate(f"{INIT}  sft: {{data: consult, launch: {{processes: 4}}}}\n")[0] == 0


# Packages and GPUs that a setting needs


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages are installed, and that there are GPUs."""
    real = importlib.util.find_spec

    def set_(*names, gpus=0):
        monkeypatch.setattr(packages, "find_spec", lambda name: name in names or (real(name) if name in KEPT else None))
        monkeypatch.setattr(device, "gpus", lambda: gpus)

    return set_


KEPT = ("torch", "transformers", "torchao")
NEEDED = {
    "optim: paged_adamw_32bit": "bitsandbytes",
    "optim: adamw_8bit": "bitsandbytes",
    "optim: lion_8bit": "bitsandbytes",
    "optim: ademamix": "bitsandbytes",
    "optim: rmsprop_bnb": "bitsandbytes",
    "optim: galore_adamw, optim_target_modules: all-linear": "galore-torch",
    "optim: apollo_adamw, optim_target_modules: all-linear": "apollo-torch",
    "optim: lomo": "lomo-optim",
    "optim: schedule_free_adamw": "schedulefree",
    "optim: grokadamw": "grokadamw",
    "optim: stable_adamw": "torch-optimi",
    "use_liger_kernel: true": "liger-kernel",
    "report_to: wandb": "wandb",
    "report_to: azure_ml": "azureml-core",
    "report_to: clearml": "clearml",
    "report_to: tensorboard": "tensorboard",
    "model_init_kwargs: {attn_implementation: flash_attention_2}": "flash-attn",
    "model_init_kwargs: {attn_implementation: kernels-community/flash-attn3}": "kernels",
    "model_init_kwargs: {use_kernels: true}": "kernels",
}


@pytest.mark.parametrize(("setting", "package"), NEEDED.items())
def test_a_package_that_is_missing_is_named_with_the_way_to_install_it(project, installed, setting, package):
    installed(gpus=1)
    code, told = project.validate(f"{INIT}  sft: {{data: consult, trainer: {{{setting}}}}}\n")
    assert (code, told.count("\n")) == (2, 1)
    assert told.endswith(f" needs a package; `pip install {package}`, or remove it\n")
    installed(package.replace("-", "_"), "optimi", "azureml", gpus=1)
    assert project.validate(f"{INIT}  sft: {{data: consult, trainer: {{{setting}}}}}\n")[0] == 0


@pytest.mark.train
def test_no_optimizer_of_transformers_is_missed():
    training_arguments = pytest.importorskip("transformers.training_args")
    names = {name.value for name in training_arguments.OptimizerNames}
    assert names == packages.optimizer_arguments().keys() | {"adamw_torch_npu_fused"}
    own = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    assert names - packages.optimizer_packages().keys() == own


GPU_ONLY = [
    ("8:41", "optim: adalomo", "adalomo", "remove it"),
    ("8:41", "optim: galore_adamw_8bit, optim_target_modules: all-linear", "galore_adamw_8bit", "remove it"),
    ("8:52", "use_liger_kernel: true", "use_liger_kernel", "remove it"),
    ("8:40", "fp16: true", "fp16", "write `bf16: true`, or remove it"),
    ("8:57", "activation_offloading: true", "activation_offloading", "remove it"),
    (
        "8:75",
        "model_init_kwargs: {attn_implementation: flash_attention_2}",
        "flash_attention_2",
        "remove it",
    ),
]


@pytest.mark.parametrize(("place", "setting", "word", "advice"), GPU_ONLY)
def test_what_has_no_cpu_version_is_refused_without_a_gpu(project, installed, place, setting, word, advice):
    there = ("lomo_optim", "galore_torch", "liger_kernel", "flash_attn")
    text = f"{INIT}  sft: {{data: consult, trainer: {{{setting}}}}}\n"
    installed(*there)
    why = f"`{word}` needs a GPU, and torch finds none here; {advice}"
    assert project.validate(text) == refused(f"{place}: stage `sft`: {why}")
    installed(*there, gpus=1)
    assert project.validate(text)[0] == 0


@pytest.mark.parametrize(("name", "method"), [("load_in_4bit", "nf4"), ("load_in_8bit", "int8")])
def test_a_quantized_base_is_a_setting_of_the_stage(project, name, method):
    _, told = project.validate(f"{INIT}  sft: {{data: consult, trainer: {{model_init_kwargs: {{{name}: true}}}}}}\n")
    why = f"the base is quantized before it is loaded; write `quantized_base: {method}` in the stage instead"
    assert told.endswith(f": stage `sft`: `{name}`: {why}\n")


ADAPTER, ON_Q = "lora: {r: 4}", "lora: {target_modules: [q_proj]}"
UNTRAINABLE = {
    "quantized_base: nf4": (
        "with `nf4` the weights of the model cannot be trained, only an adapter on them; add `lora: {r: 16}`, or "
        "remove it"
    ),
    "quantized_base: nf4, lora: {modules_to_save: [mlp]}": (
        "`mlp` would train whole layers, which `quantized_base` quantizes; write it in `target_modules`, or remove it"
    ),
    "quantized_base: nf4, lora: {init_lora_weights: orthogonal}": (
        "PEFT starts `orthogonal` from weights in floating point, and those of the base are quantized; remove it"
    ),
    "quantized_base: nf4, lora: {bias: all}": (
        "`all`: bitsandbytes rounds a bias to the dtype of its inputs, so small steps get lost; remove it"
    ),
    "quantized_base: int8, lora: {use_dora: true}": (
        "PEFT loses the scales of a layer in int8 with DoRA; write `quantized_base: nf4`, or remove it"
    ),
    f"quantized_base: nf4, {ADAPTER}, trainer: {{model_init_kwargs: {{dtype: float64}}}}": (
        "`float64`: bitsandbytes computes in float32, bfloat16 or float16; write one of these, or leave it out"
    ),
}


@pytest.mark.parametrize("settings", UNTRAINABLE)
def test_what_cannot_be_trained_on_a_quantized_base_is_told(project, settings):
    project.model(weights={f"model.layers.0.{name}.weight": [8, 8] for name in ("self_attn.q_proj", "mlp.up_proj")})
    code, told = project.validate(f"model: m\n{TOP}stages:\n  sft: {{data: consult, {settings}}}\n")
    assert (code, told.partition(": stage `sft`: ")[2]) == (2, f"{UNTRAINABLE[settings]}\n")


@pytest.mark.parametrize("stage", ["pt", "sft", "dpo", "kto", "reward"])
def test_every_stage_with_an_adapter_can_have_a_quantized_base(project, stage):
    project.model(weights={f"model.layers.0.{name}.weight": [8, 8] for name in ("self_attn.q_proj", "mlp.up_proj")})
    data = {"pt": "books", "sft": "consult", "kto": "prefer"}.get(stage, "prefer")
    settings = "quantized_base: nf4, lora: {r: 4, use_dora: true, modules_to_save: [lm_head]}"
    _, told = project.validate(f"model: m\n{TOP}stages:\n  {stage}: {{data: {data}, {settings}}}\n")
    assert "quantized" not in told
    assert "lora" not in told


def test_a_quantized_base_needs_a_package(project, monkeypatch):
    monkeypatch.setattr(quantized_base, "find_spec", lambda name: None)
    _, told = project.validate(f"{INIT}  sft: {{data: consult, quantized_base: nf4, {ADAPTER}}}\n")
    assert told.endswith(": stage `sft`: `nf4` needs a package; `pip install bitsandbytes`, or remove it\n")


def test_int8_on_a_gpu_is_not_quite_the_merged_model(project, monkeypatch):
    text = f"{INIT}  sft: {{data: consult, quantized_base: int8, {ADAPTER}}}\n"
    why = "on a GPU, LLM.int8 rounds the inputs of layers in training, which the folded and merged model does not"
    note = f"stage `sft`: `quantized_base: int8`: {why}"
    assert note not in notes(project, text)
    monkeypatch.setattr(device, "gpus", lambda: 1)
    assert note in notes(project, text)


def test_experts_are_not_quantized(project):
    project.model(model_type="qwen3_moe", num_experts=4, weights={"model.layers.0.self_attn.q_proj.weight": [8, 8]})
    _, told = project.validate(f"model: m\n{TOP}stages:\n  sft: {{data: consult, quantized_base: nf4, {ON_Q}}}\n")
    why = (
        "the experts of `m` are 3-D weights, which bitsandbytes leaves as they are, so it would save little; remove it"
    )
    assert told.endswith(f": stage `sft`: {why}\n")


# Settings without effect


WRONG = {
    "lr_scheduler_type: constant, lr_scheduler_kwargs: {num_cycles: 2}": (
        "`lr_scheduler_kwargs`: `constant` reads none; remove it, or name another `lr_scheduler_type`"
    ),
    "lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycle: 2}": (
        "`cosine` has no setting `num_cycle`; did you mean `num_cycles`?"
    ),
    "lr_scheduler_kwargs: {num_cycles: 2}": "`linear` has no setting `num_cycles`",
    "lr_scheduler_type: warmup_stable_decay": "`warmup_stable_decay` needs `lr_scheduler_kwargs: {num_decay_steps: …}`",
    "lr_scheduler_type: cosine_with_min_lr": (
        "`cosine_with_min_lr` needs one of `min_lr` and `min_lr_rate`, as `lr_scheduler_kwargs: {min_lr_rate: 0.1}`"
    ),
    "lr_scheduler_type: constant, warmup_steps: 10": (
        "`constant` has no warmup; remove it, or write `constant_with_warmup`"
    ),
    "optim: sgd, optim_args: x": "`x` is no list such as `rank=64,scale=0.5`",
    "optim: sgd, optim_args: 'momentun=0.9'": "`momentun` has no effect with `sgd`; did you mean `momentum`?",
    "optim: adamw_torch, optim_args: 'rank=8'": "`rank` has no effect with `adamw_torch`, which reads none",
    "optim: adamw_torch, optim_target_modules: all-linear": (
        "`optim_target_modules`: only GaLore and APOLLO read it; remove it, or write `optim: galore_adamw`"
    ),
}


@pytest.mark.parametrize(("setting", "why"), WRONG.items())
def test_settings_that_a_schedule_or_an_optimizer_does_not_read_are_refused(project, setting, why):
    code, told = project.validate(f"{INIT}  sft: {{data: consult, trainer: {{{setting}}}}}\n")
    assert (code, told.partition("stage `sft`: ")[2]) == (2, f"{why}\n")


def test_galore_needs_its_layers_and_cannot_accumulate_layer_by_layer(project, installed):
    installed("galore_torch")
    trainer = "{optim: galore_adamw_layerwise, gradient_accumulation_steps: 4}"
    _, told = project.validate(f"{INIT}  sft: {{data: consult, trainer: {trainer}}}\n")
    assert (
        "stage `sft`: `galore_adamw_layerwise` needs `optim_target_modules: all-linear`, or names of layers\n" in told
    )
    why = "`galore_adamw_layerwise` steps after each layer and cannot accumulate gradients; write 1"
    assert f"stage `sft`: {why}\n" in told


@pytest.mark.train
def test_the_schedules_that_ignore_settings_are_those_of_transformers():
    import torch
    from transformers import SchedulerType, get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    ignored = []
    for kind in SchedulerType:
        try:
            get_scheduler(kind, optimizer, 1, 2, {"nonsense": 1})
        except (TypeError, ValueError):
            continue
        ignored.append(kind.value)
    assert tuple(ignored) == effects.IGNORE_KWARGS


def notes(project, text):
    project.write("x.yaml", text)
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    assert planned.problems == []
    return planned.notes


IDLE = {
    "max_steps: 3, num_train_epochs: 2": (
        "`num_train_epochs` has no effect with `max_steps`, which says when training ends"
    ),
    "eval_steps: 5": "`eval_steps` has no effect without `eval_strategy: steps`",
    "save_strategy: epoch, save_steps: 5": "`save_steps` has no effect without `save_strategy: steps`",
    "metric_for_best_model: loss": "`metric_for_best_model` has no effect without `load_best_model_at_end: true`",
    "optim: paged_adamw_8bit": (
        "`paged_adamw_8bit` moves moments out of a full GPU; without a GPU the pages have no effect"
    ),
    "learning_rate: 100": (
        "`learning_rate` is 100; most runs take 1e-6 to 1e-3, and one so high makes the loss explode"
    ),
}


@pytest.mark.parametrize(("setting", "note"), IDLE.items())
def test_settings_that_others_leave_without_effect_are_noted(project, setting, note):
    text = f"{INIT}  sft: {{data: consult, trainer: {{{setting}}}}}\n"
    assert [found for found in notes(project, text) if "sft" in found] == [f"stage `sft`: {note}"]
    assert not [found for found in notes(project, f"{INIT}  sft: {{data: consult}}\n") if "sft" in found]


LORA = {
    "init_lora_weights: eva": (
        "`eva` needs a pass over the data, which no stage does, and would start as `true` does; remove it"
    ),
    "eva_config: {rho: 1.5}": "`eva_config` is read with `init_lora_weights: eva` only; remove it",
    "layers_pattern: layers, target_modules: [dense]": (
        "`layers_pattern` is read with `layers_to_transform` only; add that, or remove it"
    ),
    "rank_pattern: {q_proj: 4}": (
        "`q_proj`: it matches no linear layer of the model that `init` makes; there is `dense`, `dense_4h_to_h`, "
        "`dense_h_to_4h`, `query_key_value`"
    ),
    "alpha_pattern: {h.9.mlp.dense_h_to_4h: 4}": (
        "`h.9.mlp.dense_h_to_4h`: it matches no linear layer of the model that `init` makes; there is `dense`, "
        "`dense_4h_to_h`, `dense_h_to_4h`, `query_key_value`"
    ),
    "rank_pattern: {dense_h_to_4h: 4}, target_modules: [query_key_value]": (
        "`dense_h_to_4h`: its layers get no adapter; add them to `target_modules`, or remove it"
    ),
    "rank_pattern: {dense_4h_to_h: 4, h.0.mlp.dense_4h_to_h: 8, h.1.mlp.dense_4h_to_h: 8}": (
        "`h.0.mlp.dense_4h_to_h`: an earlier pattern matches its layers first, so it has no effect; put it first, or "
        "remove it"
    ),
}


@pytest.mark.parametrize(("setting", "why"), LORA.items())
def test_settings_of_an_adapter_without_effect_are_refused(project, setting, why):
    code, told = project.validate(f"{INIT}  pt: {{data: books, lora: {{{setting}}}}}\n")
    assert (code, told.splitlines()[0].partition("stage `pt`: ")[2]) == (2, why)


def test_patterns_that_match_are_let_through(project):
    lora = "{rank_pattern: {h.0.mlp.dense_4h_to_h: 8, dense_4h_to_h: 4}, alpha_pattern: {'h.*.query_key_value': 8}}"
    assert project.validate(f"{INIT}  pt: {{data: books, lora: {lora}}}\n")[0] == 0


# Positions


def test_more_tokens_than_positions_are_refused_or_noted(project):
    learned = {"model.layers.0.self_attn.q_proj.weight": [4, 4], "wpe.weight": [512, 4]}
    top = project.model("old", model_type="gpt2", n_positions=512, weights=learned)
    why = "`old` has 512 positions, and `max_length` is 1024; write 512"
    assert project.validate(top + "  pt: {data: books, trainer: {packing: false}}\n") == refused(
        f"8:21: stage `pt`: {why}"
    )
    assert project.validate(top + "  pt: {data: books, trainer: {packing: false, max_length: 512}}\n")[0] == 0
    top = project.model("new", max_position_embeddings=512)
    told = "stage `pt`: `max_length` 1024 is above the 512 positions that `new` was made for"
    assert told in notes(project, top + "  pt: {data: books, trainer: {packing: false}}\n")


# Held-out rows


def test_held_out_rows_that_are_too_few_are_noted(project):
    row = '{"instruction": "a", "output": "b"}\n'
    project.write("consult.jsonl", row * 50)
    note = "so their figures say little about new rows; raise `eval_size`, or add rows"
    for setting, few in [("eval_size: 0.1", "5 rows"), ("eval_size: 1", "1 row"), ("eval_size: 12", None)]:
        found = [text for text in notes(project, f"{INIT}  sft: {{data: consult, {setting}}}\n") if "held out" in text]
        assert found == ([f"stage `sft`: held out: {few}, {note}"] if few else [])
    pt = f"{INIT}  pt: {{data: books, eval_size: 0.1}}\n"
    assert f"stage `pt`: held out: fewer than 1,000 tokens, {note}" in notes(project, pt)
    project.write("books.jsonl", '{"text": "' + "a" * 20_000 + '"}\n')
    assert not [text for text in notes(project, pt) if "held out" in text]


# Quantization


GPTQ = {
    "gptq: {damp_percent: 1.5}": "`damp_percent` is 1.5; it is a share: above 0 and below 1",
    "gptq: {damp_auto_increment: -0.1}": "`damp_auto_increment` is -0.1; it must be 0 or more",
    "gptq: {act_group_aware: true, desc_act: true}": (
        "`act_group_aware` orders whole groups and cannot be used with `desc_act`; remove one of the two"
    ),
    "gptq: {act_group_aware: true}, group_size: -1": (
        "`act_group_aware` orders whole groups and cannot be used with `group_size: -1`; remove one of the two"
    ),
}


@pytest.mark.parametrize(("setting", "why"), GPTQ.items())
def test_what_gptqmodel_refuses_is_known_before_the_run(project, setting, why):
    project.write("consult.jsonl", '{"instruction": "a", "output": "b"}\n' * 20)
    code, told = project.validate(f"{INIT}  quantize: {{calibration: {{data: consult}}, {setting}}}\n")
    assert (code, told.partition("stage `quantize`: ")[2]) == (2, f"{why}\n")
