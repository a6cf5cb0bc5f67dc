"""Thoughts and weights of rows, from the file to the labels."""

import json

import pytest

from stages.chat.encoder import Encoder
from stages.chat.encoding import encode
from stages.chat.labels import IGNORED
from stages.chat.template import install_template, template_text
from stages.chat.writing import Refused
from stages.data.source import Source, rows_of

pytestmark = pytest.mark.train

# In the shape of Qwen3's: only answers after the last question have a thought, be it an empty one.
QWEN3 = """\
{%- set last = namespace(question=0) %}
{%- for message in messages if message.role == 'user' %}{% set last.question = loop.index0 %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.index0 > last.question %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# In the shape of gpt-oss's: a thought is `thinking`, in a channel of its own.
GPT_OSS = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role }}
{%- if message.thinking is defined %}
{{- '|analysis|' + message.thinking + '<|im_end|><|im_start|>assistant' }}
{%- endif %}
{{- '|final|' + message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""


@pytest.fixture
def labelled(tiny, tmp_path):
    """A function that gives for a row and a template the whole text and the texts in the loss."""

    def of(row, template, **settings):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny("llama", template=None))
        install_template(tokenizer, template)
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
        source = Source(**{"path": str(path), "format": "messages", **settings})
        (found,) = encode(Encoder(tokenizer), rows_of(source))
        if isinstance(found, Refused):
            return str(found)
        texts = [tokenizer.decode([token for token in one.labels if token != IGNORED]) for one in found]
        return tokenizer.decode(found[0].ids), texts

    return of


def asked(*answers):
    turns = [({"role": "user", "content": f"问{n}"}, answer) for n, answer in enumerate(answers, 1)]
    return {"messages": [message for turn in turns for message in turn]}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_trained_through_the_template(labelled, key):
    _, texts = labelled(asked(said("4", **{key: "2+2=4"})), QWEN3)
    assert texts == ["<think>\n2+2=4\n</think>\n\n4<|im_end|>"]


def test_a_thought_reaches_a_template_of_gpt_oss(labelled):
    _, texts = labelled(asked(said("4", reasoning_content="2+2=4")), GPT_OSS)
    assert texts == ["|analysis|2+2=4<|im_end|><|im_start|>assistant|final|4<|im_end|>"]


def test_a_thought_in_the_words_is_trained_as_before(labelled):
    _, texts = labelled(asked(said("<think>\n2+2=4\n</think>\n\n4")), template_text("chatml"))
    assert texts == ["<think>\n2+2=4\n</think>\n\n4<|im_end|>"]


def test_a_thought_of_a_pair_is_trained_in_its_answer(labelled):
    row = {"prompt": "问", "chosen": said("4", reasoning_content="2+2=4"), "rejected": "5"}
    _, texts = labelled(row, QWEN3, format="preference")
    assert texts == ["<think>\n2+2=4\n</think>\n\n4<|im_end|>", "<think>\n\n</think>\n\n5<|im_end|>"]


def test_a_thought_that_the_template_leaves_out_is_refused(labelled):
    found = labelled(asked(said("4", reasoning_content="2+2=4")), template_text("chatml"))
    assert "the thought of message 2; write it into `content`, as `<think>…</think>`" in found


def test_an_earlier_thought_is_left_out_only_where_its_answer_is_not_trained(labelled):
    thought = {"reasoning_content": "想"}
    row = asked(said("甲", **thought), said("乙", **thought))
    found = labelled(row, QWEN3)
    assert "the thought of message 2; give that message `weight: 0`" in found
    text, texts = labelled(asked(said("甲", **thought, weight=0), said("乙", **thought)), QWEN3)
    assert texts == ["<think>\n想\n</think>\n\n乙<|im_end|>"]
    assert "<|im_start|>assistant\n甲<|im_end|>" in text


@pytest.mark.parametrize("weight", [{"weight": 0}, {"loss_weight": 0.0}, {"train": False}, {"weight": "0"}])
def test_a_turn_of_weight_0_is_in_the_prompt_and_not_in_the_loss(labelled, weight):
    text, texts = labelled(
        asked(said("甲", **weight), said("乙"), said("丙", **weight), said("丁")), template_text("chatml")
    )
    assert texts == ["乙<|im_end|>丁<|im_end|>"]
    assert all(answer in text for answer in "甲乙丙丁")


def test_a_leading_assistant_is_in_the_prompt_and_not_in_the_loss(labelled):
    row = {"messages": [said("你好。"), *asked(said("甲"))["messages"]]}
    text, texts = labelled(row, template_text("chatml"), turns="merge")
    assert texts == ["甲<|im_end|>"]
    assert text.startswith("<|im_start|>assistant\n你好。<|im_end|>")
