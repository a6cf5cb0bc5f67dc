"""Conversations rendered with the chat template of a tokenizer."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.chat.trial import TRIED, compile_template, left_out
from stages.data.row import Message, Tools
from stages.runtime.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Talk = tuple[list[Message], Tools | None]


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    prompt: bool = False,
    tools: Tools | None = None,
) -> str:
    """The text of a conversation; with `prompt`, up to where the assistant's next turn begins.

    Raises:
        StageError: the template cannot render these roles, or it would leave out tools or their calls.
    """
    refuse_left_out(tokenizer, has_tools((messages, tools)))
    return rendered(tokenizer, messages, tools, prompt=prompt)


def has_tools(talk: Talk) -> bool:
    messages, tools = talk
    return bool(tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in messages)


def refuse_left_out(tokenizer: "PreTrainedTokenizerBase", has_tools: bool) -> None:
    """
    Raises:
        StageError: a conversation has tools, and the template would leave them out.
    """
    trouble = left_out(rendered(tokenizer, *TRIED)) if has_tools else None
    if trouble is not None:
        raise StageError(trouble)


def rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Tools | None, *, prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        written: Any = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise StageError(f"the chat template cannot render the roles {roles}: {error}") from None
    return str(written)


def fast_renderer(tokenizer: "PreTrainedTokenizerBase", tried: Talk) -> Callable[..., str]:
    """`_rendered` at a sixth of its time: the template itself, if it writes the tried conversation just so.

    For conversations without tools.
    """
    from jinja2 import TemplateError

    slow = functools.partial(rendered, tokenizer)
    if not isinstance(tokenizer.chat_template, str) or "strftime_now" in tokenizer.chat_template:
        return slow
    compiled = compile_template(tokenizer.chat_template)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    given = {**compiled.globals, **special, "tools": None, "documents": None}
    environment, name, blocks = compiled.environment, compiled.name, compiled.blocks

    def fast(messages: list[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        # `Template.render` would copy the globals each time, which takes as long as the template itself.
        names = {**given, "messages": messages, "add_generation_prompt": prompt}
        try:
            return "".join(compiled.root_render_func(environment.context_class(environment, names, name, blocks)))
        except TemplateError:
            return slow(messages, tools, prompt=prompt)

    same = all(fast(*tried, prompt=prompt) == slow(*tried, prompt=prompt) for prompt in (False, True))
    return fast if same else slow
