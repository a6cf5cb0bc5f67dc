"""Conversations in, token ids and labels out.

Every stage, the exported folder and the server use one template and one way to tokenize: the ids that a stage trains on
are those of `tokenizer.apply_chat_template(messages)`.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from stages.chat.encoder import Encoder
from stages.chat.rendering import Render, Talk, has_tools, refuse_left_out
from stages.data.row import Message, Tools
from stages.runtime.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token outside the loss (torch.nn.CrossEntropyLoss)


class Encoded(NamedTuple):
    """A sequence of tokens, and which of them are in the loss."""

    ids: list[int]
    trained: list[tuple[int, int]]
    """Begin and end of each stretch in the loss, in order; no two overlap."""

    @property
    def labels(self) -> list[int]:
        """The token id where a token is in the loss, or else `IGNORED`; as long as `ids`."""
        labels = [IGNORED] * len(self.ids)
        for begin, end in self.trained:
            labels[begin:end] = self.ids[begin:end]
        return labels


def encode_chat(encoder: Encoder, messages: list[Message], tools: Tools | None = None) -> tuple[list[int], list[int]]:
    """`encode_chats` for one conversation: token ids and labels, both of length T."""
    (encoded,) = encode_chats(encoder, [(messages, tools)])
    return encoded.ids, encoded.labels


def encode_chats(encoder: Encoder, talks: Sequence[Talk]) -> list[Encoded]:
    """Token ids of each conversation, with the assistant's turns in the loss.

    Tool calls are part of an assistant's turn, what a tool gave back is not. The end of turn (the special token after
    the answer) is in the loss, or the model would never learn to stop.

    Raises:
        StageError: the template cannot render these messages or tools, its prompt is not how the conversation
            begins, or it does not end the assistant's turn with a special token.
    """
    if not talks:
        return []
    with_tools = [has_tools(talk) for talk in talks]
    refuse_left_out(encoder.tokenizer, any(with_tools))
    special = _special_tokens(encoder.tokenizer)
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"\Z\b")
    plain = encoder.render_fast if with_tools.count(False) > 1 else encoder.render
    renders = [encoder.render if tools else plain for tools in with_tools]
    full = [render(messages, tools) for render, (messages, tools) in zip(renders, talks, strict=True)]
    ids = encoder.token_ids(full)
    marks = [list(pattern.finditer(text)) for text in full]
    turns = list(map(_turns, renders, talks, full, marks))
    openings = list({turn.opening: None for found in turns for turn in found or ()})
    known = dict(zip(openings, encoder.token_ids(openings), strict=True))
    return [
        (found and _labelled(row, [special[mark[0]] for mark in written], found, known))
        or _by_offsets(encoder, talk, text)
        for talk, text, row, written, found in zip(talks, full, ids, marks, turns, strict=True)
    ]


class _Turn(NamedTuple):
    """An assistant's turn without tool calls."""

    marks: int
    """Special tokens before the turn."""
    opening: str
    """The prompt of the turn from its last special token on."""


def _turns(render: Render, talk: Talk, text: str, marks: list[re.Match[str]]) -> list[_Turn] | None:
    """The assistant's turns, if each is the answer up to the first special token after its prompt; None if not."""
    messages, tools = talk
    closed = [mark.end() for mark in marks]
    found: list[_Turn] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:index], tools, prompt=True)
        before = bisect_right(closed, len(prompt))
        if message.get("tool_calls") or not text.startswith(prompt) or before == len(marks):
            return None
        if text[len(prompt) : marks[before].start()].strip() != message["content"].strip():
            return None
        found.append(_Turn(before, prompt[marks[before - 1].start() if before else 0 :]))
    return found


def _labelled(ids: list[int], marks: list[int], turns: list[_Turn], known: Mapping[str, list[int]]) -> Encoded | None:
    """The tokens in the loss, found by counting special tokens; None if this cannot find them.

    `marks` are the ids of the special tokens in the text, `known` the ids of every opening.

    Tokenizers first split a text at its special tokens, and then encode each part alone. So a prompt's ids begin the
    conversation's ids if the ids of its opening follow its last special token; openings are the same few words in every
    row.
    """
    places = [*compress(range(len(ids)), map(frozenset(marks).__contains__, ids))]
    if [ids[place] for place in places] != marks:
        return None
    trained: list[tuple[int, int]] = []
    for before, text in turns:
        first, opening = places[before - 1] if before else 0, known[text]
        begin = first + len(opening)
        if ids[first:begin] != opening:
            return None
        trained.append((begin, places[before] + 1))
    return Encoded(ids, trained)


def _by_offsets(encoder: Encoder, talk: Talk, text: str) -> Encoded:
    """One conversation, the slow way: by the place of every token in the text."""
    (messages, tools), tokenizer = talk, encoder.tokenizer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    trained: list[tuple[int, int]] = []
    special = set(_special_tokens(tokenizer).values())
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encoder.render(messages[:index], tools, prompt=True)
            if message.get("tool_calls"):
                upto = encoder.render(messages[: index + 1], tools)
                end = _end_of_calls(special, ids, offsets, prompt, upto, text)
            else:
                end = _end(prompt, message["content"].strip(), text)
            _check_boundary(encoder, prompt, ids)
            trained.append(_stretch(tokenizer, special, ids, offsets, len(prompt), end))
    return Encoded(ids, trained)


_GOES_ON = (
    "the chat template writes the start of a conversation differently once it goes on, so what is trained "
    "would not be what is served; choose a built-in `template:`"
)


def _end(prompt: str, answer: str, full: str) -> int:
    """The place in the text where the answer after this prompt ends, before its end of turn."""
    begin = full.find(answer, len(prompt))
    if not full.startswith(prompt) or begin < 0:
        raise StageError(_GOES_ON)
    return begin + len(answer)


def _end_of_calls(
    special: set[int], ids: list[int], offsets: list[tuple[int, int]], prompt: str, upto: str, full: str
) -> int:
    """The place in the text where the tool calls after this prompt end: at the last special token of their turn.

    `upto` is the conversation rendered up to this turn. There Qwen3's own template writes an empty thought, which it
    writes before the last turn only, so `full` may lack it.
    """
    turn = upto[len(prompt) :]
    turn = turn if full.startswith(prompt + turn) else _EMPTY_THOUGHT.sub("", turn)
    if not upto.startswith(prompt) or not full.startswith(prompt + turn):
        raise StageError(_GOES_ON)
    stop = len(prompt + turn)
    starts = [
        first
        for token, (first, last) in zip(ids, offsets, strict=True)
        if token in special and first >= len(prompt) and last <= stop
    ]
    if not starts:
        raise StageError(_NO_END)
    return starts[-1]


_EMPTY_THOUGHT = re.compile(r"\A<think>\s*</think>\s*")


def _check_boundary(encoder: Encoder, prompt: str, ids: list[int]) -> None:
    """
    Raises:
        StageError: the ids of the prompt alone, as a server tokenizes it, do not begin the trained conversation.
    """
    (alone,) = encoder.token_ids([prompt])
    if ids[: len(alone)] != alone:
        raise StageError(
            "this tokenizer joins the end of the prompt with the start of the answer, so the model would be served "
            "another prompt than it was trained on; choose another `template:`"
        )


def _stretch(
    tokenizer: "PreTrainedTokenizerBase",
    special: set[int],
    ids: list[int],
    offsets: list[tuple[int, int]],
    start: int,
    end: int,
) -> tuple[int, int]:
    """Begin and end of the tokens of the characters from `start` to `end`, with the special token that ends the turn.

    Raises:
        StageError: another token than a blank one follows before a special token does.
    """
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    stop = bisect_left(offsets, end, lo=first, key=lambda offset: offset[0])
    for position in range(stop, len(ids)):
        if ids[position] in special:
            return first, position + 1
        if tokenizer.decode([ids[position]]).strip():
            break
    raise StageError(_NO_END)


_NO_END = (
    "the chat template does not end the assistant's turn with a special token, so the model could not learn "
    "to stop; end it with `{{ eos_token }}` or choose a built-in `template:`"
)


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Text → id of the special tokens and of all tokens that were added to the vocabulary."""
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return dict(special) | {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}


def end_of_turn(encoder: Encoder) -> int:
    """The id of the token that ends an assistant's turn in this tokenizer's template.

    Raises:
        StageError: as `encode_chats`.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, labels = encode_chat(encoder, probe)
    return next(label for label in reversed(labels) if label != IGNORED)
