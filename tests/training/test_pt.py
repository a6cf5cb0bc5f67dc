"""Continued pretraining end to end on a tiny model: no token is lost, and every token is in the loss."""

from itertools import chain

import pytest

from stages import pt
from stages.data import drawing
from stages.data.source import Reading, rows_of
from stages.training.sequences import sequences

pytestmark = pytest.mark.train

COUNT = 6


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def documents(tiny, rows):
    """The ids of each text, its end included, as the exported tokenizer gives them."""
    tokenizer = tokenizer_of(tiny("llama"))
    texts = [row["text"] for row in rows_of(rows("text", COUNT))]
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]


@pytest.mark.parametrize("room", [7, 64, 10_000, None])
def test_documents_are_cut_into_pieces_and_none_is_lost(tiny, rows, documents, room):
    placed = [drawing.DrawnRow(0, place, row) for place, row in Reading(rows("text", COUNT)).kept()]
    made, (tokens,) = sequences(tokenizer_of(tiny("llama")), room, True, 1)(next(drawing.chunks(placed)))
    pieces = made["input_ids"].to_pylist()
    assert tokens.tokens == tokens.trained == sum(map(len, documents))
    assert list(chain(*pieces)) == list(chain(*documents))
    assert all(0 < len(piece) <= (room or 10_000) for piece in pieces)
    if room in (10_000, None):
        assert pieces == documents


@pytest.mark.parametrize("packing", [True, False], ids=["wrapped", "one by one"])
def test_every_token_is_trained_on_in_its_order(tiny, train, rows, documents, packing):
    asked = {"packing": packing, "packing_strategy": "wrapped", "max_length": 50}
    done = train(pt, [tiny("llama")], rows("text", COUNT), trainer=asked)
    trained = done.trainer.train_dataset
    assert list(chain(*trained["input_ids"])) == list(chain(*documents))
    assert "labels" not in trained.column_names  # then the ids are the labels, as the next tests show
    assert (done.metrics["rows"], done.metrics["tokens"]) == (COUNT, sum(map(len, documents)))
    lengths = [len(ids) for ids in trained["input_ids"]]
    assert max(lengths) == 50
    if packing:
        assert lengths[:-1] == [50] * (len(lengths) - 1)


def test_packing_keeps_documents_apart_and_loses_no_token(tiny, train, rows, documents):
    trained = train(pt, [tiny("llama")], rows("text", COUNT), trainer={"max_length": 50}).trainer.train_dataset
    assert sum(map(len, trained["seq_lengths"])) == sum(-(-len(ids) // 50) for ids in documents)
    assert sorted(chain(*trained["input_ids"])) == sorted(chain(*documents))


def test_the_batch_is_its_own_label_but_for_the_padding(tiny, train, rows):
    done = train(pt, [tiny("llama")], rows("text", COUNT), trainer={"packing": False, "max_length": 50})
    for batch in done.trainer.get_train_dataloader():
        expected = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        assert batch["labels"].equal(expected)


def test_the_loss_is_that_of_every_token(tiny, train, rows, documents):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    total = 0.0
    for ids in map(torch.tensor, documents):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    asked = {"packing": False, "max_steps": 1, "per_device_train_batch_size": COUNT}
    metrics = train(pt, [tiny("llama")], rows("text", COUNT), trainer=asked).metrics
    expected = total / sum(len(ids) - 1 for ids in documents)
    assert metrics["loss_first"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("lora", "left"), [({"r": 8}, 0.995), (None, 0.95)], ids=["LoRA", "full"])
def test_the_loss_falls(tiny, train, rows, lora, left):
    asked = {"max_steps": 12, "max_length": 64, "per_device_train_batch_size": 4, "learning_rate": 3e-2}
    metrics = train(pt, [tiny("llama")], rows("text", 20), lora=lora, eval_size=0.2, trainer=asked).metrics
    assert metrics["rows"] == 17  # of one text the start
    assert metrics["loss_last"] < left * metrics["loss_first"]
    assert metrics["eval_loss"] < left * metrics["eval_loss_before"]


def test_a_base_model_needs_no_chat_template(tiny, train, rows):
    out = train(pt, [tiny("qwen2", template=None)], rows("text", 3), trainer={"max_steps": 1}).out
    assert not (out / "chat_template.jinja").exists()
    assert tokenizer_of(out).chat_template is None
