"""Templates are tried on a conversation without transformers, so that faults are known before a model is loaded."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from stages.data.row import Message, Tools

if TYPE_CHECKING:
    from jinja2 import Template


# A conversation with a tool, and the words that a template must write of it.
_TOOL = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
_CALL = {"name": "probe_call", "arguments": {"probe_key": "probe_value"}}
TRIED: tuple[list[Message], Tools] = (
    [
        {"role": "user", "content": "A question."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _CALL}]},
        {"role": "tool", "content": "probe_output"},
        {"role": "assistant", "content": "An answer."},
    ],
    [{"type": "function", "function": _TOOL}],
)
_WRITTEN = {
    "probe_tool": "the tools",
    "probe_call": "tool calls",
    "probe_key": "the arguments of tool calls",
    "probe_value": "the arguments of tool calls",
    "probe_output": "what tools give back",
}


def without_generation_marks(content: str) -> str:
    """The template without `{% generation %}`, a tag of transformers that jinja2 does not know."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", content)


def try_template(template: str, tokenizer: Mapping[str, Any], has_token: Callable[[str], bool]) -> str | None:
    """What is wrong with a template, found without transformers; None if it renders a question and its answer.

    `tokenizer` is the content of tokenizer_config.json; `has_token` tells whether a text is one token of it.
    """
    from jinja2 import TemplateError

    special = special_tokens(tokenizer)
    answer = "An answer."
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    try:
        compiled = compile_template(template)
        full = compiled.render(messages=turns, add_generation_prompt=False, **special)
        prompt = compiled.render(messages=turns[:1], add_generation_prompt=True, **special)
    except (TemplateError, TypeError, ValueError) as error:
        return f"the template cannot render a question and its answer: {error}"
    if answer not in full or not full.startswith(prompt):
        return "the template's prompt is not how the conversation with its answer begins, so it cannot be trained with"
    after = full.partition(answer)[2].strip()
    mark = re.match(r"<[^<>\s]+>|\[[^\[\]\s]+\]", after)
    if not after.startswith(special["eos_token"]) and not (mark and has_token(mark[0])):
        shown = f"`{mark[0]}`, which the tokenizer does not know as one token" if mark else f"`{after[:20]}`"
        return f"the template ends the assistant's turn with {shown}; end it with `{{{{ eos_token }}}}`"
    return None


@functools.cache
def compile_template(template: str) -> "Template":
    """The template, compiled with the settings of transformers."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, **{"ensure_ascii": False, **more})
    return environment.from_string(without_generation_marks(template))


def special_tokens(tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens in tokenizer_config.json that templates use; an empty text for a missing one."""
    return {name: _word(tokenizer.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}


def try_tools(template: str, tokenizer: Mapping[str, Any]) -> str | None:
    """What is wrong with a template for rows with tools, found without transformers; None if it writes tools."""
    from jinja2 import TemplateError

    messages, tools = TRIED
    try:
        written = compile_template(template).render(
            messages=messages, tools=tools, add_generation_prompt=False, **special_tokens(tokenizer)
        )
    except (TemplateError, TypeError, ValueError) as error:
        return f"the template cannot render tool calls ({error}); {_OTHER}"
    return left_out(written)


_OTHER = "choose `template: chatml`, `llama3` or `qwen`, or remove rows with tools"


def left_out(written: str) -> str | None:
    """What is missing in the text of the tried conversation; None if nothing is."""
    missing = dict.fromkeys(what for probe, what in _WRITTEN.items() if probe not in written)
    return f"the template does not write {', '.join(missing)}; {_OTHER}" if missing else None


def _word(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token or "")
