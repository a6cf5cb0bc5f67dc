"""Tool calls in the text of an answer, read back in the form in which the chat template writes them."""

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.chat.rendering import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME, _KEY, _VALUE = "probe_call", "probe_key", "probe_value"
_CALL = {"type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": "d", "parameters": {"type": "object"}}}
_QUESTION = {"role": "user", "content": "A question."}


@dataclass(frozen=True)
class CallForm:
    """How a template writes a call: `before`, a JSON object with the name and the arguments, `after`."""

    before: str
    after: str
    name: str
    """The key of the function's name in the JSON object."""
    arguments: str
    """The key of the arguments in the JSON object."""

    def read(self, answer: str, known: set[str]) -> tuple[str, list[dict[str, Any]]]:
        """The text outside the calls, and the calls as {name, arguments}.

        `known` are the names of the declared tools. Text that is not a whole call of one of them stays text.
        """
        text, place = "", 0
        found: list[dict[str, Any]] = []
        while True:
            start = answer.find(self.before + "{", place) if self.before else _object(answer, place)
            if start < 0:
                return (text + answer[place:]).strip(), found
            call, end = _decoded(answer, start + len(self.before))
            if call is None or call.get(self.name) not in known or not isinstance(call.get(self.arguments, {}), dict):
                text, place = text + answer[place : start + 1], start + 1
                continue
            text, place = text + answer[place:start], end
            if self.after and answer.startswith(self.after, place):
                place += len(self.after)
            found.append({"name": call[self.name], "arguments": call.get(self.arguments, {})})


def _object(answer: str, place: int) -> int:
    return answer.find("{", place)


def _decoded(text: str, place: int) -> tuple[dict[str, Any] | None, int]:
    """The JSON object that begins at a place, and where it ends; None if there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        return None, place
    return (value if isinstance(value, dict) else None), end


def call_form(tokenizer: "PreTrainedTokenizerBase") -> CallForm | None:
    """The form of the template of a tokenizer, learned from what it writes for a call; None if it is not JSON.

    Raises:
        StageError: the template cannot render a call.
    """
    tools = [_TOOL]
    prompt = rendered(tokenizer, [_QUESTION], tools, prompt=True)
    called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    whole = rendered(tokenizer, [_QUESTION, called], tools)
    plain = rendered(tokenizer, [_QUESTION, {"role": "assistant", "content": "@"}], tools)
    # A prompt may open a thought, which history leaves out.
    common = os.path.commonprefix([prompt, whole, plain])  # noqa: RUF071  texts, not paths
    if _QUESTION["content"] not in common:
        return None
    opening, _, ending = plain[len(common) :].partition("@")
    written = whole[len(common) :].removeprefix(opening)  # an empty thought is no part of the call
    written = written[: -len(ending)] if ending and written.endswith(ending) else written
    start = written.find("{")
    call, end = _decoded(written, start) if start >= 0 else (None, 0)
    if call is None:
        return None
    name = next((key for key, value in call.items() if value == _NAME), None)
    arguments = next((key for key, value in call.items() if value == {_KEY: _VALUE}), None)
    if name is None or arguments is None:
        return None
    return CallForm(written[:start].lstrip(), written[end:].rstrip(), name, arguments)
