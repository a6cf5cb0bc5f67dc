"""Packing is exact: in one row each document gets the logits, the loss and the gradients that it gets alone.

Batches come from the trainer's own dataloader; "alone" is plain transformers on the saved model, one document a pass.
"""

import hashlib
import json
import random
from itertools import chain, pairwise
from types import SimpleNamespace
from typing import get_args

import pytest

from stages import init, pt, sft
from stages.data.source import Source, rows_of
from stages.model import bloom
from stages.model.facts import Facts
from stages.runtime.errors import Interrupted, StageError
from stages.training import packing

pytestmark = pytest.mark.train

ROOM = 48
LENGTHS = [ROOM, 2, 17, 5, ROOM + 1, 30, 9, 17, 2, 40, 12, ROOM + 20]
PIECES = [*LENGTHS[:4], ROOM, 1, *LENGTHS[5:11], ROOM, 20]
ARCHITECTURES = get_args(init.Config.model_fields["architecture"].annotation)
# All rows in one batch; trained a little, so that the weights are not those of the start.
PACKED = {"packing": True, "max_length": ROOM, "max_steps": 2, "per_device_train_batch_size": 16}
LORA = {"r": 4, "target_modules": ["query_key_value"]}


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def plain(folder):
    """What transformers alone makes of a saved model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def written(path, lengths):
    """Documents of so many tokens, their end included: letters that the tests' tokenizers never join."""
    letters = random.Random(0)
    texts = ["".join(letters.choices("BFGJKQVWXYZ", k=length - 1)) for length in lengths]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Source(path=str(path), format="text")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return written(tmp_path_factory.mktemp("texts") / "texts.jsonl", LENGTHS)


@pytest.fixture(scope="module")
def packed(tiny, train, texts):
    """A full fine-tuning of an architecture with packed documents, run once."""
    runs = {}

    def run(architecture, tied=True):
        if (architecture, tied) not in runs:
            model = tiny(architecture, tied=tied)
            runs[architecture, tied] = train(pt, [model], texts, lora=None, trainer=PACKED)
        return runs[architecture, tied]

    return run


def documents_in(batch):
    """Where each document of a packed batch starts and ends."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return list(pairwise([*starts, batch["input_ids"].shape[1]]))


def batch_of(done):
    """The first batch of the trainer's dataloader, and where its documents lie."""
    batch = next(iter(done.trainer.get_train_dataloader()))
    return batch, documents_in(batch)


def logits(model, batch):
    import torch

    model.eval()
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits


def alone(model, ids):
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def loss_alone(model, batch, documents):
    """The mean loss of what is trained in each document, each in a pass of its own."""
    import torch

    total, count = 0.0, 0
    for start, end in documents:
        ids, labels = batch["input_ids"][0, start:end], batch["labels"][0, start:end]
        scores = model(input_ids=ids[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(scores, labels[1:], reduction="sum", ignore_index=-100)
        count += int((labels[1:] != -100).sum())
    return total / count


# Exact


def test_every_architecture_that_may_pack_is_proven_below():
    assert set(packing.EXACT) == set(ARCHITECTURES)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_document_of_a_packed_batch_is_as_if_alone(packed, architecture, tied):
    import torch

    done = packed(architecture, tied)
    model, reference = done.trainer.model, plain(done.out)
    batch, documents = batch_of(done)
    assert sorted(end - start for start, end in documents) == sorted(PIECES)
    found = logits(model, batch)[0]
    for start, end in documents:
        torch.testing.assert_close(
            found[start:end], alone(reference, batch["input_ids"][0, start:end]), rtol=0, atol=1e-5
        )
    mixed = {"input_ids": batch["input_ids"]}  # the same tokens as one document: the test would show a leak
    assert (logits(reference, mixed)[0] - found).abs().max() > 1e-3

    model.train()
    model.zero_grad()
    loss = done.trainer.compute_loss(model, dict(batch))
    loss.backward()
    expected = loss_alone(reference, batch, documents)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5)


def test_conversations_packed_for_bloom_are_as_if_alone(tiny, train, rows):
    import torch

    asked = {"packing": True, "max_length": 256, "per_device_train_batch_size": 4}
    done = train(sft, [tiny("bloom")], rows("alpaca", 12), lora=None, trainer=asked)
    batch, documents = batch_of(done)
    reference, found = plain(done.out), logits(done.trainer.model, batch)[0]
    assert len(documents) > batch["input_ids"].shape[1] / 256  # some rows hold several
    for start, end in documents:
        expected = alone(reference, batch["input_ids"][0, start:end])
        torch.testing.assert_close(found[start:end], expected, rtol=0, atol=1e-5)
    loss = done.trainer.compute_loss(done.trainer.model.train(), batch)
    assert float(loss.detach()) == pytest.approx(float(loss_alone(reference, batch, documents).detach()), abs=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_an_adapter_s_gradients_through_recomputed_activations(tiny, train, texts, reentrant):
    import torch
    from peft import PeftModel

    asked = {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    done = train(pt, [tiny("bloom")], texts, lora=LORA, trainer={**PACKED, **asked})
    reference = PeftModel.from_pretrained(plain(tiny("bloom")), done.out, is_trainable=True)
    batch, documents = batch_of(done)
    model = done.trainer.model.train()
    assert model.base_model.model.transformer.gradient_checkpointing
    model.zero_grad()
    done.trainer.compute_loss(model, dict(batch)).backward()
    loss_alone(reference, batch, documents).backward()
    expected = {name: weight.grad for name, weight in reference.named_parameters() if weight.requires_grad}
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(found) == 4
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bloom", "qwen3"])
def test_in_bfloat16_no_document_feels_a_change_in_another(packed, architecture):
    import torch

    done = packed(architecture)
    batch, documents = batch_of(done)
    start, end = documents[1]
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, start:end] = 20
    with torch.autocast("cpu", torch.bfloat16):
        before, after = logits(done.trainer.model, batch)[0], logits(done.trainer.model, changed)[0]
    assert before.dtype == torch.bfloat16
    assert not torch.equal(before[start:end], after[start:end])
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])


def test_bloom_s_position_bias_has_the_type_that_is_computed_in(packed):
    import torch

    body = packed("bloom").trainer.model.transformer
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            layout = body.build_alibi_tensor(torch.zeros(1, 1, 1, 3, dtype=torch.long), 4, torch.float32)
        assert layout.bias.dtype == dtype  # a wider one would be cast again in every layer


def test_bloom_s_attention_dropout_is_kept():
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}
    model = BloomForCausalLM(BloomConfig(**sizes, attention_dropout=0.5, hidden_dropout=0.0))
    bloom.install(model)
    batch = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (model.train()(**batch, use_cache=False).logits for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (model.eval()(**batch, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_bloom_s_position_bias_is_fine_in_16_bits_far_into_a_row():
    import torch

    slopes = torch.tensor([0.5, 2**-8])
    bias = bloom.alibi(slopes, 2000, torch.bfloat16)[0, :, 1999]
    assert bias[:, 1997:].tolist() == [[-1.0, -0.5, 0.0], [-(2**-7), -(2**-8), 0.0]]
    assert bias.shape == (2, 2000)
    assert bloom.alibi(slopes, 3, torch.float32).shape == (1, 2, 8, 8)


def test_positions_that_do_not_count_up_are_refused():
    import torch

    with pytest.raises(ValueError, match="must count up from 0"):
        bloom.layout(torch.tensor([[0, 1, 3, 4]]), torch.ones(2), torch.float32)


def test_the_held_out_loss_is_that_of_documents_alone(tiny, train, texts):
    done = train(pt, [tiny("bloom")], texts, lora=None, eval_size=4, trainer={**PACKED, "max_steps": 1})
    batch = done.trainer.data_collator(list(done.trainer.eval_dataset))
    documents = documents_in(batch)
    for folder, figure in ((tiny("bloom"), "eval_loss_before"), (done.out, "eval_loss")):
        expected = float(loss_alone(plain(folder), batch, documents).detach())
        assert done.metrics[figure] == pytest.approx(expected, abs=1e-5)


# BLOOM's attention without packing


def test_bloom_with_padded_rows_is_as_with_its_own_attention(tiny, train, texts):
    import torch

    asked = {"packing": False, "max_steps": 1, "max_length": ROOM, "per_device_train_batch_size": 6}
    done = train(pt, [tiny("bloom")], texts, lora=None, trainer=asked)
    batch, reference = next(iter(done.trainer.get_train_dataloader())), plain(done.out)
    seen = batch["attention_mask"] == 1
    assert not seen.all()
    torch.testing.assert_close(
        logits(done.trainer.model, batch)[seen], logits(reference, batch)[seen], rtol=0, atol=1e-5
    )
    found = done.trainer.compute_loss(done.trainer.model.train(), dict(batch))
    assert float(found.detach()) == pytest.approx(float(reference(**batch).loss.detach()), abs=1e-5)


def test_bloom_still_writes_with_its_cache(packed):
    import torch

    done = packed("bloom")
    ids = torch.tensor([[0, 5, 30, 31], [40, 41, 42, 43]])
    asked = {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), "max_new_tokens": 5, "do_sample": False}
    found = done.trainer.model.eval().generate(input_ids=ids, **asked)
    assert torch.equal(found, plain(done.out).generate(input_ids=ids, **asked))


def test_what_is_saved_is_a_plain_bloom(packed, tiny):
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (tiny("bloom"), packed("bloom").out))
    assert before.keys() == after.keys()
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (tiny("bloom"), packed("bloom").out))
    assert now == {**was, "use_cache": now["use_cache"]}
    assert now["architectures"] == ["BloomForCausalLM"]


# Nothing is lost, and the account


def pieces_of(dataset):
    """Each packed document's tokens."""
    for row in dataset:
        tokens = iter(row["input_ids"])
        yield from (tuple(next(tokens) for _ in range(length)) for length in row["seq_lengths"])


def test_packing_loses_no_token_of_many_documents(tiny, train, tmp_path):
    source = written(tmp_path / "many.jsonl", [2 + number % 60 for number in range(1100)])
    asked = {"max_length": ROOM, "max_steps": 1}
    done = train(pt, [tiny("llama")], source, trainer=asked)
    tokenizer = tokenizer_of(tiny("llama"))
    whole = [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in rows_of(source)]
    expected = [ids[start : start + ROOM] for ids in whole for start in range(0, len(ids), ROOM)]
    assert len(expected) > 1000  # TRL packs a thousand rows at a time
    assert sorted(pieces_of(done.trainer.train_dataset)) == sorted(map(tuple, expected))
    rows = len(done.trainer.train_dataset)
    account = {"rows": 1100, "packed": len(expected), "packed_into": rows}
    assert {key: done.metrics[key] for key in account} == account
    assert done.metrics["padding"] == pytest.approx(1 - done.metrics["tokens"] / (rows * ROOM))
    assert 0 < done.metrics["padding"] < 0.1


def notes(folder):
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["text"] for event in map(json.loads, lines) if event["kind"] == "note"]


def test_the_account_of_a_packed_run(packed, tiny, train, texts):
    done = packed("bloom")
    tokens, rows = sum(LENGTHS), len(done.trainer.train_dataset)
    empty = 1 - tokens / (rows * ROOM)
    assert {key: done.metrics[key] for key in ("rows", "tokens", "packed", "packed_into", "padding")} == {
        **{"rows": len(LENGTHS), "tokens": tokens, "packed": len(PIECES), "packed_into": rows},
        "padding": pytest.approx(empty),
    }
    assert notes(done.out)[1] == (
        f"{len(LENGTHS)} rows, 0 dropped, 0 truncated, {tokens} tokens, {tokens} in the loss, "
        f"{len(PIECES)} sequences packed into {rows}, {empty:.1%} of their room is empty"
    )
    unpacked = train(pt, [tiny("bloom")], texts, trainer={"packing": False, "max_steps": 1, "max_length": ROOM})
    assert "packed" not in unpacked.metrics


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_held_out_rows_that_are_not_packed_lose_nothing_either(tiny, train, texts, strategy):
    asked = {"packing_strategy": strategy, "eval_packing": False, "max_length": ROOM, "max_steps": 1}
    done = train(pt, [tiny("llama")], texts, eval_size=len(LENGTHS) - 1, trainer=asked)
    held = [tuple(ids) for ids in done.trainer.eval_dataset["input_ids"]]
    trained = list(chain(*done.trainer.train_dataset["input_ids"]))
    assert sum(map(len, held)) + len(trained) == sum(LENGTHS)
    assert max(map(len, held)) <= ROOM


# The same again


def test_a_stopped_packed_run_of_bloom_ends_with_the_same_bytes(tiny, train, texts, tmp_path, at, stop):
    def digest(folder):
        return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    asked = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "max_length": ROOM}
    asked = {"lora": {**LORA, "lora_dropout": 0.1}, "eval_size": 2, "trainer": asked}
    whole = train(pt, [tiny("bloom")], texts, **asked)
    with pytest.raises(Interrupted, match=r"^stopped at step 3 of 6$"):
        train(pt, [tiny("bloom")], texts, out=tmp_path, callback=at(3, "on_step_end", stop), **asked)
    again = train(pt, [tiny("bloom")], texts, out=tmp_path, **asked)
    assert digest(tmp_path) == digest(whole.out)
    assert again.metrics == whole.metrics


# Refused


UNPROVEN = (
    "packing is not verified for `gpt2`: packed rows might attend to each other (it is verified for `bloom`, "
    "`llama`, `qwen2`, `qwen3`); set "
)


@pytest.mark.parametrize(
    ("stage", "trainer", "config", "expected"),
    [
        (
            pt,
            {},
            {"model_type": "gpt2"},
            [
                (
                    "trainer.packing",
                    UNPROVEN + "`packing: false`, or `packing_strategy: wrapped`, which lets them",
                )
            ],
        ),
        (sft, {"packing": True}, {"model_type": "gpt2"}, [("trainer.packing", UNPROVEN + "`packing: false`")]),
        (
            pt,
            {"packing": False, "padding_free": True},
            {"model_type": "gpt2"},
            [("trainer.padding_free", UNPROVEN + "`padding_free: false`")],
        ),
        (
            sft,
            {"packing": True},
            {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            [
                (
                    "trainer.packing",
                    "`dynamic` position embeddings depend on the longest row of a batch, so packed rows would change "
                    "each other; set `packing: false`",
                )
            ],
        ),
        (
            sft,
            {"eval_packing": True},
            {"model_type": "bloom"},
            [("trainer.eval_packing", "without `packing` the held-out rows would attend to each other; remove it")],
        ),
        (
            sft,
            {"packing": True, "packing_strategy": "wrapped"},
            {"model_type": "bloom"},
            [
                (
                    "trainer.packing_strategy",
                    "`wrapped` lets rows attend to each other; remove it, and packed rows stay apart",
                )
            ],
        ),
        (pt, {"packing_strategy": "wrapped"}, {"model_type": "gpt2"}, []),
        (pt, {"packing": False}, {"model_type": "gpt2"}, []),
        (sft, {}, {"model_type": "gpt2"}, []),
        (pt, {"eval_packing": False}, {"model_type": "bloom"}, []),
        (sft, {"packing": True}, {"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, []),
    ],
)
def test_what_would_let_packed_rows_read_each_other_is_refused(rows, stage, trainer, config, expected):
    kind = "text" if stage is pt else "alpaca"
    asked = stage.Config(model="m", data=[rows(kind, 1)], template="{{ messages }}", trainer=trainer)
    facts = Facts("`m`", config, tokenizer={"eos_token": "</s>"})
    assert [
        problem
        for problem in [*stage.STAGE.check(asked), *stage.STAGE.check_model(asked, facts)]
        if problem[0].startswith("trainer")
    ] == expected


def test_a_model_that_was_unknown_while_planning_is_refused_before_it_is_trained():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    asked = {"packing": True, "packing_strategy": "bfd", "padding_free": False}
    with pytest.raises(StageError) as caught:
        packing.prepare(model, SimpleNamespace(**asked))
    assert str(caught.value) == UNPROVEN + "`packing: false`"
    packing.prepare(model, SimpleNamespace(**{**asked, "packing": False}))
    packing.prepare(model, SimpleNamespace(**{**asked, "packing_strategy": "wrapped"}))
