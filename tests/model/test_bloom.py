"""Another transformers, under which BLOOM's packed rows would attend to each other, is refused when a stage starts.

tests/training/test_packing.py shows that the installed one keeps them apart.
"""

from importlib.metadata import version

import pytest

from stages.model import bloom
from stages.model.folder import load_model
from stages.runtime.errors import StageError

pytestmark = pytest.mark.train

ADVICE = "transformers 5.23.0 is known to work: `pip install transformers==5.23.0`"


@pytest.fixture
def model(tiny):
    return load_model([str(tiny("bloom"))])


def refusal(model):
    forward = model.transformer.h[0].self_attention.forward
    with pytest.raises(StageError) as caught:
        bloom.install(model)
    assert model.transformer.h[0].self_attention.forward == forward
    return str(caught.value)


def needed(name):
    return f"transformers {version('transformers')} has no `{name}`, which this stage needs; {ADVICE}"


def test_the_installed_version_is_accepted_and_no_random_number_is_drawn(model):
    import torch

    state = torch.get_rng_state()
    bloom.install(model)
    assert torch.equal(torch.get_rng_state(), state)
    bloom.install(model)


def test_a_method_that_is_gone_is_named(model, monkeypatch):
    monkeypatch.delattr(type(model.transformer), "build_alibi_tensor")
    assert refusal(model) == needed("BloomModel.build_alibi_tensor")


def test_an_attribute_that_is_gone_is_named(model, monkeypatch):
    monkeypatch.delattr(model.transformer.h[0].self_attention, "head_dim")
    assert refusal(model) == needed("BloomAttention.head_dim")


def attention(self, hidden_states, alibi, residual, attention_mask, layer_past=None, **kwargs): ...
def alibi_tensor(self, attention_mask, dtype, num_heads): ...
def body(self, input_ids=None, attention_mask=None, cache=None, use_cache=None, **kwargs): ...


SIGNATURES = {
    "BloomAttention.forward(self, hidden_states, residual, alibi)": ("attention", "forward", attention),
    "BloomModel.build_alibi_tensor(self, attention_mask, num_heads, dtype)": (
        "body",
        "build_alibi_tensor",
        alibi_tensor,
    ),
    "BloomModel.forward(self, input_ids, attention_mask=…, past_key_values=…, use_cache=…)": ("body", "forward", body),
}


@pytest.mark.parametrize("missing", SIGNATURES)
def test_a_signature_that_is_another_is_named(model, monkeypatch, missing):
    owner, name, changed = SIGNATURES[missing]
    parts = {"attention": model.transformer.h[0].self_attention, "body": model.transformer}
    changed.__qualname__ = missing.partition("(")[0]
    monkeypatch.setattr(type(parts[owner]), name, changed)
    assert refusal(model) == needed(missing)


def test_documents_that_attend_to_each_other_are_noticed(model, monkeypatch):
    """A transformers that computes ALiBi without `build_alibi_tensor` would never see where a document begins."""
    real = type(model.transformer).forward

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        return real(self, input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs)

    monkeypatch.setattr(type(model.transformer), "forward", forward)
    trouble = "runs the attention of `bloom` in another way, so packed rows would attend to each other"
    assert refusal(model) == f"transformers {version('transformers')} {trouble}; {ADVICE}"
