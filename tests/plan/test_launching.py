"""Launches that cannot work are refused before anything runs."""

import pytest
from planned import INIT

from pipeline.plan import launching

HINT = "write `ddp`, `zero2` or `zero3`"


def refused(*problems):
    """What a run of `validate` that found these problems comes to."""
    count = [f"{len(problems)} problems; nothing was run"] if len(problems) > 1 else []
    return 2, "\n".join([*(f"x.yaml:{problem}" for problem in problems), *count]) + "\n"


def stage(settings: str) -> str:
    return f"{INIT}  {settings}\n"


@pytest.mark.parametrize(
    ("settings", "gpus", "said"),
    [
        (
            "sft: {data: consult, launch: {processes: 2, strategy: fsdp2}}",
            0,
            "8:57: stage `sft`: `fsdp2` needs GPUs, and this machine has none (accelerate would use `ddp` without a "
            "word); write `ddp`, `zero2` or `zero3`",
        ),
        (
            "sft: {data: consult, launch: {processes: 2, strategy: zero3, offload: parameters}}",
            0,
            "8:73: stage `sft`: `offload` moves from the memory of a GPU to main memory, and this machine has no GPU; "
            "remove it",
        ),
        (
            "sft: {data: consult, launch: {processes: 3}}",
            0,
            "8:44: stage `sft`: 3 processes cannot share the 8 rows of a step equally "
            "(`per_device_train_batch_size: 8` × `gradient_accumulation_steps: 1`); "
            "write `per_device_train_batch_size: 6` or `9`, or `launch: "
            "{processes: 2}` or `4`",
        ),
        (
            "sft: {data: consult, launch: {processes: 4}, trainer: {per_device_train_batch_size: 3, "
            "gradient_accumulation_steps: 2}}",
            8,
            "8:87: stage `sft`: 4 processes cannot share the 6 rows of a step equally (`per_device_train_batch_size: 3`"
            " × `gradient_accumulation_steps: 2`); write `per_device_train_batch_size: 2` or `4`, or `launch: "
            "{processes: 3}` or `6`",
        ),
        (
            "sft: {data: consult, launch: {processes: 2}, trainer: {auto_find_batch_size: true}}",
            0,
            "8:80: stage `sft`: `auto_find_batch_size` would change the rows of a step, which several processes share; "
            "remove it and set `per_device_train_batch_size`",
        ),
        (
            "dpo: {data: prefer, launch: {processes: 2, strategy: zero3}, trainer: {sync_ref_model: true}}",
            0,
            "8:90: stage `dpo`: `sync_ref_model` needs the whole model in each process, which `zero3` divides; remove "
            "it, or set `strategy: ddp` or `zero2`",
        ),
        (
            "reward: {data: prefer, launch: {processes: 2, strategy: zero3}}",
            0,
            "8:59: stage `reward`: `reward` does not work with `strategy: zero3`; write `ddp` or `zero2`",
        ),
        (
            "sft: {data: consult, lora: {}, quantized_base: nf4, launch: {processes: 2, strategy: zero3}}",
            0,
            "8:88: stage `sft`: `zero3` divides weights, and those of `quantized_base` cannot be divided; write `ddp` "
            "or `zero2`",
        ),
    ],
)
def test_a_launch_that_cannot_work_is_refused(project, monkeypatch, settings, gpus, said):
    monkeypatch.setattr(launching, "gpus", lambda: gpus)
    monkeypatch.setattr(launching, "find_spec", lambda name: name)
    assert project.validate(stage(settings)) == refused(said)


def test_a_missing_deepspeed_is_named_with_the_line_that_installs_it(project, monkeypatch):
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    text = f"launch: {{processes: 2, strategy: zero3}}\n{stage('sft: {data: consult}')}"
    assert project.validate(text) == refused(
        "1:34: stage `sft`: `zero3` needs DeepSpeed, which is not installed; "
        "`DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`"
    )


@pytest.mark.parametrize(
    "settings",
    [
        "sft: {data: consult, launch: {processes: 2, strategy: zero3}}",
        "sft: {data: consult, launch: {processes: 8, strategy: zero2}}",
        "reward: {data: prefer, launch: {processes: 2, strategy: zero2}}",
        "dpo: {data: prefer, launch: {processes: 2}, trainer: {sync_ref_model: true}}",
    ],
)
def test_launches_that_work_on_a_cpu_are_let_through(project, monkeypatch, settings):
    monkeypatch.setattr(launching, "gpus", lambda: 0)
    monkeypatch.setattr(launching, "find_spec", lambda name: name)
    assert project.validate(stage(settings))[0] == 0


def test_a_process_of_kto_gets_two_rows_at_least(project):
    """TRL refuses a batch of one row when the stage starts."""
    project.write("marked.jsonl", '{"prompt": "a", "completion": "b", "label": true}\n')
    data = "data: {marked: {path: marked.jsonl, format: labelled}, consult: {path: consult.jsonl, format: alpaca}}\n"
    kto = "  kto: {data: marked, launch: {processes: 4}, trainer: {per_device_train_batch_size: SIZE}}\n"
    init = (
        "  init: {architecture: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, data: consult}\n"
    )
    text = f"template: med\n{data}stages:\n{init}{kto}"
    code, said = project.validate(text.replace("SIZE", "4"))
    assert (code, said) == (
        2,
        "x.yaml:5:86: stage `kto`: each of 4 processes would get 1 row of a batch, and `kto` needs 2; write "
        "`per_device_train_batch_size: 8`\n",
    )
    assert project.validate(text.replace("SIZE", "8"))[0] == 0
