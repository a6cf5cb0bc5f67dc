"""A run that was stopped and goes on is the run that never stopped: the same bytes and the same logged figures.

For each kind of run there is a trial that is stopped at every step it can be stopped at, and one for each of these
steps that is stopped there alone. Of the latter, `make test` tries one for each kind of run, the next step for the next
kind; `make faults` tries all. A trial proves that its stops came.
"""

import gc
import hashlib
import json

import pytest
from planned import sample

from stages import dpo, init, pt, sft
from stages.chat.template import template_text
from stages.data.source import Source
from stages.model.inputs import Inputs
from stages.runtime.errors import Interrupted
from stages.runtime.events import read_events
from stages.training.checkpoint import newest_whole
from stages.training.settings import inexact_resume

pytestmark = pytest.mark.train

QUESTIONS = ["感冒了怎么办？", "发烧", "头疼得厉害，还总是想吐，怎么办？", "咳嗽", "失眠", "胃疼应该吃什么？"]
ANSWERS = ["多休息，多喝水。", "量体温。", "去医院。", "少抽烟，多喝温水，少说话，按时睡觉。", "早睡。", "吃清淡的。"]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
LORA = {"r": 2, "lora_dropout": 0.2}
# Stage, rows, and what differs from LoRA over four steps of two rows, each of them logged.
RUNS = {
    "full fine-tuning": (sft, 4, {"lora": None}),
    "LoRA": (sft, 4, {"lora": {**LORA, "bias": "lora_only"}}),
    "attention dropout and noise": (
        sft,
        4,
        {"lora": None, "neftune_noise_alpha": 5, "model_init_kwargs": {"attention_dropout": 0.2}},
    ),
    "accumulation with a remainder": (
        sft,
        5,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5, "logging_steps": 2},
    ),
    "evaluation": (sft, 6, {"eval_size": 2, "eval_on_start": True, **EVALUATED}),
    "evaluation by epoch": (sft, 6, {"eval_size": 2, "eval_strategy": "epoch", "logging_strategy": "epoch"}),
    "the best at the end": (
        sft,
        6,
        {
            "eval_size": 2,
            **EVALUATED,
            **{"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.5},
        },
    ),
    "the best epoch at the end": (
        sft,
        6,
        {
            "eval_size": 2,
            "eval_strategy": "epoch",
            **{"save_strategy": "epoch", "load_best_model_at_end": True, "learning_rate": 0.5},
        },
    ),
    "stopped early": (
        sft,
        6,
        {
            "eval_size": 2,
            **EVALUATED,
            **{"save_strategy": "steps", "load_best_model_at_end": True, "early_stopping": 2, "max_steps": 8},
            **{"metric_for_best_model": "loss", "greater_is_better": True},  # so that the first is the best one
        },
    ),
    "stopped early after an epoch": (
        sft,
        6,
        {
            "eval_size": 2,
            "eval_strategy": "epoch",
            **{"save_strategy": "epoch", "load_best_model_at_end": True, "early_stopping": 1, "max_steps": 8},
            **{"metric_for_best_model": "loss", "greater_is_better": True},
        },
    ),
    "a rate that follows the loss": (
        sft,
        6,
        {
            "eval_size": 2,
            **EVALUATED,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            **{"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": True},
            **{"lr_scheduler_kwargs": {"patience": 0}, "learning_rate": 0.5},
        },
    ),
    "rows read by other processes": (
        sft,
        4,
        {"lora": LORA, "dataloader_num_workers": 2},
    ),
    "rows handed out by the first process": (
        sft,
        4,
        {"lora": LORA, "accelerator_config": {"dispatch_batches": True, "use_seedable_sampler": False}},
    ),
    "rows grouped by length": (sft, 6, {"seed": 1, "train_sampling_strategy": "group_by_length", "max_steps": 5}),
    "rows balanced by length": (sft, 4, {"train_sampling_strategy": "batch_rebalance"}),
    "packed conversations": (sft, 6, {"packing": True, "max_length": 128, "per_device_train_batch_size": 1}),
    "packed text": (pt, 6, {"max_length": 32, "logging_steps": 3}),
    "DPO": (dpo, 4, {"lora": LORA, "disable_dropout": False, "logging_steps": 3}),
    "DPO of the whole model": (dpo, 4, {"lora": None}),
    "DPO with a reference that moves": (dpo, 4, {"lora": None, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    "DPO with a reference computed ahead": (dpo, 4, {"precompute_ref_log_probs": True}),
    "QLoRA": (sft, 4, {"lora": LORA, "quantized_base": "nf4"}),
    "8-bit moments in pages": (sft, 4, {"lora": None, "optim": "paged_adamw_8bit"}),
    "without a best": (sft, 6, {"eval_size": 2, "lora": None}),
}
OF_STAGES = ("lora", "quantized_base", "eval_size", "seed", "early_stopping")  # all other settings are TRL's


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """A third of these short runs would go into looking for garbage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *args: 0)
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory, rows):
    """A model of one layer."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 400}
    init.run(
        init.Config(architecture="llama", data=[rows("alpaca", 40)], template=template_text("med"), **sizes),
        Inputs(),
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of different lengths for a stage, so that their order shows."""
    folder = tmp_path_factory.mktemp("rows")

    def source(stage, count):
        pairs = list(zip(QUESTIONS, ANSWERS, strict=True))[:count]
        if stage is pt:
            lines = [{"text": question + answer} for question, answer in pairs]
        elif stage is sft:
            lines = [{"prompt": question, "completion": answer} for question, answer in pairs]
        else:
            lines = [{"prompt": question, "chosen": answer, "rejected": "不知道。"} for question, answer in pairs]
        kinds = {pt: "text", sft: "prompt_completion", dpo: "preference"}
        path = folder / f"{kinds[stage]}-{count}.jsonl"
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return Source(path=str(path), format=kinds[stage])

    return source


@pytest.fixture(scope="module")
def go(small, data, train):
    """Start or go on with a run in `out`; `callback` may end it."""

    def run(name, out, callback=None, **trainer):
        stage, count, settings = RUNS[name]
        own = {key: settings[key] for key in OF_STAGES if key in settings}
        trainer = {"max_steps": 4, **{key: settings[key] for key in settings if key not in own}, **trainer}
        return train(stage, [small], data(stage, count), out=out, callback=callback, trainer=trainer, **own)

    return run


def result(done):
    """What must be the same: the weights, the metrics, and all that was logged but times."""
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in done.out.glob("*.safetensors")}
    assert weights
    log = [entry for entry in done.trainer.state.log_history if "train_runtime" not in entry]  # one a process
    return weights, done.metrics, [{key: entry[key] for key in entry if not is_time(key)} for entry in log]


def is_time(key):
    return key.endswith(("_runtime", "_per_second", "_time"))


EARLY = "stopped early"
EXACT = [name for name in RUNS if name != "without a best"]


@pytest.mark.parametrize("name", EXACT)
def test_a_stop_at_any_step_leaves_no_trace(go, tmp_path, at, stop, name):
    whole = result(go(name, folder(tmp_path, "whole")))
    steps, asked = whole[1]["steps"], RUNS[name][2].get("max_steps", 4)

    def stopped(out, step):
        with pytest.raises(Interrupted, match=rf"^stopped at step {step} of {asked}$"):
            go(name, out, at(step, "on_step_end", stop))
        assert newest_whole(out / "checkpoints")[0].name == f"checkpoint-{step}"
        assert not [event for event in read_events(out) if "train_runtime" in event]  # the summary of a whole run

    for step in sample(range(1, steps), EXACT.index(name)):
        once = folder(tmp_path, f"once-{step}")
        stopped(once, step)
        assert result(go(name, once)) == whole, f"after a stop at step {step}"
    always = folder(tmp_path, "always")
    for step in range(1, steps):
        stopped(always, step)
    assert result(go(name, always)) == whole, "after a stop at every step"


class Killed(Exception):
    """The process is gone, as after kill -9: nothing more is written."""


@pytest.mark.parametrize("name", ["full fine-tuning", "LoRA", "evaluation by epoch", "packed text", "DPO"])
def test_a_killed_run_goes_on_from_its_last_checkpoint_and_leaves_no_trace(go, tmp_path, at, name):
    def kill(model):
        raise Killed

    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = result(go(name, folder(tmp_path, "whole"), **saved))
    out = folder(tmp_path, "killed")
    with pytest.raises(Killed):
        go(name, out, at(3, "on_step_end", kill), **saved)
    assert newest_whole(out / "checkpoints")[0].name == "checkpoint-2"
    assert result(go(name, out, **saved)) == whole


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_save"])
@pytest.mark.parametrize(("name", "best", "last"), [(EARLY, 1, 3), (f"{EARLY} after an epoch", 2, 4)])
def test_nothing_is_added_after_a_run_that_has_stopped_early(go, tmp_path, at, stop, event, name, best, last):
    def kill(model):
        raise Killed

    whole = result(go(name, folder(tmp_path, "whole")))
    metrics = whole[1]
    assert (metrics["stopped_early"], metrics["best_step"], metrics["steps"]) == (True, best, last)
    assert result(go(name, folder(tmp_path, "asked"), at(last, event, stop))) == whole  # it was done
    out = folder(tmp_path, "killed")
    with pytest.raises(Killed):
        go(name, out, at(last, event, kill))
    assert result(go(name, out)) == whole


# What cannot be promised


BETWEEN = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
SAID = (
    "with `load_best_model_at_end`, a stop at an evaluation between two checkpoints leaves one more to choose the best "
    "from; set `eval_steps` to `save_steps`"
)


def test_a_stop_between_two_checkpoints_adds_a_candidate_for_the_best_and_the_user_is_told(go, tmp_path, at, stop):
    asked = {**BETWEEN, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    assert inexact_resume(sft.Config(model="m", data=[source()], trainer=asked)) == SAID
    whole = result(go("without a best", folder(tmp_path, "whole"), **asked))
    out = folder(tmp_path, "stopped")
    with pytest.raises(Interrupted):
        go("without a best", out, at(1, "on_step_end", stop), **asked)
    assert result(go("without a best", out, **asked))[0] != whole[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, None),
        ({"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}, None),
        ({"eval_strategy": "steps", "save_strategy": "best", "load_best_model_at_end": True}, None),
        ({**BETWEEN, "load_best_model_at_end": False}, None),
        ({**BETWEEN, "eval_steps": 2, "load_best_model_at_end": True}, None),
        ({"eval_strategy": "steps", "logging_steps": 5, "save_steps": 5, "load_best_model_at_end": True}, None),
        ({"eval_strategy": "steps", "eval_steps": 0.1, "load_best_model_at_end": True}, None),
        ({"eval_strategy": "steps", "eval_steps": 0.05, "load_best_model_at_end": True}, SAID),
        ({"eval_strategy": "steps", "load_best_model_at_end": True}, None),
        ({"eval_strategy": "epoch", "load_best_model_at_end": True}, None),
        ({"eval_strategy": "steps", "save_steps": 20, "load_best_model_at_end": True}, SAID),
        ({"train_sampling_strategy": "group_by_length"}, None),
        (
            {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
            "with `dataloader_persistent_workers`, dropout draws other numbers after a stop; remove it",
        ),
    ],
)
def test_what_is_not_exact_is_said(settings, said):
    assert inexact_resume(sft.Config(model="m", data=[source()], trainer=settings)) == said


def source():
    return Source(path="rows.jsonl", format="messages")


def folder(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name
