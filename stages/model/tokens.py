"""The tokens of a tokenizer and the rows of a model's embedding, compared without torch.

A token whose id is no row of the embedding ends training with an IndexError. It is found here, in `tokenizer.json`,
`tokenizer_config.json` and the shapes of the weights.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.model.facts import EMBEDDINGS, Facts
from stages.runtime.errors import Problem

HEADS = ("lm_head", "embed_out")  # output embeddings, by their last name
NEW_ROWS = "new_rows.json"  # in the folder of a model whose tokenizer was extended: the rows of the new tokens
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NOT_TEXT = re.compile("image|audio|video|vision", re.I)  # placeholders, which no text holds: Gemma 3 has one
SHOWN = 3


def is_embedding(weight: str) -> bool:
    """Whether a weight has a row for each token: that of the input or of the output embedding."""
    return last_module(weight) in (*EMBEDDINGS, *HEADS)


def last_module(weight: str) -> str:
    """The last name of the module of a weight: `lm_head` of `lm_head.weight`."""
    return weight.rpartition(".")[0].rpartition(".")[2]


def rows(facts: Facts) -> int | None:
    """The rows of the input embedding; None if they are not known."""
    found = (shape[0] for weight, shape in facts.weights.items() if last_module(weight) in EMBEDDINGS)
    config = facts.config.get("text_config") or facts.config
    return next(found, None) or config.get("vocab_size")


def ids(facts: Facts) -> dict[str, int]:
    """Token → id, as transformers loads the tokenizer; empty if its files do not say so."""
    found = dict(_in_file(facts.tokens))
    decoder = facts.tokenizer.get("added_tokens_decoder") or {}
    listed = [decoder[number] for number in sorted(decoder, key=int)]
    named = [facts.tokenizer.get(name) for name in _NAMED]
    more = facts.tokenizer.get("additional_special_tokens") or facts.tokenizer.get("extra_special_tokens") or []
    for token in (*listed, *named, *(more.values() if isinstance(more, dict) else more), *facts.added):
        if token and found and _word(token) not in found:  # transformers adds it when it loads the tokenizer
            found[_word(token)] = max(found.values()) + 1
    return found


@lru_cache(maxsize=8)  # a plan asks for each stage, and the file has up to 30 MB
def _in_file(tokens: str) -> Mapping[str, int]:
    """Token → id of the text of a tokenizer.json; empty if it cannot be read."""
    try:
        content = json.loads(tokens)
        vocabulary = content["model"]["vocab"]
    except (ValueError, KeyError, TypeError):
        return {}
    found = dict(_entries(vocabulary))
    return found | {entry["content"]: entry["id"] for entry in content.get("added_tokens") or [] if "id" in entry}


def _entries(vocabulary: Any) -> Iterator[tuple[str, int]]:
    """The tokens of a vocabulary: a mapping, or a list of `[token, score]` in the order of the ids (Unigram)."""
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        yield from ((str(entry[0]), number) for number, entry in enumerate(vocabulary))


def _word(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def without_row(facts: Facts) -> list[str]:
    """Tokens of text whose id is not a row of the embedding, in the order of their ids."""
    limit = rows(facts)
    known = ids(facts) if limit is not None else {}
    lost = [token for token, number in known.items() if number >= (limit or 0) and not _NOT_TEXT.search(token)]
    return sorted(lost, key=lambda token: known[token])


def check_rows(facts: Facts) -> list[Problem]:
    """The problem of a tokenizer with more tokens than the embedding of its model has rows."""
    lost = without_row(facts)
    if not lost:
        return []
    listed = ", ".join(json.dumps(token, ensure_ascii=False) for token in lost[:SHOWN])
    more = f" and {len(lost) - SHOWN:,} more" if lost[SHOWN:] else ""
    count = f"{len(lost):,} token{'s' if len(lost) > 1 else ''} of its tokenizer {'have' if len(lost) > 1 else 'has'}"
    clause = f"the embedding of {facts.source} has {rows(facts):,} rows, and {count} none ({listed}{more})"
    way = f"write `add_tokens: [{listed}]` at the top, which gives every token a row, or name a model with its own"
    return [("model", f"{clause}; {way} tokenizer")]


def new_rows(base: Path) -> tuple[list[str], list[int]]:
    """The rows that `add_tokens` made in the embeddings of a model, for `lora` to train.

    Returns:
        The names of the modules, the input embedding first, and the ids of the rows; both empty for any other model.
    """
    file = base / NEW_ROWS
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content.get("modules", []), content.get("ids", [])
