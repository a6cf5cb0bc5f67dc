"""Evaluation with models: figures against plain torch and the harness itself, and a gate through the CLI."""

import json
import math
import re
from pathlib import Path

import plain
import pytest

from pipeline import cli
from pipeline.saves import artifact
from stages import evaluate
from stages.chat.labels import IGNORED
from stages.chat.template import template_text
from stages.data.source import Source, rows_of
from stages.measuring.table import read_table
from stages.model import generation, inference
from stages.model.folder import load_model, load_tokenizer, set_stop_tokens
from stages.model.inputs import Inputs

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
MED = template_text("med")
WITH_TOOLS = """{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages -%}
{{ message.role }}: {{ message.content }}{{ eos_token if message.role == 'assistant' else '\\n' }}
{%- endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def settings(models, **given):
    """A config as the plan hands it to the stage."""
    return evaluate.Config(**{"compare": list(models), "template": MED} | given)


def compared(models):
    return Inputs(compared={name: [str(folder)] for name, folder in models.items()})


def measured(models, out, **given):
    """The table of an evaluation, and its values by metric, data and model."""
    metrics = evaluate.run(settings(models, **given), compared(models), out)
    table = read_table(out)
    assert {key: one["value"] for one in table["figures"] for key in [(one["metric"], one["data"], one["model"])]} == {
        (metric, data, model): value
        for metric, by_data in metrics["figures"].items()
        for data, by_model in by_data.items()
        for model, value in by_model.items()
    }
    return table, metrics["figures"]


# Perplexity


def reference(folder, texts):
    """Perplexity in ten lines: each text as ids, and from where on its tokens count."""
    import torch
    from transformers import AutoModelForCausalLM

    model, total, count = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0, 0
    for ids, start in texts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
        count += len(ids) - start
    return math.exp(total / count), total / math.log(2)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_perplexity_is_that_of_plain_torch(tiny, rows, tmp_path, architecture):
    from transformers import AutoTokenizer

    folder = tiny(architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts, talks = rows_of(rows("text", 10)), rows_of(rows("alpaca", 10))
    documents = [([first, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]], 1) for row in texts]
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True) for row in talks
    ]
    answers = [
        (
            tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"],
            len(tokenizer(prompt, add_special_tokens=False)["input_ids"]),
        )
        for row, prompt in zip(talks, prompts, strict=True)
    ]
    given = {"data": {"notes": rows("text", 10), "talks": rows("alpaca", 10)}, "batch_tokens": 900}
    _, found = measured({"one": folder}, tmp_path, **given)
    for name, tokens, words in (
        ("notes", documents, [row["text"] for row in texts]),
        ("talks", answers, [row["messages"][1]["content"] for row in talks]),
    ):
        perplexity, bits = reference(folder, tokens)
        assert found["perplexity"][name]["one"] == pytest.approx(perplexity, rel=1e-4)
        assert found["bits_per_byte"][name]["one"] == pytest.approx(
            bits / sum(len(w.encode()) for w in words), rel=1e-4
        )


def test_a_long_text_is_cut_into_pieces_and_none_is_lost(tiny, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "发热三天以上应当就医。" * 30}, ensure_ascii=False))
    source = Source(path=str(tmp_path / "long.jsonl"), format="text")
    folder = tiny("llama")
    tokenizer = load_tokenizer([str(folder)])
    ids = tokenizer(rows_of(source)[0]["text"], add_special_tokens=False)["input_ids"]
    first = [tokenizer.bos_token_id]
    pieces = [(first + ids[start : start + 31], 1) for start in range(0, len(ids), 31)]
    _, found = measured({"one": folder}, tmp_path, data={"long": source}, max_length=32)
    perplexity, bits = reference(folder, pieces)
    assert found["perplexity"]["long"]["one"] == pytest.approx(perplexity, rel=1e-4)
    assert found["bits_per_byte"]["long"]["one"] == pytest.approx(bits / (30 * 11 * 3), rel=1e-4)


def test_answer_match_swaps_questions(tiny, tmp_path, monkeypatch):
    """A model for which an answer costs 1 nat, and 2 after one of two questions that is not its own."""
    rows = [("猫", "甲甲"), ("狗", "乙乙"), ("鱼", "丙丙")]
    lines = [json.dumps({"instruction": asked, "output": said}, ensure_ascii=False) + "\n" for asked, said in rows]
    (tmp_path / "talks.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = load_tokenizer([str(tiny("llama"))])
    seen = []

    def losses(model, texts, tokens, told=None):
        seen.append([tokenizer.decode(ids) for ids, _ in texts])
        return [1.0 + any(asked in text and said not in text for asked, said in rows[:2]) for text in seen[-1]]

    monkeypatch.setattr(inference, "losses", losses)
    source = Source(path=str(tmp_path / "talks.jsonl"), format="alpaca")
    _, found = measured({"one": tiny("llama")}, tmp_path, data={"talks": source})
    assert [("猫" in text, "甲甲" in text) for text in seen[1]][:2] == [(True, True), (False, True)]
    assert ("猫" in seen[1][5], "丙丙" in seen[1][5]) == (True, True)  # the last row gets the first question
    assert found["answer_match"]["talks"]["one"] == pytest.approx(2 / 3)
    whole = [len(tokenizer(f"{said}</s>", add_special_tokens=False)["input_ids"]) for _, said in rows]
    assert found["answer_margin"]["talks"]["one"] == pytest.approx(2 / sum(whole))


def test_answer_match_swaps_the_tools_with_the_question(tiny, tmp_path, monkeypatch):
    lines = [
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
            "tools": [{"name": tool, "description": "d"}] if tool else [],
        }
        for asked, said, tool in (("猫", "甲甲", "cat_tool"), ("狗", "乙乙", "dog_tool"), ("鱼", "丙丙", ""))
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    tokenizer = load_tokenizer([str(tiny("llama"))])
    seen = []

    def losses(model, texts, tokens, told=None):
        seen.append([tokenizer.decode(ids) for ids, _ in texts])
        return [1.0] * len(texts)

    monkeypatch.setattr(inference, "losses", losses)
    source = Source(path=str(tmp_path / "talks.jsonl"), format="messages")
    measured({"one": tiny("llama")}, tmp_path, data={"talks": source}, template=WITH_TOOLS)
    found = [[tool for tool in ("cat_tool", "dog_tool") if tool in text] for text in seen[1]]
    assert found == [["cat_tool"], ["dog_tool"], ["dog_tool"], [], [], ["cat_tool"]]


def test_answer_match_of_rows_that_are_cut_counts_the_same_tokens_twice(tiny, rows, tmp_path):
    table, _ = measured({"one": tiny("llama")}, tmp_path, data={"talks": rows("alpaca", 6)}, max_length=90)
    assert [one["n"] for one in table["figures"] if one["metric"] == "answer_match"] == [
        one["n"] for one in table["figures"] if one["metric"] == "perplexity"
    ]


# Preference


def test_preference_is_that_of_plain_torch(tiny, adapt, rows, tmp_path):
    first, second = [tiny("llama")], [tiny("llama"), adapt([tiny("llama")])]
    pairs = rows_of(rows("preference", 6))
    tokenizer = load_tokenizer([str(tiny("llama"))])

    def logp(model, row, side):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
        labels = [IGNORED] * start + ids[start:]
        return -inference.summed_losses(model, [(ids, labels)])[0], len(ids) - start

    found = {}
    for name, chain in (("one", first), ("two", second)):
        model = load_model(list(map(str, chain)))
        found[name] = [(logp(model, row, "chosen"), logp(model, row, "rejected")) for row in pairs]
    margins = {name: [c - r for (c, _), (r, _) in both] for name, both in found.items()}
    rewards = [two - one for one, two in zip(margins["one"], margins["two"], strict=True)]
    config = settings({}, data={"pairs": rows("preference", 6)}, batch_tokens=600)
    models = {"one": list(map(str, first)), "two": list(map(str, second))}
    figures = evaluate.run(config, Inputs(compared=models), tmp_path)["figures"]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    for name in models:
        per_token = [c / m - r / n for (c, m), (r, n) in found[name]]
        assert figures["preference_margin"]["pairs"][name] == pytest.approx(mean(margins[name]), abs=1e-3)
        assert figures["preference_margin_per_token"]["pairs"][name] == pytest.approx(mean(per_token), abs=1e-5)
        assert figures["preference_accuracy"]["pairs"][name] == mean([float(m > 0) for m in margins[name]])
        assert figures["preference_accuracy_per_token"]["pairs"][name] == mean([float(m > 0) for m in per_token])
    assert figures["reward_margin"]["pairs"] == {"one": None, "two": pytest.approx(mean(rewards), abs=1e-3)}
    assert figures["reward_accuracy"]["pairs"] == {"one": None, "two": mean([float(r > 0) for r in rewards])}


# Answers


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_answers_are_those_of_each_model_alone_and_each_model_is_loaded_once(
    tiny, rows, tmp_path, monkeypatch, architecture
):
    folder, loaded, real = tiny(architecture), [], generation._load
    monkeypatch.setattr(generation, "_load", lambda folders: (loaded.append(folders), real(folders))[1])
    given = {"data": {"talks": rows("alpaca", 4)}, "prompts": {"talks": rows("alpaca", 4)}, "batch_tokens": 700}
    table, found = measured({"one": folder, "two": folder}, tmp_path, **given, generation={"max_new_tokens": 12})
    assert loaded == [[str(folder)], [str(folder)]]
    model = load_model([str(folder)])
    set_stop_tokens(model, load_tokenizer([str(folder)]))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = rows_of(rows("alpaca", 4))
    for line, row in zip(lines, asked, strict=True):
        alone = plain.answer(model, folder, row["messages"][:1], 12)
        assert [line["answers"][name]["answer"] for name in ("one", "two")] == [alone, alone]
        assert (line["reference"], line["prompt"]) == (row["messages"][1]["content"], row["messages"][:1])
    assert found["answer_tokens"]["talks"]["one"] == pytest.approx(
        sum(line["answers"]["one"]["answer_tokens"] for line in lines) / 4
    )
    assert {(one["change"], one["better"]) for one in table["comparisons"]} == {(0.0, None), (1.0, None)}
    assert table["settings"]["generation"] == {
        **{"max_new_tokens": 12, "do_sample": False, "temperature": 1.0},
        **{"top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0},
    }


def test_the_stop_rate_counts_answers_that_ended(tiny, tmp_path, monkeypatch):
    stop = load_tokenizer([str(tiny("llama"))]).eos_token_id
    answers = [[5, 6, 7, 8, stop], [5] * 8, [stop], [9, 9]]
    monkeypatch.setattr(inference, "answers", lambda *_, **__: answers)
    _, found = measured({"one": tiny("llama")}, tmp_path, prompts=["a", "b", "c", "d"])
    assert found["stop_rate"]["prompts"]["one"] == 0.5
    assert found["repetition"]["prompts"]["one"] == pytest.approx((0 + 0.8) / 2)  # the others are too short
    assert found["answer_tokens"]["prompts"]["one"] == (4 + 8 + 0 + 2) / 4


def test_what_cannot_be_computed_says_why_in_the_table(tiny, rows, tmp_path):
    given = {
        "data": {"talks": rows("alpaca", 2), "notes": rows("text", 2)},
        "prompts": ["感冒怎么办？"],
        "template": None,
    }
    table, found = measured({"one": tiny("llama", template=None)}, tmp_path, **given, generation={"max_new_tokens": 3})
    whys = {(one["metric"], one["data"]): one["why"] for one in table["figures"]}
    assert whys["perplexity", "talks"] == "`one` has no chat template; set `template:` at the top"
    assert found["perplexity"]["talks"]["one"] is None
    assert whys["bleu-4", "prompts"] == "no reference answers"
    assert whys["repetition", "prompts"] == "no answer has four tokens"
    assert whys["perplexity", "notes"] is None
    assert found["stop_rate"]["prompts"]["one"] is not None


# Tasks


def test_a_task_gives_the_figure_of_the_harness_itself(tiny, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)  # its data are named from there
    folder = tiny("llama", template="med")
    _, found = measured({"one": folder}, tmp_path, tasks=["med_exam"], harness={"include_path": "data/tasks"})
    theirs = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder), "dtype": "float32", "device": "cpu"},
        tasks=["med_exam"],
        task_manager=TaskManager(include_path="data/tasks", include_defaults=False),
        bootstrap_iters=0,
    )["results"]["med_exam"]
    assert found["acc"]["med_exam"]["one"] == theirs["acc,none"]
    assert found["acc_norm"]["med_exam"]["one"] == theirs["acc_norm,none"]


def test_a_task_without_its_data_says_why_and_costs_no_other_figure(tiny, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)  # where there is no data/tasks
    given = {"tasks": ["med_exam"], "harness": {"include_path": str(ROOT / "data/tasks")}, "prompts": ["a"]}
    table, found = measured({"one": tiny("llama")}, tmp_path, **given, generation={"max_new_tokens": 2})
    whys = {one["metric"]: one["why"] for one in table["figures"] if one["data"] == "med_exam"}
    assert list(whys) == ["acc", "acc_norm"]
    assert whys["acc"].startswith("lm-evaluation-harness cannot run `med_exam` (")
    assert found["answer_tokens"]["prompts"]["one"] == 2


# Through the command line


CONFIG = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 40}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 24}}
  held:    {{path: {data}/med_qa_held.json, format: alpaca}}
stages:
  init: {{architecture: llama, hidden_size: 32, num_attention_heads: 2, vocab_size: 400, data: [books]}}
  quantize: {{group_size: 32, calibration: {{data: consult, samples: 8, max_length: 64}}}}
  evaluate:
    data: held
    prompts: [感冒怎么办？]
    generation: {{max_new_tokens: 4}}
    gates: [{{metric: perplexity, max_increase: 0%}}, {{metric: perplexity, max: 1}}]
  sft:
    data: consult
    model: $init
    lora: {{r: 4}}
    trainer: {{learning_rate: 1e-2, max_steps: 1, max_length: 512, per_device_train_batch_size: 2,
              gradient_checkpointing: false, logging_steps: 1}}
"""


def test_a_gate_stops_the_chain(tmp_path, capsys):
    saves, path = tmp_path / "saves", tmp_path / "x.yaml"
    path.write_text(CONFIG.format(data=ROOT / "data"), encoding="utf-8")

    def run(*words):
        code = cli.main(["run", str(path), "--saves", str(saves), "--json", *words])
        return code, capsys.readouterr()

    code, shown = run()
    assert code == 3
    assert re.search(r"x.yaml:13:\d+: perplexity of `quantize` on `held` is [\d.]+ \(95 % CI ", shown.err)
    assert "at most 1 is allowed" in shown.err
    evaluated = (saves / "x" / "evaluate").resolve()
    began = artifact.read(evaluated)["started"]
    assert not (saves / "x" / "sft").exists()
    models = {one["model"]: one["value"] for one in read_table(evaluated)["figures"] if one["metric"] == "perplexity"}
    assert models["quantize"] / models["init"] == pytest.approx(1, abs=0.2)
    assert run()[0] == 3
    assert artifact.read(evaluated)["started"] == began
    code, shown = run("--ignore-gates")
    assert code == 0
    assert artifact.read(evaluated)["started"] == began
    ignored = artifact.read((saves / "x" / "sft").resolve())["ignored_gates"]
    assert ["at most 1 is allowed" in text for text in ignored][-1]
    assert json.loads((saves / "x" / "gates.json").read_text())["ignored"] is True
