"""Packed documents in the attention of llama, qwen2 and qwen3: what they cost, and what stays as transformers does it.

tests/training/test_packing.py shows that logits, loss and gradients are those of each document alone.
"""

from importlib.metadata import version

import pytest

from stages.model import attention
from stages.model.folder import load_model
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

ADVICE = "transformers 5.23.0 is known to work: `pip install transformers==5.23.0`"
LENGTHS = [48, 2, 17, 5, 1, 30, 9, 17, 2, 40, 12, 48]


def batch_of(lengths, vocabulary=500):
    """A packed batch as TRL makes it."""
    import torch

    ids = torch.randint(vocabulary, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def alone(model, batch, lengths):
    """The logits of each document in a pass of its own, end to end."""
    import torch

    with torch.no_grad():
        return torch.cat(
            [model(input_ids=ids, use_cache=False).logits for ids in batch["input_ids"].split(lengths, 1)], 1
        )


def logits(model, batch):
    import torch

    with torch.no_grad():
        return model(**batch, use_cache=False).logits


@pytest.fixture
def models(tiny):
    """A model with this attention, and the same model without it."""

    def pair(architecture, **settings):
        folder = [str(tiny(architecture))]
        model, plain = load_model(folder, **settings), load_model(folder, **settings)
        assert attention.install(model)
        return model, plain

    return pair


# Cost


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_packed_batch_costs_what_its_documents_cost(models, monkeypatch, architecture):
    """No mask is made, and scores are computed within documents alone, rounded up to eight tokens."""
    import torch
    from transformers import masking_utils

    model, plain = models(architecture)
    batch, scores = batch_of(LENGTHS), []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, attn_mask=None, **others):
        assert attn_mask is None
        scores.append(query.shape[0] * query.shape[2] * key.shape[2])
        return real(query, key, value, **others)

    expected = alone(plain, batch, LENGTHS)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *args, **kwargs: pytest.fail("a mask was made"))
    found = logits(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    layers = model.config.num_hidden_layers
    assert sum(scores) == layers * sum(
        1 if length == 1 else (length + 7) // 8 * 64 * ((length + 7) // 8) for length in LENGTHS
    )
    assert len(scores) == layers * 7  # documents of 2 and 5 tokens, of 9 and 12, and so on share a call


def test_documents_are_found_once_a_batch(models, monkeypatch):
    model, _ = models("llama")
    model.train()
    model.gradient_checkpointing_enable()
    real, calls = attention.documents, []
    monkeypatch.setattr(attention, "documents", lambda positions: calls.append(1) or real(positions))
    model(**batch_of(LENGTHS), use_cache=False).logits.sum().backward()
    assert model.config.num_hidden_layers == 2
    assert calls == [1]


def test_documents_are_grouped_by_length():
    import torch

    found = attention.documents(batch_of([3, 12, 1, 8, 9])["position_ids"])
    assert found.groups == [(1, 1), (2, 8), (2, 16)]
    assert found.bounds.tolist() == [0, 3, 15, 16, 24, 33]
    assert found.longest == 12
    tokens = torch.arange(33)
    one, eight, sixteen = found.split(tokens)
    assert one.tolist() == [[15]]
    assert eight.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0], list(range(16, 24))]
    assert sixteen[1].tolist() == [*range(24, 33), *[24] * 7]
    assert found.join([one, eight, sixteen]).equal(tokens)


def test_rows_of_one_length_do_not_move():
    import torch

    found = attention.documents(torch.arange(16).repeat(3, 1))
    assert found.groups == [(3, 16)]
    assert found.order is None
    assert found.back is None


# Exact where transformers does something of its own


@pytest.mark.parametrize("window", [4, 16, 48])
def test_a_sliding_window_stays_within_a_document(models, window):
    import torch

    model, plain = models("qwen2")
    for each in (model, plain):
        each.config.sliding_window = window
        each.config.layer_types = ["full_attention", "sliding_attention"]
        each.model.has_sliding_layers = True
        each.model.layers[1].self_attn.sliding_window = window
    batch = batch_of(LENGTHS)
    found, expected = logits(model, batch), alone(plain, batch, LENGTHS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    plain.model.layers[1].self_attn.sliding_window = None
    plain.config.layer_types = ["full_attention", "full_attention"]
    whole = alone(plain, batch, LENGTHS)
    assert ((whole - expected).abs().max() > 1e-4) == (window < 48)  # the test would show a window that is ignored


def test_rows_with_padding_are_as_before(models):
    import torch

    model, plain = models("qwen3")
    mask = (torch.arange(20) < torch.tensor([20, 7, 13])[:, None]).long()
    batch = {"input_ids": batch_of([60])["input_ids"].view(3, 20), "attention_mask": mask}
    assert torch.equal(logits(model, batch)[mask == 1], logits(plain, batch)[mask == 1])


def test_generation_is_as_before(models):
    import torch

    model, plain = models("llama")
    ids = torch.tensor([[0, 5, 30, 31], [40, 41, 42, 43]])
    asked = {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, **asked), plain.generate(input_ids=ids, **asked))


def test_dropout_of_the_attention_is_kept(models):
    import torch

    model, _ = models("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = batch_of([8, 9])
    torch.manual_seed(0)
    assert not torch.equal(logits(model.train(), batch), logits(model, batch))
    assert torch.equal(logits(model.eval(), batch), logits(model, batch))


def test_what_is_saved_is_the_plain_model(models, tmp_path):
    model, plain = models("llama")
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_an_attention_that_the_user_chose_stays(tiny):
    model = load_model([str(tiny("llama"))], attn_implementation="eager")
    assert not attention.install(model)
    assert model.config._attn_implementation == "eager"


# Another transformers


def refusal(model):
    import torch

    state = torch.get_rng_state()
    with pytest.raises(StageError) as caught:
        attention.install(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)
    return str(caught.value)


def test_an_attention_with_other_parameters_is_refused(tiny, monkeypatch):
    from transformers import AttentionInterface

    def other(module, query, key, value, mask): ...

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", other)
    needed = f"`{other.__qualname__}(module, query, key, value, attention_mask, dropout=…, scaling=…, is_causal=…)`"
    expected = f"transformers {version('transformers')} has no {needed}, which this stage needs; {ADVICE}"
    assert refusal(load_model([str(tiny("llama"))])) == expected


def test_documents_that_attend_to_each_other_are_noticed(tiny, monkeypatch):
    """A transformers whose layers do not get what the hook adds would take a packed row for one document."""
    model = load_model([str(tiny("qwen3"))])
    real = type(model.model).forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return real(self, input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(type(model.model), "forward", forward)
    trouble = "runs the attention of `qwen3` in another way, so packed rows would attend to each other"
    assert refusal(model) == f"transformers {version('transformers')} {trouble}; {ADVICE}"


# torch's variable-length attention on CUDA, with one of plain torch in its place: no test has a GPU


def varlen_attn(query, key, value, starts, key_starts, longest, key_longest, *, scale, window_size, enable_gqa):
    """Each document in a call of its own, as torch documents `varlen_attn`."""
    import torch

    assert starts.dtype == key_starts.dtype == torch.int32
    assert longest == key_longest == int(starts.diff().max())
    assert window_size == (-1, 0)
    lengths = starts.diff().tolist()
    return torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in parts), is_causal=True, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
            for parts in zip(*(whole.split(lengths) for whole in (query, key, value)), strict=True)
        ]
    )


@pytest.fixture
def varlen(monkeypatch):
    """Put a function in the place of torch's `varlen_attn` and take it as on CUDA."""
    import torch
    from torch.nn.attention import varlen as module

    def place(function):
        monkeypatch.setattr(module, "varlen_attn", function)
        attention._varlen_is_right.cache_clear()
        return attention._varlen_is_right(torch.device("cpu"), torch.bfloat16, 4, 2, 16)

    yield place
    attention._varlen_is_right.cache_clear()


def test_variable_length_attention_gets_the_documents(models, varlen, monkeypatch):
    import torch

    assert varlen(varlen_attn)
    model, plain = models("llama")
    monkeypatch.setattr(attention, "_takes_varlen", lambda *parts: True)
    batch = batch_of(LENGTHS)
    torch.testing.assert_close(logits(model, batch), alone(plain, batch, LENGTHS), rtol=0, atol=1e-5)


def test_variable_length_attention_that_is_wrong_or_missing_is_not_taken(varlen):
    import torch

    def mixed(query, key, value, starts, *others, **settings):
        whole = torch.tensor([0, len(query)], dtype=torch.int32)
        return varlen_attn(query, key, value, whole, whole, len(query), len(query), **settings)

    def missing(*parts, **settings):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    assert not varlen(mixed)
    assert not varlen(missing)
    varlen(varlen_attn)
    assert not attention._varlen_is_right(torch.device("cpu"), torch.float32, 4, 2, 16)
