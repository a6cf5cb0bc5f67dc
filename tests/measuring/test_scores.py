"""Losses, rewards, embeddings and answers of rows, against plain torch and by hand."""

import math
import shutil
from types import SimpleNamespace

import plain
import pytest
from known_scorer import save_scorer, talk

from stages.chat.labels import IGNORED
from stages.chat.template import install_template, template_text
from stages.data import spool
from stages.data.source import rows_of
from stages.data.spool import Spooled
from stages.measuring import choosing, losses
from stages.measuring.scores import answer_losses, embeddings, opening, own_answers, rewards
from stages.model import inference
from stages.model.folder import load_model, load_tokenizer, set_stop_tokens
from stages.model.generation import load_engine
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train


def settings(**changes):
    usual = {"template": template_text("med"), "max_length": 2048, "max_new_tokens": 512, "batch_tokens": 4096}
    return SimpleNamespace(**usual | changes)


def own(folder):
    return Inputs(model=[str(folder)])


def other(**models):
    return Inputs(others={name: str(folder) for name, folder in models.items()})


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
    given, alone, _ = answer_losses(settings(), own(folder), [row], tmp_path)
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
    given, alone, unscored = answer_losses(settings(max_length=100), own(tiny("llama")), rows, tmp_path)
    assert (given[0], alone[0]) == (None, None)
    assert unscored == {0: "longer than `max_length`"}
    assert given[1] > 0 < alone[1]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return save_scorer(tmp_path_factory.mktemp("scorer"))


def test_a_scorer_reads_texts_pairs_and_its_own_chat_template(scorer, tmp_path):
    ask = [{"role": "user", "content": "上"}]
    pair = {"prompt": ask, "chosen": [{"role": "assistant", "content": "坏"}], "rejected": ask}
    rows = [{"text": "上好"}, pair, talk("上", "坏")]
    root = math.sqrt(2)
    assert rewards(settings(), other(scorer=scorer), rows, tmp_path)[0] == pytest.approx([root, -root, -root])
    shutil.copytree(scorer, tmp_path / "chat")
    ends = "{% for message in messages %}{{ message['content'] }}{% endfor %}好"
    (tmp_path / "chat" / "chat_template.jinja").write_text(ends, encoding="utf-8")
    chat = other(scorer=tmp_path / "chat")
    assert rewards(settings(), chat, rows, tmp_path)[0] == pytest.approx([root, root, root])


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_answers_in_batches_are_those_of_each_question_alone(tiny, rows, tmp_path, architecture):
    folder, asked = tiny(architecture), rows_of(rows("alpaca", 6))
    found, unscored = own_answers(settings(max_new_tokens=12, batch_tokens=700), own(folder), asked, tmp_path)
    model = load_model([str(folder)])
    set_stop_tokens(model, load_tokenizer([str(folder)]))
    assert found == [plain.answer(model, folder, row["messages"][:-1], 12) for row in asked]
    assert unscored == {}


def test_embeddings_are_means_of_hidden_states(scorer, tiny, rows, tmp_path):
    import torch

    root = math.sqrt(2)
    asked = [talk("好上", "坏"), talk("好", "坏坏坏")]
    small, embedder = settings(batch_tokens=4), other(embedder=scorer)
    points, cut = embeddings(small, embedder, asked, tmp_path, answer=False)
    assert points.tolist() == [pytest.approx([root / 2, root / 2]), pytest.approx([root, 0.0])]
    assert cut == 0
    points, _ = embeddings(small, embedder, asked[1:], tmp_path, answer=True)
    assert points[0] == pytest.approx([-2 * root / 5, root / 5])  # 好, a line break that counts as 上, three times 坏
    talks, folder = rows_of(rows("alpaca", 3)), tiny("bloom")
    points, _ = embeddings(settings(), own(folder), talks, tmp_path, answer=False)
    model, tokenizer = load_model([str(folder)]), load_tokenizer([str(folder)])
    for point, row in zip(points, talks, strict=True):
        ids = tokenizer(row["messages"][0]["content"], return_tensors="pt")
        with torch.no_grad():
            expected = model.base_model(**ids).last_hidden_state[0].mean(dim=0)
        assert point == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_model_without_a_scoring_head_is_refused(tiny, tmp_path):
    with pytest.raises(StageError, match=r"has no `score.weight`, so its scores would be random; choose a reward mod"):
        rewards(settings(), other(scorer=tiny("llama")), [talk("a", "b")], tmp_path)


def test_an_embedder_that_lacks_weights_is_refused_and_one_without_a_pooler_is_not(tiny, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path)
    for path in (path for path in tiny("llama").glob("*token*")):
        shutil.copy(path, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")

    def placed(without):
        kept = {name: weight for name, weight in weights.items() if without not in name}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        return embeddings(settings(), other(embedder=tmp_path), [talk("a", "b")], tmp_path, answer=False)[0]

    assert placed("pooler").shape == (1, 8)
    with pytest.raises(StageError, match=r"lacks weights, which would be random: `encoder\.layer\.0\.intermediate"):
        placed("intermediate")


def test_scores_hold_no_tokens_of_rows_in_memory(tiny, tmp_path, monkeypatch):
    """Rows of 600 kB, which are several times as much as tokens: only a batch of them is in memory."""
    import tracemalloc

    monkeypatch.setattr(spool, "_IN_MEMORY", 2**16)
    monkeypatch.setattr(inference, "summed_losses", lambda model, texts: [1.0] * len(texts))
    engine = load_engine([str(tiny("llama"))], settings().template)
    subject = losses.Subject("base", engine, 1024, 4096, 42, tmp_path)
    with Spooled(({"text": f"{number} " + "多休息，多喝水。" * 125} for number in range(200)), tmp_path) as rows:
        losses.perplexity(subject, rows[:2])  # what is made once
        tracemalloc.start()
        found = losses.perplexity(subject, rows)["perplexity"].rows
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(found) == 200
    assert peak < 800_000
    assert not list(tmp_path.iterdir())


def test_a_row_that_the_template_refuses_is_dropped_for_that_reason(tiny, scorer, tmp_path):
    """It was counted as longer than `max_length`, or stopped the stage."""
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    template += "{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    good = talk("头疼怎么办？", "多休息。")
    bad = {"messages": [{"role": "system", "content": "你是医生。"}, *good["messages"]]}
    given, refused = settings(template=template, max_new_tokens=2), {0: "for which the template cannot be used"}
    assert answer_losses(given, own(tiny("llama")), [bad, good], tmp_path)[2] == refused
    answers, unscored = own_answers(given, own(tiny("llama")), [bad, good], tmp_path)
    assert (answers[0], unscored) == (None, refused)
    shutil.copytree(scorer, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(template, encoding="utf-8")
    scores, cut = rewards(settings(), other(scorer=tmp_path / "chat"), [bad, good], tmp_path)
    assert (math.isnan(scores[0]), math.isnan(scores[1]), cut) == (True, False, 0)
