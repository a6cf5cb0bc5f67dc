"""Conversations written as text with the chat template of a tokenizer."""

from functools import partial
from typing import TYPE_CHECKING, Any

from stages.chat.shapes import has_tools, shape
from stages.chat.trial import compile_template, has_clock, refusing, with_thoughts
from stages.chat.writing import Render, try_shape
from stages.data.row import Message, Tools

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    prompt: bool = False,
    tools: Tools | None = None,
) -> str:
    """The text of a conversation; with `prompt`, up to where the assistant's next turn begins.

    Raises:
        Refused: the template cannot render the conversation, or it does not write tools or their calls.
    """
    slow = partial(rendered, tokenizer)
    found = shape(messages, tools)
    if has_tools(found):
        try_shape(slow, lambda text: [], found, answered=False)
    return slow(messages, tools, prompt=prompt)


def rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Tools | None, *, prompt: bool = False
) -> str:
    """As `render`, but tools that the template does not write are not noticed.

    Raises:
        Refused: the template cannot render the conversation.
    """
    return refusing(partial(_by_transformers, tokenizer))(messages, tools, prompt=prompt)


def _by_transformers(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Tools | None, *, prompt: bool = False
) -> str:
    text: Any = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    return str(text)


# A faster way, for conversations without tools

_SYSTEM = {"role": "system", "content": "A system prompt."}
_QUESTION = {"role": "user", "content": "A question, 问题？"}
_ANSWER = {"role": "assistant", "content": '<b>An "answer"</b> & it\'s\n\n{{ 答案 }} 🙂'}
_THOUGHT = {**_ANSWER, "reasoning_content": "A thought, 思考。"}
_BLANK = [{"role": role, "content": content} for role, content in (("user", " \n"), ("assistant", ""))]
_PROBES = [
    [*system, *turns]
    for system in ([], [_SYSTEM], [{**_SYSTEM, "content": ""}])
    for turns in (
        [_QUESTION],
        [_QUESTION, _ANSWER],
        [_QUESTION, _ANSWER, _QUESTION],
        [_QUESTION, _THOUGHT],
        [_QUESTION, _ANSWER, {**_QUESTION, "content": " Another?\n"}, {**_ANSWER, "content": "  Yes.\t"}],
        _BLANK[:1],
        [*_BLANK, _QUESTION, _ANSWER],
    )
]
"""Conversations of the shapes that rows have: with and without a system prompt, of one and several turns, ending with
the user and with the assistant, with a thought, with blank and empty contents."""


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
    fast = _renderer(compiled, variables)
    return fast if all(map(partial(_same, fast, slow), _PROBES)) else slow


def _compiled(template: Any) -> "Template | None":
    """The compiled template; None if only transformers can render it, or if jinja2 lacks a private part used here."""
    from jinja2 import TemplateError

    if not isinstance(template, str) or has_clock(template):
        return None
    try:
        compiled = compile_template(template)
    except TemplateError:
        return None
    private = [(compiled, "root_render_func"), (compiled, "blocks"), (compiled.environment, "context_class")]
    return compiled if all(hasattr(owner, name) for owner, name in private) else None


def _renderer(compiled: "Template", variables: dict[str, Any]) -> Render:
    """As `Template.render`, but without its copy of all variables, which takes as long as the template itself."""
    environment, name, blocks = compiled.environment, compiled.name, compiled.blocks

    def fast(messages: list[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        given = {**variables, "messages": with_thoughts(messages), "add_generation_prompt": prompt}
        return "".join(compiled.root_render_func(environment.context_class(environment, given, name, blocks)))

    return refusing(fast)


def _same(first: Render, second: Render, messages: list[Message]) -> bool:
    """Whether both renderers write the same, or refuse with the same words."""
    return all(_outcome(first, messages, prompt) == _outcome(second, messages, prompt) for prompt in (False, True))


def _outcome(render: Render, messages: list[Message], prompt: bool) -> tuple[str, str]:
    try:
        return "", render(messages, None, prompt=prompt)
    except Exception as error:  # a template that fails on one probe may still render other conversations
        return type(error).__name__, str(error)
