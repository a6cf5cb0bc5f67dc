"""Reward models on a tiny model: what was trained is what `select` scores with, to the last token."""

import json
import math
import shutil
from pathlib import Path

import pytest
from planned import TOP, sample

from pipeline import cli
from pipeline.saves import artifact
from stages import reward, select, sft
from stages.chat.template import template_text
from stages.data.source import Source, rows_of
from stages.measuring.scores import rewards
from stages.model.facts import Facts, read_facts
from stages.model.folder import load_model, load_tokenizer
from stages.model.inputs import Inputs
from stages.runtime.errors import Interrupted, StageError
from stages.training.settings import inexact_resume

DATA = Path(__file__).parents[2] / "data"
WAYS = pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["LoRA", "full"])
ONE = {"max_steps": 1, "per_device_train_batch_size": 4}
trains = pytest.mark.train


@pytest.fixture(scope="module")
def tuned(tiny, train, rows):
    """A base and an SFT adapter that changed it."""
    base = tiny("llama")
    return [base, train(sft, [base], rows("alpaca", 4), trainer={"max_steps": 6}).out]


@pytest.fixture(scope="module")
def scorer(tuned, train, rows):
    """A reward model on that chain."""
    return train(reward, tuned, rows("preference", 4), trainer=ONE)


def scored(folder, rows, out):
    """The scores that `select` gives rows with this scorer, and how many rows it did not see whole."""
    source = Source(path="none.jsonl", format="messages")
    config = select.Config(model="", data=[source], method="quality", above=0.0, scorer=str(folder))
    return rewards(config, Inputs(others={"scorer": str(folder)}), rows, out)


def both(pair):
    """The two conversations of a pair."""
    return [{"messages": pair["prompt"] + pair[answer]} for answer in ("chosen", "rejected")]


def final_logits(found):
    """A callback that notes the ids that were trained on and the model's logit for each, when training ends."""
    import torch
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_end(self, args, state, control, model, train_dataloader, **_):
            model.eval()
            for row in train_dataloader.dataset:
                for ids in (row["chosen_ids"], row["rejected_ids"]):
                    with torch.no_grad():
                        found.append((ids, float(model(input_ids=torch.tensor([ids])).logits)))

    return Callback()


def written(path, pairs):
    """Pairs of (question, better answer, worse answer) as a data set."""
    lines = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return Source(path=str(path), format="preference")


def settings(**more):
    return reward.Config(model="m", data=[Source(path="rows.jsonl", format="preference")], **more)


# What was trained is what scores


MORE = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- else -%}END {{ messages|length }}"
    "{%- endif -%}"
)


@trains
@WAYS
@pytest.mark.parametrize("template", ["med", "chatml", MORE], ids=["med", "chatml", "words after the end of turn"])
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_select_scores_a_row_as_the_trained_model_does(tiny, train, rows, tmp_path, architecture, template, lora):
    text, source, found = template if template is MORE else template_text(template), rows("preference", 4), []
    callback = final_logits(found)
    train(reward, [tiny(architecture)], source, out=tmp_path, lora=lora, template=text, callback=callback)
    talks = [talk for pair in rows_of(source) for talk in both(pair)]
    tokenizer = load_tokenizer([str(tmp_path)])
    assert [ids for ids, _ in found] == [tokenizer.apply_chat_template(talk["messages"])["input_ids"] for talk in talks]
    scores, cut = scored(tmp_path, talks, tmp_path)
    assert (scores, cut) == (pytest.approx([score for _, score in found], abs=1e-5), 0)
    assert len({round(score, 3) for score in scores}) > 4
    better, _ = scored(tmp_path, rows_of(source), tmp_path)  # of a pair the better answer
    assert better == pytest.approx(scores[::2], abs=1e-5)


@trains
def test_a_model_that_pads_with_its_end_of_text_token_scores_the_same(tiny, train, rows, tmp_path):
    folder, source, found = tmp_path / "base", rows("preference", 4), []
    shutil.copytree(tiny("llama"), folder)
    kept = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert kept.pop("pad_token") == "<pad>"
    (folder / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
    done = train(reward, [folder], source, lora=None, callback=final_logits(found))
    config = json.loads((done.out / "config.json").read_text(encoding="utf-8"))
    assert config["pad_token_id"] == load_tokenizer([str(folder)]).eos_token_id
    scores, _ = scored(done.out, [talk for pair in rows_of(source) for talk in both(pair)], tmp_path)
    assert scores == pytest.approx([score for _, score in found], abs=1e-5)


@trains
@WAYS
def test_the_folder_is_one_whole_scorer(tuned, train, rows, lora):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = train(reward, tuned, rows("preference", 4), lora=lora, trainer=ONE).out
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert [found for found in info.values() if found] == []
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (model.config.architectures, model.config.num_labels) == (["LlamaForSequenceClassification"], 1)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.chat_template == load_tokenizer([str(tuned[0])]).chat_template
    assert list(out.glob("adapter*")) == []
    least = reward.needs(settings(lora=lora), read_facts(tuned[0])).left
    width = 1 if lora is None else 2  # on a CPU an adapter is folded into 32 bits, and 16 are sure
    assert least <= (out / "model.safetensors").stat().st_size <= 1.1 * width * least
    assert select.check(select.Config(model="", data=[UNREAD], method="quality", above=0.0, scorer=str(out))) == []


UNREAD = Source(path="none.jsonl", format="messages")


@trains
def test_it_starts_from_the_chain_with_a_new_head_under_the_seed(tuned):
    tokenizer = load_tokenizer(list(map(str, tuned)))

    def made(seed):
        return reward.scorer(settings(seed=seed), Inputs(model=list(map(str, tuned))), tokenizer)

    model, same, other = made(1), made(1), made(2)
    start = load_model(list(map(str, tuned)))
    expected, found = start.base_model.state_dict(), model.base_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(bool((found[name] == expected[name]).all()) for name in expected)
    assert {*model.state_dict()} - {f"model.{name}" for name in expected} == {"score.weight"}
    assert float(model.score.weight.std()) == pytest.approx(model.config.initializer_range, rel=0.5)
    assert bool((model.score.weight == same.score.weight).all())
    assert not bool((model.score.weight == other.score.weight).any())


@trains
def test_the_head_is_trained_with_the_adapter(tuned, scorer):
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(list(map(str, tuned)))
    start = reward.scorer(settings(), Inputs(model=list(map(str, tuned))), tokenizer)
    end = AutoModelForSequenceClassification.from_pretrained(scorer.out)
    changed = {
        name.rpartition("layers.")[2]
        for (name, before), after in zip(start.named_parameters(), end.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    layer = {f"0.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert {"score.weight", *layer} <= changed
    assert "model.embed_tokens.weight" not in changed


@trains
@pytest.mark.parametrize("more", [{"use_rslora": True}, {"use_dora": True}, {"bias": "all"}, {"lora_bias": True}])
def test_every_kind_of_adapter_that_can_be_folded(tiny, train, rows, tmp_path, more):
    found, source = [], rows("preference", 4)
    train(reward, [tiny("bloom")], source, out=tmp_path, lora={"r": 4, **more}, callback=final_logits(found))
    scores, _ = scored(tmp_path, [talk for pair in rows_of(source) for talk in both(pair)], tmp_path)
    assert scores == pytest.approx([score for _, score in found], abs=1e-5)


# Training


@trains
def test_it_learns_which_answer_is_better(tuned, train, tmp_path):
    answers = [("多休息，多喝水。", "不知道。"), ("去看医生，按时吃药。", "随便。"), ("少抽烟，早睡觉。", "别问我。")]
    asked = ["感冒了怎么办？", "发烧呢？", "头疼得厉害怎么办？", "咳嗽了一周", "夜里睡不着", "胃疼"]
    pairs = written(tmp_path / "pairs.jsonl", [(question, *pair) for question in asked for pair in answers])
    others = [("膝盖疼怎么办？", *answers[0]), ("牙疼怎么办？", *answers[1]), ("便秘怎么办？", *answers[2])]
    held = written(tmp_path / "held.jsonl", others)
    asked = {"max_steps": 12, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 2}
    done = train(reward, tuned, pairs, eval_data=[held], trainer=asked)
    metrics = done.metrics
    assert metrics["loss_at_start"] == pytest.approx(math.log(2), abs=0.3)
    assert metrics["loss_first"] == pytest.approx(metrics["loss_at_start"], abs=1e-6)
    assert metrics["loss_last"] < 0.5 * metrics["loss_first"]
    assert metrics["eval_rewards/accuracies"] == 1
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    scores, _ = scored(done.out, [talk for pair in rows_of(held) for talk in both(pair)], tmp_path)
    margins = [better - worse for better, worse in zip(scores[::2], scores[1::2], strict=True)]
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / 3, abs=1e-5)  # of batches of two and of one
    before = f"{metrics['eval_rewards/accuracies_before']:.0%}"
    assert (
        reward.STAGE.headline(metrics) == f"held-out preference accuracy {before} → 100% of {metrics['held_out']} pairs"
    )
    assert {"held-out preference accuracy", "held-out reward margin"} <= {
        figure.name for figure in reward.STAGE.figures(metrics)
    }
    logged = done.trainer.state.log_history[-1]
    assert logged["eval_min_reward"] == pytest.approx(min(scores), abs=1e-5)
    assert logged["eval_max_reward"] == pytest.approx(max(scores), abs=1e-5)
    assert "eval_count" not in logged


def test_the_headline_without_held_out_rows():
    assert reward.headline({"loss_first": 0.7, "loss_last": 0.1}) == "loss 0.700 → 0.100"


def test_figures_are_those_of_all_pairs_and_not_of_batches():
    figures = {"accuracy": [1.0, 0.0], "margin": [2.0, -2.0], "mean_reward": [1.0, 3.0], "min_reward": [-1.0, -2.0]}
    figures |= {"max_reward": [4.0, 3.0], "num_tokens": [7]}
    figures |= {"reward/chosen": [4.0, 2.0, 1.0, 0.0], "reward/rejected": [1.0, -1.0, 1.0, 3.0]}
    reward.summarize(figures)
    assert figures == {
        **{"rewards/accuracies": [0.5], "rewards/margins": [0.75], "mean_reward": [1.375]},
        **{"min_reward": [-1.0], "max_reward": [4.0], "num_tokens": [7]},
    }
    reward.summarize(nothing := {})
    assert nothing == {}


@trains
def test_pairs_that_are_too_long_are_dropped_and_counted(tuned, train, tmp_path):
    long = "感冒了怎么办？" * 40
    rows = written(
        tmp_path / "pairs.jsonl", [("感冒？", "多休息。", "不。"), (long, "多休息。", "不。"), ("头疼？", long, "不。")]
    )
    held = written(tmp_path / "held.jsonl", [("失眠？", "早睡。", "不。"), (long[::-1], "早睡。", "不。")])
    rows = rows.model_copy(update={"max_dropped": 0.7})
    done = train(reward, tuned, rows, eval_data=[held], trainer={**ONE, "max_length": 80})
    assert (done.metrics["rows"], done.metrics["dropped"], done.metrics["truncated"]) == (3, 2, 0)
    assert (len(done.trainer.train_dataset), len(done.trainer.eval_dataset)) == (1, 1)
    with pytest.raises(StageError) as caught:
        train(reward, tuned, rows, trainer={**ONE, "max_length": 8})
    assert str(caught.value) == "all 3 rows are longer than `max_length` 8; raise it"
    config = reward.Config(model="m", data=[rows], trainer={"max_length": 8})
    with pytest.raises(StageError, match=r"^all 3 rows are longer than `max_length` 8; raise it$"):
        reward.STAGE.rehearse(config, Inputs(model=[str(tuned[0])]), tmp_path)


@trains
def test_the_best_model_by_the_held_out_accuracy(tuned, train, rows):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    asked = {"max_steps": 3, **best, "load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies"}
    done = train(reward, tuned, rows("preference", 8), eval_size=4, early_stopping=3, trainer=asked)
    assert done.metrics["best_step"] in (1, 2, 3)
    assert done.metrics["stopped_early"] in (True, False)


# Going on


RUNS = {
    "LoRA": {"lora": {"r": 2, "lora_dropout": 0.2}, "disable_dropout": False, "logging_steps": 3},
    "the whole model, evaluated": {"lora": None, "eval_size": 2, "eval_strategy": "steps", "eval_steps": 1},
}


@trains
@pytest.mark.parametrize("name", RUNS)
def test_a_stop_leaves_no_trace(tiny, train, rows, tmp_path, at, stop, name):
    given = dict(RUNS[name])
    own = {key: given.pop(key) for key in ("lora", "eval_size") if key in given}
    asked = {"max_steps": 5, **given}
    assert inexact_resume(settings(trainer=asked, **own)) is None

    def go(out, callback=None):
        (tmp_path / out).mkdir(exist_ok=True)
        return train(
            reward, [tiny("llama")], rows("preference", 5), out=tmp_path / out, callback=callback, trainer=asked, **own
        )

    def result(done):
        files = {path.name: path.read_bytes() for path in done.out.iterdir() if path.name in LEFT}
        assert files.keys() == LEFT
        times = ("_runtime", "_per_second", "_time")
        log = [
            {key: value for key, value in entry.items() if not key.endswith(times)}
            for entry in done.trainer.state.log_history
            if "train_runtime" not in entry
        ]
        return files, done.metrics, log

    whole = result(go("whole"))
    for steps in ([2, 3], *sample(([1], [4]), list(RUNS).index(name))):
        out = f"stopped-{steps}"
        for step in steps:
            with pytest.raises(Interrupted, match=rf"^stopped at step {step} of 5$"):
                go(out, at(step, "on_step_end", stop))
        assert result(go(out)) == whole, steps


LEFT = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


# What is known before the first stage starts


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            "reward: {data: prefer, trainer: {train_sampling_strategy: group_by_length}}",
            [
                "8:61: stage `reward`: `group_by_length` goes by the length of a row, which TRL does not know of "
                "pairs; leave it out, or write `sequential` to keep the order of the file"
            ],
        ),
        (
            "reward: {data: consult}",
            ["8:18: stage `reward`: `consult.jsonl` has format `alpaca`; this stage reads `preference`"],
        ),
        (
            "reward: {data: prefer, lora: {target_modules: [dense, lm_head], modules_to_save: [lm_head]}}",
            [
                "8:49: stage `reward`: `lm_head` matches no linear layer of the model that `init` makes; it has "
                "`dense`, `dense_4h_to_h`, `dense_h_to_4h`, `query_key_value`",
                "8:49: stage `reward`: a reward model has no `lm_head`, and its new head is always trained; leave it "
                "out",
                "8:84: stage `reward`: input and output embeddings of the model that `init` makes are one weight, and "
                "`lm_head` would train a copy; later stages could not fold the adapter into its base; remove it",
                "8:84: stage `reward`: a reward model has no `lm_head`, and its new head is always trained; leave it "
                "out",
            ],
        ),
        (
            "reward: {data: prefer, eval_data: prefer, trainer: {eval_strategy: steps, load_best_model_at_end: true, "
            "metric_for_best_model: accuracy}}",
            [
                "8:130: stage `reward`: `accuracy` is not measured here; there is `loss`, `max_reward`, `mean_reward`, "
                "`min_reward`, `rewards/accuracies`, `rewards/margins`"
            ],
        ),
        (
            "reward: {data: prefer, trainer: {chat_template_path: x, max_prompt_length: 3}}",
            [
                "8:56: stage `reward`: `chat_template_path` is set by the pipeline (from `template`, at the top of the "
                "file); remove it",
                "8:59: stage `reward`: `max_prompt_length` is not a setting of RewardConfig; it is now `max_length` "
                "(prompt and answer together)",
            ],
        ),
        (
            "reward: {data: prefer}\n  merge: {model: $reward}",
            ["9:18: stage `merge`: `reward` leaves a reward model, not a model; name another"],
        ),
        (
            "dpo: {data: prefer}\n  select: {data: consult, method: quality, above: 0.0, scorer: $dpo}",
            [
                "9:64: stage `select`: `dpo` leaves a model, not a reward model; name a stage that trains one, or a "
                "folder"
            ],
        ),
    ],
)
def test_what_cannot_work_is_told_before_anything_runs(project, stage, said):
    code, shown = project.validate(TOP + f"stages:\n  init: {{architecture: bloom, data: books}}\n  {stage}\n")
    assert code == 2
    several = [f"{len(said)} problems; nothing was run"] if len(said) > 1 else []
    assert shown.splitlines() == [*(f"x.yaml:{text}" for text in said), *several]


def test_an_architecture_without_a_scorer_is_refused(project):
    assert {"llama", "bloom", "qwen2", "qwen3", "gpt2"} <= reward.classifiers()
    assert "mamba" not in reward.classifiers()
    code, shown = project.validate(project.model(model_type="mamba") + "  reward: {data: prefer}\n")
    assert (code, shown) == (
        2,
        "x.yaml:1:8: stage `reward`: transformers has no sequence classification for `mamba`, which a reward model "
        "is; start from another model\n",
    )


def test_what_it_takes_is_counted_without_the_old_head_and_with_the_whole_result():
    weights = {"model.layers.0.mlp.up_proj.weight": (100, 100), "lm_head.weight": (500, 100)}
    facts = Facts("m", {}, weights, stored=240_000)
    saved = {"save_strategy": "no"}
    whole, lora, large = (
        reward.needs(settings(trainer=saved, **more), facts) for more in ({}, {"lora": {"r": 1}}, {"lora": {"r": 99}})
    )
    assert (whole.memory, whole.disk, whole.left) == (4 * 40_000, 40_000, 40_000)
    assert (lora.disk, lora.left) == (20_000, 20_000)
    adapter = 4 * 99 * 200  # it lies there until it is folded in
    assert (large.disk, large.left) == (adapter, 20_000)
    assert reward.needs(settings(), Facts("m", {})).memory == 0


@pytest.mark.train
def test_an_interface_that_trl_no_longer_has_is_named(monkeypatch):
    from trl import RewardTrainer

    monkeypatch.delattr(RewardTrainer, "_prepare_dataset")
    with pytest.raises(StageError) as caught:
        reward._trainer_class()
    assert str(caught.value) == (
        "trl 1.16.0 has no `RewardTrainer._prepare_dataset`, which this stage needs; trl 1.16.0 is known to work: "
        "`pip install trl==1.16.0`"
    )


# A chain through the command line, with `kto` and a selection by the reward model


CONFIG = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 40}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 12}}
  prefer:  {{path: {data}/med_prefer.jsonl, format: preference, max_samples: 6}}
  votes:   {{path: votes.jsonl, format: labelled}}
stages:
  init: {{architecture: llama, hidden_size: 32, num_attention_heads: 2, vocab_size: 400, data: [books]}}
  kto:
    data: votes
    lora: {{r: 4}}
    trainer: &quick {{learning_rate: 1e-2, max_steps: 2, max_length: 1000, per_device_train_batch_size: 2,
                      gradient_checkpointing: false, logging_steps: 1}}
  merge:
  reward: {{data: prefer, lora: {{r: 4}}, eval_size: 2, trainer: *quick}}
  select: {{data: consult, method: quality, scorer: $reward, keep: 4}}
  sft: {{data: $select, lora: {{r: 4}}, trainer: *quick}}
"""


@trains
def test_a_chain_with_kto_and_a_reward_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [json.loads(line) for line in (DATA / "med_prefer.jsonl").read_text(encoding="utf-8").splitlines()[:4]]
    votes = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
        for pair in pairs
    ]
    Path("votes.jsonl").write_text("".join(json.dumps(vote, ensure_ascii=False) + "\n" for vote in votes))
    Path("x.yaml").write_text(CONFIG.format(data=DATA), encoding="utf-8")
    assert cli.main(["validate", "x.yaml"]) == 0
    assert "init → kto → merge → reward → select → sft" in capsys.readouterr().out
    assert cli.main(["run", "x.yaml", "--saves", "saves", "--json"]) == 0
    steps = {step["stage"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    folders = {name: Path(step["folder"]) for name, step in steps.items()}
    record = {name: artifact.read(folder) for name, folder in folders.items()}
    assert record["reward"]["inputs"]["model"] == record["merge"]["fingerprint"]
    assert record["select"]["recipe"]["scorer"] == record["reward"]["fingerprint"]
    assert record["select"]["stands_on"] == [folders["reward"].name]
    assert record["sft"]["model"] == [str(folders["merge"]), str(folders["sft"])]
    assert steps["kto"]["metrics"]["reward_at_start"] == 0
    assert steps["select"]["metrics"]["kept"] == 4
    kept = [json.loads(line) for line in (folders["select"] / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    source = Source(path=str(DATA / "med_qa.json"), format="alpaca", max_samples=12)
    expected, _ = scored(folders["reward"], rows_of(source), tmp_path)
    assert [row["quality"] for row in kept] == pytest.approx(expected, abs=1e-6)
    assert cli.main(["plan", "x.yaml", "--saves", "saves", "--set", "reward.seed=7", "--json"]) == 0
    states = {step["stage"]: step["state"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert [name for name, state in states.items() if state != "done"] == ["reward", "select", "sft"]
