"""A conversation as text, and the place of each answer in it: the same while planning and in a stage.

An answer begins where the prompt ends that a server would send (the conversation up to there, rendered with
`add_generation_prompt`), and ends at the first special token after its words. A conversation for which the template
does not write it so is refused.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from stages.chat.shapes import Shape, probe
from stages.data.row import Message, Messages, Tools, is_trained
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
        text = _after_prompt(prompts[-1], messages, text, find_marks)
    for number, prompt in zip(asked, prompts, strict=True):
        if not text.startswith(prompt):
            raise Refused(_OTHER_PROMPT.format(number + 1) + (_GIVEN if number < asked[-1] else ""))
    marks, turns = find_marks(text), list[Turn]()
    limits = [*map(len, prompts[1:]), len(text)]
    before = 0
    for number, prompt, limit in zip(asked, prompts, limits, strict=True):
        while before < len(marks) and marks[before].end() <= len(prompt):
            before += 1
        place = _Place(text, marks, before, len(prompt), limit, last=number == len(messages) - 1)
        end = place.end_of_words(messages, number)
        if messages[number].get("tool_calls"):
            end = _end_of_calls(render, (messages[: number + 1], tools), text, len(prompt), marks)
        turns.append(Turn(len(prompt), before, end))
    return Written(text, marks, turns)


def _is_asked(messages: Messages, number: int, last_only: bool) -> bool:
    last = number == len(messages) - 1
    message = messages[number]
    return message["role"] == "assistant" and last if last_only else is_trained(message)


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


class _Place(NamedTuple):
    """Where an answer is in the text: after the prompt, and before `limit` characters."""

    text: str
    marks: Sequence[re.Match[str]]
    before: int
    """Special tokens in the prompt."""
    begin: int
    """Characters of the prompt."""
    limit: int
    last: bool
    """Whether nothing but the end of the template follows."""

    def end_of_words(self, messages: Messages, number: int) -> int:
        """The number of the special token that follows the words of message `number`.

        For tool calls, before which the template can write more, it is only tried whether the words are there.

        Raises:
            Refused: the thought or the words are not there, or no special token follows them.
        """
        message, begin = messages[number], self.begin
        thought, words = _thought_and_words(message)
        if thought:
            begin = self.text.find(thought, begin, self.limit) + len(thought)
            if begin < len(thought):
                way = _IN_CONTENT if "reasoning_content" in message else ""
                raise Refused(_left_out("thought", number) + (way if self.last else _GIVEN))
        words = words or "</think>" * bool(thought)
        end = self.before if message.get("tool_calls") else self._mark_after(words, begin)
        if (end is None or message.get("tool_calls")) and self.text.find(words, begin, self.limit) < 0:
            raise Refused(_left_out("words", number))
        if end is None:
            raise Refused(NO_END)
        return end

    def _mark_after(self, words: str, begin: int) -> int | None:
        """The special token that follows the words: best where nothing else is between it and the one before it.

        A template can write words of its own before those of the answer, such as the name of a channel. So the last
        token is taken after the last answer, and the first one after others, which questions follow.
        """
        places = [place for place in range(self.before, len(self.marks)) if self.marks[place].start() <= self.limit]
        ordered = places[::-1] if self.last and words else places
        for place in ordered:
            start = max(self.begin, self.marks[place - 1].end() if place else 0)
            if self.text[start : self.marks[place].start()].strip() == words:
                return place
        for place in ordered:
            stop = self.marks[place].start()
            if self.text[begin:stop].rstrip().endswith(words):
                return place
        return None


def _after_prompt(prompt: str, messages: Messages, text: str, find_marks: Marks) -> str:
    """The conversation with its last answer after the prompt that a server would send, where `text` begins otherwise.

    Mistral's template writes the system prompt into the last question, so that it is there only in a prompt; what
    follows the end of the question is the same. The templates of DeepSeek-R1-Distill and QwQ open a thought in the
    prompt and leave thoughts out of every answer that is finished, so they never write what the model itself says after
    the prompt: the rest of the thought, and the answer.
    """
    message = messages[-1]
    thought, words = _thought_and_words(message)
    found, opened = find_marks(prompt), re.search(r"<think>(\s*)\Z", prompt)
    asked, _, answer = text.rpartition(prompt[found[-1].start() :] if found else prompt)
    if asked and words in answer:
        return prompt + answer
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
    refusal = None
    try:
        if answered:
            text = write(render, find_marks, (messages, tools)).text
    except Refused as error:
        refusal = error
    if not answered or refusal is not None:
        text = render(messages, tools, prompt=messages[-1]["role"] != "assistant")
    if refusal is not None:  # what stands in the prompt alone is not lost
        text += render(messages[:-1], tools, prompt=True)
    lost = list(dict.fromkeys(what for what, word in _words(messages, tools) if word not in text))
    if lost:
        way = f"; {WITH_TOOLS}" if tools or any("tool" in what for what in lost) else ""
        raise Refused(f"the template does not write {', '.join(lost)}{way}")
    if refusal is not None:
        raise refusal
    return text


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
