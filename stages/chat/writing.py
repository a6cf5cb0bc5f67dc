"""A conversation as text, and the place of each answer in it: the same while planning and in a stage.

An answer begins where the prompt ends that a server would send (the conversation up to there, rendered with
`add_generation_prompt`), and ends at the first special token after its words. A conversation for which the template
does not write it so is refused.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from stages.chat.shapes import Shape, in_loss, probe
from stages.data.row import Message, Messages, Tools
from stages.runtime.errors import StageError


class Render(Protocol):
    """Writes a conversation as text; with `prompt`, up to where the assistant's next turn begins."""

    def __call__(self, messages: list[Message], tools: Tools | None, *, prompt: bool = False) -> str: ...


Marks = Callable[[str], list[re.Match[str]]]
"""Finds the special tokens of a tokenizer in a text."""

Talk = tuple[Messages, Tools | None]
"""A conversation and the tools that it declares."""


class Refused(StageError):
    """A template cannot be used for one conversation. The message is the reason, and what to do."""


class Turn(NamedTuple):
    """An answer that is in the loss."""

    begin: int
    """Characters of the text before the answer: the prompt."""
    before: int
    """Special tokens in the prompt."""
    end: int
    """The number of the special token that ends the answer, among those of the text."""


class Written(NamedTuple):
    """A conversation as text."""

    text: str
    marks: list[re.Match[str]]
    """The special tokens in the text."""
    turns: list[Turn]


def write(render: Render, find_marks: Marks, talk: Talk, *, last_only: bool = False) -> Written:
    """Write a conversation with a template; with `last_only` only its last message is in the loss.

    Raises:
        Refused: the template cannot render the conversation, or one of its answers is not written after the prompt
            with all of its words and a special token at its end.
    """
    messages, tools = talk
    text = render(messages, tools)
    asked = [number for number in range(len(messages)) if _is_asked(messages, number, last_only)]
    prompts = [render(messages[:number], tools, prompt=True) for number in asked]
    if asked and asked[-1] == len(messages) - 1 and not text.startswith(prompts[-1]):
        text = _after_opened_thought(prompts[-1], messages, text)
    for number, prompt in zip(asked, prompts, strict=True):
        if not text.startswith(prompt):
            raise Refused(_OTHER_PROMPT.format(number + 1) + (_GIVEN if number < asked[-1] else ""))
    marks, turns = find_marks(text), list[Turn]()
    limits = [*map(len, prompts[1:]), len(text)]
    before = 0
    for number, prompt, limit in zip(asked, prompts, limits, strict=True):
        while before < len(marks) and marks[before].end() <= len(prompt):
            before += 1
        stop = _end_of_words(text, len(prompt), limit, messages, number)
        if messages[number].get("tool_calls"):
            end = _end_of_calls(render, (messages[: number + 1], tools), text, stop, marks)
        else:
            end = next((place for place in range(before, len(marks)) if marks[place].start() >= stop), len(marks))
            if end == len(marks) or text[stop : marks[end].start()].strip():
                raise Refused(NO_END)
        turns.append(Turn(len(prompt), before, end))
    return Written(text, marks, turns)


def _is_asked(messages: Messages, number: int, last_only: bool) -> bool:
    last = number == len(messages) - 1
    return messages[number]["role"] == "assistant" and (last if last_only else in_loss(messages[number]))


# Reasons

_GIVEN = "; give that message `weight: 0`, so that only later answers are trained"
_IN_CONTENT = "; write it into `content`, as `<think>…</think>` before the words"
_OTHER_PROMPT = "the prompt that the chat template writes for message {} is not how the whole conversation begins"
NO_END = (
    "the chat template does not end the assistant's turn with a special token, so the model could not learn "
    "to stop; end it with `{{ eos_token }}` or choose a built-in `template:`"
)
WITH_TOOLS = "choose `template: chatml`, `llama3` or `qwen`, or remove rows with tools"
_NO_THOUGHT = (
    "the chat template's prompt opens a thought with `<think>`, and the answer has none; write the thought before the "
    "answer, as `<think>…</think>`"
)


def _left_out(what: str, number: int) -> str:
    return f"the chat template leaves out or changes the {what} of message {number + 1}"


# The words of an answer


def _thought_and_words(message: Message) -> tuple[str, str]:
    """The thought of an answer, if it has one, and the words after the thought."""
    content = str(message["content"]).strip()
    if "</think>" not in content:
        return str(message.get("reasoning_content") or "").strip(), content
    head, _, words = content.rpartition("</think>")
    return (head.partition("<think>")[2] if "<think>" in head else head).strip(), words.strip()


def _end_of_words(text: str, begin: int, limit: int, messages: Messages, number: int) -> int:
    """The place in the text where the words of an answer end; it is somewhere between `begin` and `limit`."""
    thought, words = _thought_and_words(messages[number])
    if thought:
        begin = text.find(thought, begin, limit) + len(thought)
        if begin < len(thought):
            way = _IN_CONTENT if "reasoning_content" in messages[number] else ""
            raise Refused(_left_out("thought", number) + (_GIVEN if number < len(messages) - 1 else way))
    found = text.find(words or "</think>", begin, limit) if thought or words else begin
    if found < 0:
        raise Refused(_left_out("words", number))
    return found + len(words or "</think>" * bool(thought))


def _after_opened_thought(prompt: str, messages: Messages, text: str) -> str:
    """The conversation with its last answer after a prompt that opens a thought.

    The template of such a model (DeepSeek-R1-Distill, QwQ) leaves thoughts out of every answer that is finished, so it
    never writes what the model itself says after the prompt. That is the rest of the thought, and the answer.
    """
    message = messages[-1]
    opened = re.search(r"<think>(\s*)\Z", prompt)
    thought, words = _thought_and_words(message)
    after = text.rpartition(words)[2] if words else ""
    if opened is None or message.get("tool_calls") or not after:
        raise Refused(_OTHER_PROMPT.format(len(messages)))
    if not thought:
        raise Refused(_NO_THOUGHT)
    content = str(message["content"]).strip()
    said = content if "</think>" in content else f"{thought}\n</think>\n\n{content}"
    said = said.removeprefix("<think>")
    return prompt + (said.removeprefix(opened[1]) if opened[1] else said) + after


# Tool calls

_EMPTY_THOUGHT = re.compile(r"\A<think>\s*</think>\s*")


def _end_of_calls(render: Render, upto: Talk, text: str, begin: int, marks: Sequence[re.Match[str]]) -> int:
    """The number of the special token that ends the tool calls: the last one of their turn.

    `upto` is the conversation up to this turn. Qwen3's own template writes an empty thought before its last turn only.
    """
    written = render(*upto)
    number = len(upto[0]) - 1
    prompt = render(upto[0][:-1], upto[1], prompt=True)
    turn = written[len(prompt) :]
    turn = turn if text.startswith(prompt + turn) else _EMPTY_THOUGHT.sub("", turn)
    if not written.startswith(prompt) or not text.startswith(prompt + turn):
        raise Refused(
            f"the chat template writes message {number + 1} differently once the conversation goes on{_GIVEN}"
        )
    for call in upto[0][-1]["tool_calls"]:
        if call["function"]["name"] not in turn:
            raise Refused(f"the chat template leaves out a tool call of message {number + 1}; {WITH_TOOLS}")
    stop = len(prompt + turn)
    ends = [place for place, mark in enumerate(marks) if mark.start() >= begin and mark.end() <= stop]
    if not ends:
        raise Refused(NO_END)
    return ends[-1]


# Shapes


def try_shape(render: Render, find_marks: Marks, shape: Shape, *, answered: bool = True) -> str:
    """Try a template with a conversation of a shape; returns the text that it writes.

    `answered`: the answers must be usable for training. Without it, only their words must be written, not their
    thoughts, which many templates leave out of an answer that is finished.

    Raises:
        Refused: the template cannot be used for conversations of this shape.
    """
    messages, tools = probe(shape)
    text = render(messages, tools, prompt=messages[-1]["role"] != "assistant")
    lost = list(dict.fromkeys(what for what, word in _words(messages, tools) if word not in text))
    if lost:
        way = f"; {WITH_TOOLS}" if tools or any("tool" in what for what in lost) else ""
        raise Refused(f"the template does not write {', '.join(lost)}{way}")
    return write(render, find_marks, (messages, tools)).text if answered else text


def _words(messages: Messages, tools: Tools | None) -> list[tuple[str, str]]:
    """What must be written of a tried conversation, in words and as text."""
    found = [("the tools", tool["function"]["name"]) for tool in tools or ()]
    names = {"system": "system turns", "user": "questions", "assistant": "answers", "tool": "what tools give back"}
    for message in messages:
        for call in message.get("tool_calls") or ():
            ((key, value),) = call["function"]["arguments"].items()
            found += [("tool calls", call["function"]["name"]), ("the arguments of tool calls", key)]
            found += [("the arguments of tool calls", value)]
        found += [(names[message["role"]], _thought_and_words(message)[1])]
    return found
