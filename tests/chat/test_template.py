"""A template's name or file in, its text out; a template that cannot be used is refused."""

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stages.chat.template import template_names, template_text
from stages.chat.trial import Trial, without_clock
from stages.runtime.errors import StageError

TURNS = [
    {"role": "user", "content": "感冒了？"},
    {"role": "assistant", "content": "多喝水。"},
    {"role": "user", "content": "还有呢？"},
]
SYSTEM = [{"role": "system", "content": "你是医生。"}, *TURNS[:1]]


def rendered(template, messages, **more):
    """The template's text under the settings that transformers renders with."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, eos_token="</s>", bos_token="<s>", **more)


def refusal(template):
    with pytest.raises(StageError) as error:
        template_text(template)
    return str(error.value)


EXPECTED = {
    "med": "下面是一个问题，运用医学知识来正确回答提问。\n"
    "### 问题:\n感冒了？\n### 回答:\n多喝水。</s>\n### 问题:\n还有呢？\n### 回答:\n",
    "alpaca_zh": "### 指令:\n感冒了？\n\n### 回答:\n多喝水。</s>\n\n### 指令:\n还有呢？\n\n### 回答:\n",
    "plain": "感冒了？\n多喝水。</s>\n还有呢？\n",
    "chatml": "<|im_start|>user\n感冒了？<|im_end|>\n<|im_start|>assistant\n多喝水。<|im_end|>\n"
    "<|im_start|>user\n还有呢？<|im_end|>\n<|im_start|>assistant\n",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n感冒了？<|im_end|>\n"
    "<|im_start|>assistant\n多喝水。<|im_end|>\n<|im_start|>user\n还有呢？<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n感冒了？<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n多喝水。<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n还有呢？<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


def test_every_built_in_template_is_known_here():
    assert template_names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_built_in_template_writes_a_conversation(name):
    assert rendered(template_text(name), TURNS, add_generation_prompt=True) == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_prompt_is_how_the_trained_text_begins(name):
    prompt = rendered(template_text(name), TURNS[:1], add_generation_prompt=True)
    whole = rendered(template_text(name), TURNS[:2], add_generation_prompt=False)
    assert whole.startswith(prompt + "多喝水。")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("med", "你是医生。\n### 问题:\n感冒了？\n### 回答:\n"),
        ("alpaca_zh", "你是医生。\n\n### 指令:\n感冒了？\n\n### 回答:\n"),
        ("plain", "你是医生。\n感冒了？\n"),
        ("qwen", "<|im_start|>system\n你是医生。<|im_end|>\n<|im_start|>user\n感冒了？<|im_end|>\n"),
    ],
)
def test_a_system_message_takes_the_place_of_the_template_s_own(name, expected):
    assert rendered(template_text(name), SYSTEM) == expected


PROMPT = {
    "description": "Template used by the tutorials.",
    "prompt_input": "### 问题:\n{instruction}\n{input}\n### 回答:\n",
    "prompt_no_input": '问 "题"\\:\n### 问题:\n{instruction}\n### 回答:\n',
    "response_split": "### 回答:",
}


def test_a_prompt_template_of_the_tutorials_becomes_a_chat_template(tmp_path):
    path = tmp_path / "med.json"
    path.write_text(json.dumps(PROMPT, ensure_ascii=False), encoding="utf-8")
    ask = '问 "题"\\:\n### 问题:\n{}\n### 回答:\n'
    wanted = ask.format("感冒了？") + "多喝水。</s>\n" + ask.format("还有呢？")
    assert rendered(template_text(str(path)), TURNS, add_generation_prompt=True) == wanted
    assert rendered(template_text(str(path)), SYSTEM) == "你是医生。\n" + ask.format("感冒了？")


@pytest.mark.parametrize("ask", ["{{ 7 * 7 }}{instruction}{% raw %}", "{instruction}'\"\\n", "{# {instruction} #}"])
def test_jinja_inside_a_prompt_template_is_plain_text(tmp_path, ask):
    path = tmp_path / "med.json"
    path.write_text(json.dumps({"prompt_no_input": ask}), encoding="utf-8")
    assert rendered(template_text(str(path)), TURNS[:1]) == ask.replace("{instruction}", "感冒了？")


def test_a_jinja_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "own.jinja"
    content = "{%- for m in messages %}{% if m.content == '' %}{% continue %}{% endif %}{% generation %}{{ m.content }}"
    content += "{{ eos_token }}{% endgeneration %}{% endfor %}\n"
    path.write_text(content, encoding="utf-8")
    assert template_text(str(path)) == content


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "zzz",
            None,
            "there is no template `zzz` (a name, a .jinja or a .json file); "
            "there is `alpaca_zh`, `chatml`, `llama3`, `med`, `plain`, `qwen`",
        ),
        ("own.jinja", None, "the template `own.jinja` cannot be read (No such file or directory)"),
        ("own.jinja", "感冒".encode("gb18030"), "the template `own.jinja` cannot be read (not UTF-8)"),
        (
            "own.jinja",
            b"{% for m in messages %}\n{{ m.content }}\n",
            "the template `own.jinja` is not valid Jinja: line 2: Unexpected end of template. Jinja was looking for "
            "the following tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'.",
        ),
        *[
            (
                "own.json",
                content,
                "the template `own.json` is not a prompt template: it needs `prompt_no_input` with one `{instruction}` "
                "in it",
            )
            for content in (
                *(b"", b"[1]", b"{", b'"text"', b"{}", b'{"prompt_no_input": "no place"}'),
                *(b'{"prompt_no_input": "{instruction} {instruction}"}', b'{"prompt_no_input": 3}'),
            )
        ],
    ],
)
def test_what_is_no_template_is_refused(tmp_path, monkeypatch, name, content, expected):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert refusal(name) == expected


# The date of the day


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ("strftime_now('%d %b %Y')", "26 Jul 2024"),
        ('strftime_now( "%Y-%m-%d" )', "2024-07-26"),
        ("strftime_now('%B') + ' ' + strftime_now('%A')", "July Friday"),
        ("'it is ' + strftime_now('it''s %Y')", None),
        ("strftime_now(form)", None),
    ],
)
def test_the_date_of_the_day_is_fixed_where_its_form_is_written_out(call, written):
    template = f"{{%- if strftime_now is defined -%}}{{{{- {call} -}}}}{{%- endif -%}}"
    if written is not None:
        fixed = without_clock(template)
        assert "strftime_now(" not in fixed
        assert rendered(fixed, TURNS, strftime_now=lambda form: pytest.fail("asked for the time")) == written
        assert Trial(template, {}, bool).render(TURNS, None) == written
        return
    with pytest.raises(StageError) as error:
        without_clock(template)
    assert str(error.value) == (
        "the chat template writes the date of the day with `strftime_now`, in a form that is not written out in the "
        "call, so it cannot be fixed; write a date in place of the call"
    )


def test_a_template_without_a_date_stays_as_it_is():
    for name in template_names():
        assert without_clock(template_text(name)) == template_text(name)
