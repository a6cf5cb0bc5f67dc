"""Calls of tools in an answer are read back in the form that the template itself writes."""

import pytest
from test_official import MODELS, text_of

from stages.chat.template import template_text

pytestmark = pytest.mark.train
QWEN = ['{"name": "weather", "arguments": {"city": "%s"}}', "<tool_call>\n", "\n</tool_call>"]
LLAMA = ['{"name": "weather", "parameters": {"city": "%s"}}', "", ""]
WRITTEN = {
    **dict.fromkeys(("Qwen2.5", "Qwen3", "Qwen3-Instruct-2507", "QwQ", "chatml", "qwen"), QWEN),
    **dict.fromkeys(("Llama 3.1", "Llama 3.2", "llama3"), LLAMA),
}
"""Template → how its model writes a call of `weather`."""


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny("llama", template="qwen"))


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_read_as_the_model_writes_them(tokenizer, name):
    from stages.chat.calls import call_form

    tokenizer.chat_template = text_of(MODELS[name]) if name in MODELS else template_text(name)
    form, (call, before, after) = call_form(tokenizer), WRITTEN[name]
    calls = "\n".join(before + call % city + after for city in ("北京", "上海"))
    answer = f"<think>\nThe user wants the weather.\n</think>\n\n{calls}"
    text, found = form.read(answer, {"weather"})
    assert [one["arguments"] for one in found] == [{"city": "北京"}, {"city": "上海"}]
    assert text == "<think>\nThe user wants the weather.\n</think>"
    other = f"{before}{call.replace('weather', 'unknown') % 'x'}{after}"
    assert form.read(other, {"weather"}) == (other.strip(), [])


@pytest.mark.parametrize("name", ["Qwen3.5, 4B and larger", "GLM-4.5", "gpt-oss", "Gemma 3", "med"])
def test_a_form_that_is_no_json_is_not_read(tokenizer, name):
    from stages.chat.calls import call_form

    tokenizer.chat_template = text_of(MODELS[name]) if name in MODELS else template_text(name)
    assert call_form(tokenizer) is None
