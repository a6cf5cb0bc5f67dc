"""Selection with models: what they say of rows against plain torch and by hand, and a chain through the CLI."""

import json
import math
from pathlib import Path

import pytest
from known_scorer import save_scorer, talk
from planned import inputs

from pipeline import cli
from pipeline.saves import artifact
from stages import select
from stages.chat.template import template_text
from stages.data.source import Source, rows_of
from stages.measuring import choosing
from stages.model.folder import load_tokenizer

pytestmark = pytest.mark.train

DATA = Path(__file__).parents[2] / "data"
MED = template_text("med")


def settings(folder, source, **more):
    given = {"method": "ifd", "keep": 5, "template": MED, **more}
    return select.Config(model=str(folder), data=[source], **given)


def run(config, out):
    return select.run(config, inputs(config, config.model), out)


# IFD


def ifd_by_hand(folder, messages):
    """mean CE(A|Q) / mean CE(A) of one turn, row by row: the answer after the prompt, and after `### 回答:` alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    losses = []
    for before in (
        f"下面是一个问题，运用医学知识来正确回答提问。\n### 问题:\n{messages[0]['content']}\n### 回答:\n",
        "### 回答:\n",
    ):
        start = tokenizer(before, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + answer])).logits[0, len(start) - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))))
    return losses[0] / losses[1]


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_ifd_is_that_of_plain_torch(tiny, rows, tmp_path, architecture):
    source, folder = rows("alpaca", 12), tiny(architecture)
    metrics = run(settings(folder, source, batch_tokens=700), tmp_path)
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    talks = rows_of(source)
    expected = [ifd_by_hand(folder, row["messages"]) for row in talks]
    assert [score["ifd"] for score in scores] == pytest.approx(expected, abs=1e-5)
    helped = [index for index in range(12) if expected[index] <= 1]
    best = sorted(sorted(helped, key=lambda index: -expected[index])[:5])
    kept = Source(path=str(tmp_path / "rows.jsonl"), format="messages")
    assert rows_of(kept) == [talks[index] for index in best]
    assert metrics["dropped"].get("with an IFD above 1", 0) == 12 - len(helped)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return save_scorer(tmp_path_factory.mktemp("scorer"))


def source_of(tmp_path, *rows):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(tmp_path / "data.jsonl"), format="messages")


def kept(tmp_path):
    rows = rows_of(Source(path=str(tmp_path / "rows.jsonl"), format="messages"))
    return [row["messages"][-1]["content"] for row in rows]


def test_quality_with_a_scorer_that_can_be_computed_by_hand(scorer, tmp_path):
    source = source_of(tmp_path, talk("上", "好"), talk("好好", "上坏"), talk("坏", "坏上"), talk("坏坏坏", "上上好"))
    made = settings("no", source, method="quality", keep=None, above=0.0, scorer=str(scorer), batch_tokens=4)
    metrics = run(made, tmp_path)
    scores = [json.loads(line)["quality"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert scores == pytest.approx([math.sqrt(2), -math.sqrt(2), 0.0, math.sqrt(2)])
    assert kept(tmp_path) == ["好", "上上好"]  # 0 is not above 0
    assert (metrics["cut"], metrics["score"]["100%"]) == (0, pytest.approx(math.sqrt(2)))


def test_rows_that_a_scorer_cannot_take_whole_are_cut_and_counted(scorer, tmp_path):
    source = source_of(tmp_path, talk("上上上", "好坏"), talk("上", "好"))
    made = settings("no", source, method="quality", keep=2, scorer=str(scorer), max_length=4)
    assert run(made, tmp_path)["cut"] == 1


def test_necessity_scores_the_models_own_answers(tiny, scorer, tmp_path, monkeypatch):
    said = {"甲": "坏", "乙": "好", "丙": "上"}
    source = source_of(tmp_path, *(talk(question, "答" + question) for question in said))
    monkeypatch.setattr(choosing, "own_answers", lambda *_: (list(said.values()), {}))
    made = settings(tiny("llama"), source, method="necessity", keep=None, below=0.0, scorer=str(scorer))
    run(made, tmp_path)
    assert kept(tmp_path) == ["答甲"]
    found = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["answer"], row["necessity"]) for row in found] == [
        *(("坏", pytest.approx(-math.sqrt(2))), ("好", pytest.approx(math.sqrt(2))), ("上", 0.0)),
    ]


# Through the command line


CONFIG = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 40}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 24}}
stages:
  init: {{architecture: llama, hidden_size: 32, num_attention_heads: 2, vocab_size: 400, data: [books]}}
  select: {{data: consult, method: ifd, keep: 4, batch_tokens: 2048}}
  sft:
    data: $select
    lora: {{r: 4}}
    trainer: {{learning_rate: 1e-2, num_train_epochs: 1, max_length: 512, per_device_train_batch_size: 2,
              gradient_checkpointing: false, logging_steps: 1}}
"""


def test_a_chain_with_a_selection(tmp_path, capsys):
    saves, path = tmp_path / "saves", tmp_path / "x.yaml"
    path.write_text(CONFIG.format(data=DATA), encoding="utf-8")

    def run(*words):
        assert cli.main(["run", str(path), "--saves", str(saves), "--json", *words]) == 0
        steps = {step["stage"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
        times = {name: artifact.read(Path(step["folder"]))["started"] for name, step in steps.items()}
        return steps, times

    first, times = run()
    folder = Path(first["select"]["folder"])
    rows = rows_of(Source(path=str(folder / "rows.jsonl"), format="messages"))
    tokenizer = load_tokenizer([first["sft"]["folder"]])
    lengths = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows]
    asked = {row["messages"][0]["content"] for row in rows}
    known = rows_of(Source(path=str(DATA / "med_qa.json"), format="alpaca", max_samples=24))
    assert len(asked & {row["messages"][0]["content"] for row in known}) == first["select"]["metrics"]["kept"] == 4
    assert (first["sft"]["metrics"]["rows"], first["sft"]["metrics"]["tokens"]) == (4, sum(lengths))
    assert artifact.read(Path(first["sft"]["folder"]))["model"] == [first["init"]["folder"], first["sft"]["folder"]]
    again, same = run()
    assert same == times
    assert {name: step["folder"] for name, step in again.items()} == {
        name: step["folder"] for name, step in first.items()
    }
    more, later = run("--set", "select.keep=6")
    assert [name for name in times if later[name] != times[name]] == ["select", "sft"]
    assert (more["select"]["metrics"]["kept"], more["sft"]["metrics"]["rows"]) == (6, 6)
