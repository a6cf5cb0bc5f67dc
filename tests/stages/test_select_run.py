"""Selection with models: what they say of rows against plain torch and by hand, and a chain through the CLI."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import plain
import pytest
from planned import inputs

from pipeline import cli
from pipeline.saves import artifact
from stages import select
from stages.chat.labels import IGNORED
from stages.chat.template import install_template, template_text
from stages.data.source import Source, rows_of
from stages.measuring import choosing
from stages.measuring.scores import answer_losses, embeddings, opening, own_answers, rewards
from stages.model import inference
from stages.model.folder import load_model, load_tokenizer, set_stop_tokens
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

DATA = Path(__file__).parents[2] / "data"
MED = template_text("med")
UNREAD = Source(path="none.jsonl", format="messages")


def talk(question, answer, *more):
    roles = ("user", "assistant") * 3
    said = zip(roles, (question, answer, *more), strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in said]}


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


class Certain:
    """A model of four tokens: after token 1 has been seen it gives the next token 3/4, else every token 1/4."""

    device, config = "cpu", SimpleNamespace(max_position_embeddings=None)

    def __call__(self, input_ids, **_):
        import torch

        logits = torch.zeros(*input_ids.shape, 4)
        for line, ids in enumerate(input_ids.tolist()):
            for place in range(ids.index(1) if 1 in ids else len(ids), len(ids) - 1):
                logits[line, place, ids[place + 1]] = math.log(9)  # 9 / (9 + 3) = 3/4
        return SimpleNamespace(logits=logits)


def test_ifd_of_a_model_that_can_be_computed_by_hand():
    # Answer 2, 3 after question 1: ln 4/3 a token. Alone: ln 4 a token. IFD = ln(4/3) / ln 4 = 0.2075.
    no = IGNORED
    given, alone = inference.summed_losses(Certain(), [([0, 1, 2, 3], [no, no, 2, 3]), ([0, 2, 3], [no, 2, 3])])
    assert (given, alone) == pytest.approx((2 * math.log(4 / 3), 2 * math.log(4)))
    assert choosing.ifd([given / 2], [alone / 2]) == pytest.approx([0.20752], abs=1e-5)


def test_every_answer_of_a_conversation_counts_and_its_end_of_turn_does_not(tiny, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    folder, seen = tiny("llama"), []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    real = inference.summed_losses
    monkeypatch.setattr(inference, "summed_losses", lambda model, texts: (seen.extend(texts), real(model, texts))[1])
    row = talk("头疼怎么办？", "多休息。", "还疼呢？", "去看医生。")
    given, alone = answer_losses(settings(folder, UNREAD), Inputs(model=[str(folder)]), [row], tmp_path)
    shown = [
        (tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != IGNORED]))
        for ids, labels in seen
    ]
    assert sorted(shown) == [
        ("### 回答:\n去看医生。", "去看医生。"),
        ("### 回答:\n多休息。", "多休息。"),
        (tokenizer.apply_chat_template(row["messages"], tokenize=False), "多休息。去看医生。"),
    ]
    assert given[0] > 0 < alone[0]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("med", "### 回答:\n"),
        ("chatml", "<|im_start|>assistant\n"),
        ("llama3", "<s><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("plain", "<s>"),
    ],
)
def test_what_opens_an_answer_alone(tiny, template, expected):
    tokenizer = load_tokenizer([str(tiny("llama"))])
    install_template(tokenizer, template_text(template))
    assert tokenizer.decode(opening(tokenizer)) == expected


def test_rows_longer_than_the_limit_are_dropped_and_counted(tiny, tmp_path):
    rows = [talk("问", "答" * 300), talk("头疼怎么办？", "多休息，多喝水。")]
    made = settings(tiny("llama"), UNREAD, max_length=100)
    given, alone = answer_losses(made, inputs(made, made.model), rows, tmp_path)
    assert (given[0], alone[0]) == (None, None)
    assert given[1] > 0 < alone[1]


# A scorer and an embedder whose figures are known: no layers, so each token is its own embedding, made as long as √2


WORDS = {"好": [1.0, 0.0], "坏": [-1.0, 0.0], "上": [0.0, 1.0]}  # RMSNorm makes these ±√2 and 0 on the first axis


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The reward is the first axis of the last token: √2 after 好, -√2 after 坏, 0 after 上."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("judge")
    words = {"<pad>": 0, "</s>": 1, **{word: place for place, word in enumerate(WORDS, 2)}}
    made = Tokenizer(models.WordLevel(words, unk_token="上"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    sizes = {"vocab_size": 5, "hidden_size": 2, "num_hidden_layers": 0, "num_attention_heads": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, pad_token_id=0, rms_norm_eps=0.0))
    with torch.no_grad():
        model.model.embed_tokens.weight[2:] = torch.tensor(list(WORDS.values()))
        model.score.weight[:] = torch.tensor([[1.0, 0.0]])
    model.save_pretrained(folder)
    return folder


def source_of(tmp_path, *rows):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(tmp_path / "data.jsonl"), format="messages")


def kept(tmp_path):
    rows = rows_of(Source(path=str(tmp_path / "rows.jsonl"), format="messages"))
    return [row["messages"][-1]["content"] for row in rows]


def test_quality_with_a_scorer_that_can_be_computed_by_hand(judge, tmp_path):
    source = source_of(tmp_path, talk("上", "好"), talk("好好", "上坏"), talk("坏", "坏上"), talk("坏坏坏", "上上好"))
    made = settings("no", source, method="quality", keep=None, above=0.0, scorer=str(judge), batch_tokens=4)
    metrics = run(made, tmp_path)
    scores = [json.loads(line)["quality"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert scores == pytest.approx([math.sqrt(2), -math.sqrt(2), 0.0, math.sqrt(2)])
    assert kept(tmp_path) == ["好", "上上好"]  # 0 is not above 0
    assert (metrics["cut"], metrics["score"]["100%"]) == (0, pytest.approx(math.sqrt(2)))


def test_a_scorer_reads_texts_pairs_and_its_own_chat_template(judge, tmp_path):
    import shutil

    made = settings("no", UNREAD, method="quality", keep=1, scorer=str(judge))
    ask = [{"role": "user", "content": "上"}]
    pair = {"prompt": ask, "chosen": [{"role": "assistant", "content": "坏"}], "rejected": ask}
    rows = [{"text": "上好"}, pair, talk("上", "坏")]
    root = math.sqrt(2)
    assert rewards(made, inputs(made, made.model), rows, tmp_path)[0] == pytest.approx([root, -root, -root])
    shutil.copytree(judge, tmp_path / "chat")
    ends = "{% for message in messages %}{{ message['content'] }}{% endfor %}好"
    (tmp_path / "chat" / "chat_template.jinja").write_text(ends, encoding="utf-8")
    made = made.model_copy(update={"scorer": str(tmp_path / "chat")})
    assert rewards(made, inputs(made, made.model), rows, tmp_path)[0] == pytest.approx([root, root, root])


def test_rows_that_a_scorer_cannot_take_whole_are_cut_and_counted(judge, tmp_path):
    source = source_of(tmp_path, talk("上上上", "好坏"), talk("上", "好"))
    made = settings("no", source, method="quality", keep=2, scorer=str(judge), max_length=4)
    assert run(made, tmp_path)["cut"] == 1


def test_necessity_scores_the_models_own_answers(tiny, judge, tmp_path, monkeypatch):
    said = {"甲": "坏", "乙": "好", "丙": "上"}
    source = source_of(tmp_path, *(talk(question, "答" + question) for question in said))
    monkeypatch.setattr(choosing, "own_answers", lambda *_: list(said.values()))
    made = settings(tiny("llama"), source, method="necessity", keep=None, below=0.0, scorer=str(judge))
    run(made, tmp_path)
    assert kept(tmp_path) == ["答甲"]
    found = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["answer"], row["necessity"]) for row in found] == [
        *(("坏", pytest.approx(-math.sqrt(2))), ("好", pytest.approx(math.sqrt(2))), ("上", 0.0)),
    ]


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_answers_in_batches_are_those_of_each_question_alone(tiny, rows, tmp_path, architecture):
    folder, source = tiny(architecture), rows("alpaca", 6)
    made = settings(folder, source, method="necessity", scorer="s", max_new_tokens=12, batch_tokens=700)
    asked = rows_of(source)
    found = own_answers(made, inputs(made, made.model), asked, tmp_path)
    model = load_model([str(folder)])
    set_stop_tokens(model, load_tokenizer([str(folder)]))
    assert found == [plain.answer(model, folder, row["messages"][:-1], 12) for row in asked]


def test_embeddings_are_means_of_hidden_states(judge, tiny, rows, tmp_path):
    import torch

    root = math.sqrt(2)
    asked = [talk("好上", "坏"), talk("好", "坏坏坏")]
    made = settings("no", UNREAD, method="k_center", embedder=str(judge), batch_tokens=4)
    points, cut = embeddings(made, inputs(made, made.model), asked, tmp_path, answer=False)
    assert points.tolist() == [pytest.approx([root / 2, root / 2]), pytest.approx([root, 0.0])]
    assert cut == 0
    points, _ = embeddings(made, inputs(made, made.model), asked[1:], tmp_path, answer=True)
    assert points[0] == pytest.approx([-2 * root / 5, root / 5])  # 好, a line break that counts as 上, three times 坏
    source, folder = rows("alpaca", 3), tiny("bloom")
    made = settings(folder, source, method="k_center")
    points, _ = embeddings(made, inputs(made, folder), rows_of(source), tmp_path, answer=False)
    model, tokenizer = load_model([str(folder)]), load_tokenizer([str(folder)])
    for point, row in zip(points, rows_of(source), strict=True):
        ids = tokenizer(row["messages"][0]["content"], return_tensors="pt")
        with torch.no_grad():
            expected = model.base_model(**ids).last_hidden_state[0].mean(dim=0)
        assert point == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_model_without_a_scoring_head_is_refused(tiny, tmp_path):
    made = settings("no", UNREAD, method="quality", keep=None, above=0.0, scorer=str(tiny("llama")))
    with pytest.raises(StageError, match=r"has no `score.weight`, so its scores would be random; choose a reward mod"):
        rewards(made, inputs(made, made.model), [talk("a", "b")], tmp_path)


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
