"""Templates rendered without transformers, so that what they write for the data is known before a model is loaded."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from typing import TYPE_CHECKING, Any

from stages.chat.shapes import Shape
from stages.chat.writing import Refused, Render, try_shape
from stages.data.row import Message, Messages, Tools
from stages.runtime.errors import StageError

if TYPE_CHECKING:
    from jinja2 import Template


DAY = date(2024, 7, 26)
"""The date that templates write for `strftime_now`: that of Llama 3's own template where there is no clock."""

_CLOCK = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
_MARK = r"<[^<>\s]+>|\[[^\[\]\s]+\]"  # what looks like a special token
_CONTROL = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>")  # what can only be a special token
_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def has_clock(template: str) -> bool:
    """Whether a template writes the date of the day."""
    return "strftime_now(" in template


def without_clock(template: str) -> str:
    """The template with `DAY` in place of the date of the day, so that it writes the same on every day.

    Raises:
        StageError: the form of the date is not written out in the template.
    """
    fixed = _CLOCK.sub(lambda found: repr(DAY.strftime(found[1] or found[2] or "")), template)
    if has_clock(fixed):
        raise StageError(
            "the chat template writes the date of the day with `strftime_now`, in a form that is not written out in "
            "the call, so it cannot be fixed; write a date in place of the call"
        )
    return fixed


def without_generation_marks(content: str) -> str:
    """The template without `{% generation %}`, a tag of transformers that jinja2 does not know."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", content)


@functools.cache
def compile_template(template: str) -> "Template":
    """The template, compiled with the settings of transformers, with a fixed date.

    Raises:
        StageError: as `without_clock`.
        TemplateError: it is not valid Jinja.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": DAY.strftime}
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, **{"ensure_ascii": False, **more})
    return environment.from_string(without_generation_marks(without_clock(template)))


def special_tokens(tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens in tokenizer_config.json that templates use.

    A missing one may be known to the class of the tokenizer, and is an empty text here. One that is null is left out.
    """
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {name: _word(tokenizer.get(name)) for name in names if tokenizer.get(name, "") is not None}


def _word(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token or "")


def with_thoughts(messages: Messages) -> Messages:
    """The messages as transformers passes them to a template: a thought also under gpt-oss's name for it."""
    if not any("reasoning_content" in message for message in messages):
        return messages
    return [
        message
        if message.get("reasoning_content") is None
        else {"thinking": message["reasoning_content"], **message, "reasoning_content": message["reasoning_content"]}
        for message in messages
    ]


def refusing(render: Render) -> Render:
    """A renderer that raises Refused for a conversation that the template cannot render."""
    from jinja2 import TemplateError

    def refuses(messages: list[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        try:
            return render(messages, tools, prompt=prompt)
        except (TemplateError, *_FAILURES) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise Refused(f"the chat template cannot render the roles {roles}: {error}") from None

    return refuses


class Trial:
    """A template tried on the shapes of conversations with the files of a tokenizer, without transformers.

    `tokenizer` is the content of tokenizer_config.json; `has_token` tells whether a text is one token of it.
    """

    def __init__(self, template: str, tokenizer: Mapping[str, Any], has_token: Callable[[str], bool]) -> None:
        self.template, self.has_token, self.special = template, has_token, special_tokens(tokenizer)
        self.end = self.special.get("eos_token", "")
        self.mark = re.compile(f"{re.escape(self.end)}|{_MARK}" if self.end else _MARK)

    def find_marks(self, text: str) -> list[re.Match[str]]:
        """What looks like special tokens and is one token of the tokenizer."""
        return [mark for mark in self.mark.finditer(text) if mark[0] == self.end or self.has_token(mark[0])]

    def render(self, messages: list[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        """A conversation as text. Raises jinja2's errors, and any error of the template's own operations."""
        given = {"messages": with_thoughts(messages), "tools": tools, "documents": None}
        return compile_template(self.template).render(add_generation_prompt=prompt, **given, **self.special)

    def refusal(self, shape: Shape, *, answered: bool = True) -> str | None:
        """Why the template cannot be used for conversations of a shape; None if it can. As `try_shape`."""
        try:
            try_shape(refusing(self.render), self.find_marks, shape, answered=answered)
        except Refused as error:
            return str(error)
        return None

    def unknown(self, shapes: Iterable[Shape]) -> list[str]:
        """What the template writes for these shapes that looks like a special token, and is none; sorted."""
        found: set[str] = set()
        for shape in shapes:
            try:
                text = try_shape(refusing(self.render), self.find_marks, shape, answered=False)
            except Refused:
                continue
            found.update(mark for mark in _CONTROL.findall(text) if not self.has_token(mark))
        return sorted(found)
