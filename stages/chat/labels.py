"""Conversations in, token ids and labels out.

Every stage, the exported folder and the server use one template and one way to tokenize: the ids that a stage trains on
are those of `tokenizer.apply_chat_template(messages)`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from stages.chat.encoder import Encoder
from stages.chat.shapes import Shape, has_tools, probe, shape
from stages.chat.writing import Refused, Render, Talk, Written, try_shape, write
from stages.data.row import Message, Tools

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
    """`encode_chats` for one conversation: token ids and labels, both of length T.

    Raises:
        Refused: the template cannot be used for the conversation.
    """
    (encoded,) = encode_chats(encoder, [(messages, tools)])
    if isinstance(encoded, Refused):
        raise encoded
    return encoded.ids, encoded.labels


def encode_chats(encoder: Encoder, talks: Sequence[Talk], *, last_only: bool = False) -> list[Encoded | Refused]:
    """Token ids of each conversation, with the assistant's turns in the loss; with `last_only` only its last message.

    Tool calls are part of an assistant's turn, what a tool gave back is not. The end of turn (the special token after
    the answer) is in the loss, or the model would never learn to stop. A turn of weight 0 is not in the loss.

    Returns:
        For a conversation that cannot be trained on with this template, the reason, as `write` and `try_shape` find it.
    """
    if not talks:
        return []
    special = _special_tokens(encoder.tokenizer)
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"\Z\b")
    found = [shape(*talk, last_only=last_only) for talk in talks]
    plain = encoder.render_fast if sum(not has_tools(one) for one in found) > 1 else encoder.render

    def written(talk: Talk, found: Shape) -> Written | Refused:
        try:
            if found not in encoder.tried:
                encoder.tried[found] = _trouble(encoder.render, pattern, found)
            if encoder.tried[found] is not None:
                return Refused(encoder.tried[found])
            render = encoder.render if has_tools(found) else plain
            return write(render, lambda text: list(pattern.finditer(text)), talk, last_only=last_only)
        except Refused as error:
            return error

    texts = list(map(written, talks, found))
    good = [text for text in texts if isinstance(text, Written)]
    ids = encoder.token_ids([text.text for text in good])
    openings = list({opening: None for text in good for opening in _openings(text)})
    known = dict(zip(openings, encoder.token_ids(openings), strict=True))
    made = (
        _by_marks(text, row, special, known) or _by_places(encoder, text) for text, row in zip(good, ids, strict=True)
    )
    return [next(made) if isinstance(text, Written) else text for text in texts]


def _trouble(render: Render, pattern: re.Pattern[str], shape: Shape) -> str | None:
    """Why the template cannot be used for conversations of a shape; None if it can."""
    try:
        try_shape(render, lambda text: list(pattern.finditer(text)), shape)
    except Refused as error:
        return str(error)
    return None


def _openings(text: Written) -> Iterator[str]:
    """The prompt of each turn from its last special token on: the same few words in every row."""
    for begin, before, _ in text.turns:
        yield text.text[text.marks[before - 1].start() if before else 0 : begin]


def _by_marks(
    text: Written, ids: list[int], special: Mapping[str, int], known: Mapping[str, list[int]]
) -> Encoded | None:
    """The tokens in the loss, found by counting special tokens; None if this cannot find them.

    `known` has the ids of every opening.

    Tokenizers first split a text at its special tokens, and then encode each part alone. So a prompt's ids begin the
    conversation's ids if the ids of its opening follow its last special token.
    """
    marks = [special[mark[0]] for mark in text.marks]
    places = [*compress(range(len(ids)), map(frozenset(marks).__contains__, ids))]
    if [ids[place] for place in places] != marks:
        return None
    trained: list[tuple[int, int]] = []
    for turn, words in zip(text.turns, _openings(text), strict=True):
        first, opening = places[turn.before - 1] if turn.before else 0, known[words]
        begin = first + len(opening)
        if ids[first:begin] != opening:
            return None
        trained.append((begin, places[turn.end] + 1))
    return Encoded(ids, trained)


def _by_places(encoder: Encoder, text: Written) -> Encoded:
    """The ids of each prompt as a server would send it, then those of its answer, and so on.

    A tokenizer may join the end of a prompt with the start of the answer; the two are then tokenized apart, since a
    model generates an answer after the whole prompt.
    """
    ids: list[int] = []
    trained: list[tuple[int, int]] = []
    done = 0
    for turn in text.turns:
        stop = text.marks[turn.end].end()
        ids += _continued(encoder, text.text[done : turn.begin], first=not done)
        answer = _continued(encoder, text.text[turn.begin : stop], first=False)
        trained.append((len(ids), len(ids) + len(answer)))
        ids += answer
        done = stop
    return Encoded(ids + _continued(encoder, text.text[done:], first=not done), trained)


def _continued(encoder: Encoder, text: str, *, first: bool) -> list[int]:
    """The ids of a part of a text. Some tokenizers add a blank to the start of a text, but not to a later part."""
    newline, part, alone = encoder.token_ids(["\n", "\n" + text, text])
    return part[len(newline) :] if not first and part[: len(newline)] == newline else alone


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Text → id of the special tokens and of all tokens that were added to the vocabulary."""
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return dict(special) | {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}


def end_of_turn(encoder: Encoder) -> int:
    """The id of the token that ends an assistant's turn in this tokenizer's template.

    Raises:
        Refused: the template can be used neither for answers nor for answers with a thought.
    """
    plain, thinking = encode_chats(encoder, [probe("u a"), probe("u ak")])
    found = thinking if isinstance(plain, Refused) and isinstance(thinking, Encoded) else plain
    if isinstance(found, Refused):
        raise found
    return found.ids[found.trained[-1][1] - 1]
