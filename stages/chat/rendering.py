"""Conversations written as text with the chat template of a tokenizer."""

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from stages.chat.trial import TRIED, compile_template, left_out
from stages.data.row import Message, Tools
from stages.runtime.errors import StageError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase


Talk = tuple[list[Message], Tools | None]
"""A conversation and the tools that it declares."""


class Render(Protocol):
    """Writes a conversation as text; with `prompt`, up to where the assistant's next turn begins."""

    def __call__(self, messages: list[Message], tools: Tools | None, *, prompt: bool = False) -> str: ...


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    prompt: bool = False,
    tools: Tools | None = None,
) -> str:
    """The text of a conversation; with `prompt`, up to where the assistant's next turn begins.

    Raises:
        StageError: the template cannot render these roles, or it does not write tools or their calls.
    """
    refuse_left_out(tokenizer, has_tools((messages, tools)))
    return rendered(tokenizer, messages, tools, prompt=prompt)


def has_tools(talk: Talk) -> bool:
    """Whether a conversation declares tools, calls one, or has the answer of one."""
    messages, tools = talk
    return bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)


def refuse_left_out(tokenizer: "PreTrainedTokenizerBase", has_tools: bool) -> None:
    """
    Raises:
        StageError: a conversation has tools, and the template does not write them.
    """
    trouble = left_out(rendered(tokenizer, *TRIED)) if has_tools else None
    if trouble is not None:
        raise StageError(trouble)


def rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Tools | None, *, prompt: bool = False
) -> str:
    """As `render`, but tools that the template does not write are not noticed.

    Raises:
        StageError: the template cannot render these roles.
    """
    from jinja2 import TemplateError

    try:
        text: Any = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise StageError(f"the chat template cannot render the roles {roles}: {error}") from None
    return str(text)


# A faster way, for conversations without tools

_SYSTEM = {"role": "system", "content": "A system prompt."}
_QUESTION = {"role": "user", "content": "A question, 问题？"}
_ANSWER = {"role": "assistant", "content": '<b>An "answer"</b> & it\'s\n\n{{ 答案 }} 🙂'}
_BLANK = [{"role": role, "content": content} for role, content in (("user", " \n"), ("assistant", ""))]
_PROBES = [
    [*system, *turns]
    for system in ([], [_SYSTEM], [{**_SYSTEM, "content": ""}])
    for turns in (
        [_QUESTION],
        [_QUESTION, _ANSWER],
        [_QUESTION, _ANSWER, _QUESTION],
        [_QUESTION, _ANSWER, {**_QUESTION, "content": " Another?\n"}, {**_ANSWER, "content": "  Yes.\t"}],
        _BLANK[:1],
        [*_BLANK, _QUESTION, _ANSWER],
    )
]
"""Conversations of the shapes that rows have: with and without a system prompt, of one and several turns, ending with
the user and with the assistant, with blank and empty contents."""


def fast_renderer(tokenizer: "PreTrainedTokenizerBase") -> Render:
    """As `rendered` for conversations without tools, in a quarter of its time.

    jinja2 renders the template directly if it writes every probe as transformers does, or else transformers renders it.
    """
    slow = partial(rendered, tokenizer)
    compiled = _compiled(tokenizer.chat_template)
    if compiled is None:
        return slow
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    variables = {**compiled.globals, **special, "tools": None, "documents": None}
    fast = _renderer(compiled, variables, slow)
    return fast if all(map(partial(_same, fast, slow), _PROBES)) else slow


def _compiled(template: Any) -> "Template | None":
    """The compiled template; None if only transformers can render it, or if jinja2 lacks a private part used here."""
    from jinja2 import TemplateError

    if not isinstance(template, str) or "strftime_now" in template:
        return None
    try:
        compiled = compile_template(template)
    except TemplateError:
        return None
    private = [(compiled, "root_render_func"), (compiled, "blocks"), (compiled.environment, "context_class")]
    return compiled if all(hasattr(owner, name) for owner, name in private) else None


def _renderer(compiled: "Template", variables: dict[str, Any], slow: Render) -> Render:
    """As `Template.render`, but without its copy of all variables, which takes as long as the template itself."""
    from jinja2 import TemplateError

    environment, name, blocks = compiled.environment, compiled.name, compiled.blocks

    def fast(messages: list[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        given = {**variables, "messages": messages, "add_generation_prompt": prompt}
        try:
            return "".join(compiled.root_render_func(environment.context_class(environment, given, name, blocks)))
        except TemplateError:
            return slow(messages, tools, prompt=prompt)

    return fast


def _same(first: Render, second: Render, messages: list[Message]) -> bool:
    """Whether both renderers write the same, or refuse with the same words."""
    return all(_outcome(first, messages, prompt) == _outcome(second, messages, prompt) for prompt in (False, True))


def _outcome(render: Render, messages: list[Message], prompt: bool) -> tuple[str, str]:
    try:
        return "", render(messages, None, prompt=prompt)
    except Exception as error:  # a template that fails on one probe may still render other conversations
        return type(error).__name__, str(error)
