"""The fast renderer writes what transformers writes, or transformers is asked itself."""

import functools
from types import SimpleNamespace

import pytest
from jinja2 import Environment

from stages.chat import encoder as encoder_module
from stages.chat import rendering
from stages.chat.encoder import Encoder
from stages.chat.labels import encode_chats
from stages.chat.rendering import fast_renderer, rendered
from stages.chat.template import template_names, template_text
from stages.chat.trial import compile_template
from stages.chat.writing import Refused
from stages.runtime.errors import StageError

QUESTION = {"role": "user", "content": "发烧  怎么办？\n"}
ANSWER = {"role": "assistant", "content": "多喝水。<b>\"&'{{ 1 }} 😊"}
SYSTEM = {"role": "system", "content": "你是医生。"}
TALKS = [
    [QUESTION],
    [QUESTION, ANSWER],
    [SYSTEM, QUESTION, ANSWER, {**QUESTION, "content": ""}, {**ANSWER, "content": "\t"}],
    [{**SYSTEM, "content": ""}, QUESTION, ANSWER, QUESTION],
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of bytes, with the special tokens of every built-in template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.BPE({mark: number for number, mark in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def with_template(tokenizer, text):
    tokenizer.chat_template = text
    return tokenizer


def is_slow(render):
    return isinstance(render, functools.partial) and render.func is rendered


@pytest.mark.parametrize(
    "template", [CHATML, *map(template_text, template_names())], ids=["chatml file", *template_names()]
)
def test_what_is_written_fast_is_what_transformers_writes(tokenizer, template):
    render = fast_renderer(with_template(tokenizer, template))
    assert not is_slow(render)
    for messages in TALKS:
        for prompt in (False, True):
            assert render(messages, None, prompt=prompt) == rendered(tokenizer, messages, None, prompt=prompt)


DIFFERENCES = {
    "with a system prompt": "{% if messages[0]['role'] == 'system' %}!{% endif %}",
    "without a system prompt": "{% if messages[0]['role'] != 'system' %}!{% endif %}",
    "with an empty system prompt": "{% if messages[0] == {'role': 'system', 'content': ''} %}!{% endif %}",
    "of one turn": "{% if messages | length == 1 %}!{% endif %}",
    "of several turns": "{% if messages | length > 3 %}!{% endif %}",
    "ending with the user": "{% if messages[-1]['role'] == 'user' and not add_generation_prompt %}!{% endif %}",
    "ending with the assistant": "{% if messages[-1]['role'] == 'assistant' %}!{% endif %}",
    "with a prompt": "{% if add_generation_prompt %}!{% endif %}",
    "without a prompt": "{% if not add_generation_prompt %}!{% endif %}",
    "with an empty answer": "{% for m in messages if not m['content'] and m['role'] == 'assistant' %}!{% endfor %}",
    "with a blank question": "{% for m in messages if not m['content'].strip() and m['role'] == 'user' %}!{% endfor %}",
    "with quotes": "{% for m in messages if '\"' in m['content'] %}!{% endfor %}",
}


@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_difference_in_one_shape_of_conversation_is_found(tokenizer, monkeypatch, difference):
    monkeypatch.setattr(rendering, "compile_template", lambda text: compile_template(text + difference))
    assert is_slow(fast_renderer(with_template(tokenizer, CHATML)))


def test_a_refusal_that_only_one_of_them_makes_is_found(tokenizer, monkeypatch):
    refusing = CHATML + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setattr(rendering, "compile_template", lambda _: compile_template(CHATML))
    assert is_slow(fast_renderer(with_template(tokenizer, refusing)))


def test_a_template_that_refuses_some_conversations_is_fast_for_the_others(tokenizer):
    refusing = CHATML + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    render = fast_renderer(with_template(tokenizer, refusing))
    assert not is_slow(render)
    assert render(TALKS[1], None) == rendered(tokenizer, TALKS[1], None)
    with pytest.raises(StageError) as caught:
        render(TALKS[2], None)
    roles = "system, user, assistant, user, assistant"
    assert str(caught.value) == f"the chat template cannot render the roles {roles}: no system"


def test_a_template_that_fails_on_some_conversations_refuses_them(tokenizer):
    failing = CHATML + "{{ 1 // (messages | length - 1) }}"
    render = fast_renderer(with_template(tokenizer, failing))
    assert not is_slow(render)
    with pytest.raises(Refused) as caught:
        render(TALKS[0], None)
    said = "the chat template cannot render the roles user: integer division or modulo by zero"
    assert str(caught.value) == said
    with pytest.raises(Refused) as slow:
        rendered(tokenizer, TALKS[0], None)
    assert str(slow.value) == said


@pytest.mark.parametrize("text", ["{{ strftime_now(form) }}", "{% unknown_tag %}", None, {"default": CHATML}], ids=str)
def test_templates_that_need_transformers_are_left_to_it(tokenizer, text):
    assert is_slow(fast_renderer(with_template(tokenizer, text)))


@pytest.mark.parametrize("name", ["root_render_func", "blocks"])
def test_another_jinja2_without_a_private_part_of_a_template_is_not_used(tokenizer, monkeypatch, name):
    real = compile_template(CHATML)
    parts = {part: getattr(real, part) for part in ("globals", "environment", "name", "blocks", "root_render_func")}
    del parts[name]
    monkeypatch.setattr(rendering, "compile_template", lambda _: SimpleNamespace(**parts))
    assert is_slow(fast_renderer(with_template(tokenizer, CHATML)))


def test_another_jinja2_without_context_class_is_not_used(tokenizer, monkeypatch):
    compile_template(CHATML)
    monkeypatch.delattr(Environment, "context_class")
    assert is_slow(fast_renderer(with_template(tokenizer, CHATML)))


def test_another_jinja2_whose_contexts_are_made_differently_is_not_used(tokenizer, monkeypatch):
    real = compile_template(CHATML)
    parts = {part: getattr(real, part) for part in ("globals", "name", "blocks", "root_render_func")}
    parts["environment"] = SimpleNamespace(context_class=lambda environment, names: None)
    monkeypatch.setattr(rendering, "compile_template", lambda _: SimpleNamespace(**parts))
    assert is_slow(fast_renderer(with_template(tokenizer, CHATML)))


def test_an_encoder_probes_its_template_once(tokenizer, monkeypatch):
    probed = []
    monkeypatch.setattr(encoder_module, "fast_renderer", lambda given: (probed.append(given), fast_renderer(given))[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encoder = Encoder(with_template(tokenizer, CHATML))
    talks = [([QUESTION, ANSWER], None)] * 2
    assert encode_chats(encoder, talks) == encode_chats(encoder, talks)
    assert probed == [tokenizer]
