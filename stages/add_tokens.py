"""New tokens: a model in, the same model with more tokens in its tokenizer and more rows in its embeddings out.

A row of a new token is the mean of the rows of all tokens that the tokenizer had (Hewitt, "Initializing New Word
Embeddings for Pretrained Language Models", 2021): the probabilities of the old tokens change as little as possible, and
nothing is drawn at random. A `lora` stage that starts from the model trains these rows as well.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, model_validator

from stages import Metrics, Model, Stage
from stages.model import tokens
from stages.model.facts import Facts, Needs
from stages.model.folder import load_model, load_tokenizer
from stages.model.inputs import Inputs
from stages.model.references import ModelRef
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CHUNK = 8192  # rows in float64 at a time
SHARD = "4GB"  # as `merge`


class Config(BaseModel):
    """Settings of `add_tokens`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelRef
    special: list[str] = []
    """Tokens that no text is split into by chance and that decoding can leave out, such as `<|im_start|>`."""
    words: list[str] = []
    """Words of the domain that become one token each."""

    @model_validator(mode="after")
    def _some_and_different(self) -> "Config":
        every = [*self.special, *self.words]
        if not every:
            raise ValueError('no token is named; write `special: ["<|im_start|>", "<|im_end|>"]`')
        if not all(token.strip() for token in every):
            raise ValueError("a token is blank; write one with a visible character, or remove it")
        if twice := next((token for token in every if every.count(token) > 1), None):
            raise ValueError(f"`{twice}` is here twice; write it once")
        return self

    @property
    def every(self) -> list[str]:
        """The special tokens, then the words."""
        return [*self.special, *self.words]


# What is known before the stage runs


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Whether the embeddings can get more rows."""
    if "quantization_config" in facts.config:
        return [("model", f"{facts.source} is quantized, and its embeddings stay as they are; add tokens before")]
    return []


def notes(config: Config, facts: Facts) -> list[str]:
    """Tokens that need not be added."""
    known, lost = tokens.ids(facts), tokens.without_row(facts)
    there = [token for token in config.every if token in known and token not in lost]
    if not there:
        return []
    listed = ", ".join(f"`{token}`" for token in there)
    return [f"the tokenizer of {facts.source} has {listed} already; nothing is added for {_them(there)}"]


def _them(many: Sequence[str]) -> str:
    return "it" if len(many) == 1 else "them"


def facts(config: Config, facts: Facts) -> Facts:
    """What later stages can know of the model with the new tokens."""
    known, before = tokens.ids(facts), tokens.rows(facts)
    new = tuple(token for token in config.every if token not in known)
    after = replace(facts, adapters=0, added=(*facts.added, *new))
    if before is None:
        return after
    count = max([-1, *known.values()]) + 1 + len(new) if known else before + len(new)
    count = max(before, count)
    weights = {
        name: (count, *shape[1:]) if shape[0] == before and tokens.is_embedding(name) else shape
        for name, shape in facts.weights.items()
    }
    shown = {**facts.config, "vocab_size": count} if "vocab_size" in facts.config else facts.config
    after = replace(after, weights=weights, config=shown)
    return replace(after, stored=facts.stored * after.parameters // max(1, facts.parameters))


def needs(config: Config, before: Facts) -> Needs:
    """Memory: the whole model in its own dtype. Disk: the same, with the new rows."""
    size = facts(config, before).stored
    return Needs(size, disk=size)


def headline(metrics: Mapping[str, Any]) -> str:
    """How many tokens and rows the model has."""
    return f"{metrics['new_tokens']} new tokens, {metrics['rows']:,} rows in the embedding"


def describe(config: Config) -> list[str]:
    """The number of tokens of each kind."""
    kinds = (("special token", config.special), ("word", config.words))
    return [f"{len(given)} {kind}{'s' if len(given) != 1 else ''}" for kind, given in kinds if given]


# The work


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Write the model with the new tokens and its tokenizer into `out`, and `new_rows.json` if there are new rows.

    Raises:
        StageError: transformers cannot resize the embeddings of this model.
    """
    tokenizer = load_tokenizer(inputs.model)
    before = tokenizer.get_vocab()
    extend(tokenizer, config)
    after = tokenizer.get_vocab()
    model: Any = load_model(inputs.model, dtype="auto")
    limit = model.get_input_embeddings().weight.shape[0]
    size = max(limit, *(number + 1 for number in after.values()))
    new = sorted({number for token, number in after.items() if token not in before or number >= limit})
    if size > limit:
        _resize(model, size)
        new = sorted({*new, *range(limit, size)})
    known = [number for number in before.values() if number < limit]
    if new:
        rows = {"modules": _fill(model, new, known), "ids": new}
        (out / tokens.NEW_ROWS).write_text(json.dumps(rows), encoding="utf-8")
    model.save_pretrained(out, max_shard_size=SHARD)
    tokenizer.save_pretrained(out)
    found = {token: number for token, number in after.items() if token not in before}
    there = [token for token in config.every if token not in found]
    if there:
        emit(out, "note", text=f"in the tokenizer already: {', '.join(f'`{token}`' for token in there)}")
    return {"new_tokens": len(found), "new_rows": len(new), "rows": size, "ids": found}


def extend(tokenizer: "PreTrainedTokenizerBase", config: Config) -> None:
    """Add the tokens; a token that is in the vocabulary keeps its id, and no text is split inside of it from now on."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in config.special], True)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in config.words])


def _resize(model: Any, size: int) -> None:
    """Give the embeddings `size` rows.

    Raises:
        StageError: they cannot be resized.
    """
    try:
        model.resize_token_embeddings(size, mean_resizing=False)
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        wrong = any(layer is not None and layer.weight.shape[0] != size for layer in layers)
    except (TypeError, NotImplementedError, AttributeError) as error:
        raise StageError(f"transformers cannot resize the embeddings of this model ({error})") from None
    if wrong:
        raise StageError("transformers resized one embedding of this model and not the other; name another model")


def _fill(model: Any, new: Sequence[int], known: Sequence[int]) -> list[str]:
    """Write the mean of the rows `known` into the rows `new` of both embeddings.

    Returns:
        The names of the modules whose rows `lora` can train: the input embedding, then the output embedding unless it
        is the same weight. An output embedding with a bias is none of them, as PEFT would leave out the bias.
    """
    names = {id(module): name for name, module in model.named_modules()}
    entry, head = model.get_input_embeddings(), model.get_output_embeddings()
    entry.weight.data[list(new)] = _mean(entry.weight.data, known)
    if head is None:
        return [names[id(entry)]]
    tied = head.weight is entry.weight
    if not tied:
        head.weight.data[list(new)] = _mean(head.weight.data, known)
    if (bias := getattr(head, "bias", None)) is not None:
        bias.data[list(new)] = _mean(bias.data, known)
        return [] if tied else [names[id(entry)]]
    return [names[id(entry)]] if tied else [names[id(entry)], names[id(head)]]


def _mean(weight: "torch.Tensor", known: Sequence[int]) -> "torch.Tensor":
    """The mean of the rows `known` (rows × width), computed in float64, in the dtype of the weight."""
    import torch

    total = sum(weight[list(part)].double().sum(0) for part in torch.tensor(known).split(CHUNK))
    return (total / len(known)).to(weight.dtype)


STAGE = Stage(
    version=1,
    config=Config,
    run=run,
    headline=headline,
    leaves=Model(tokenizer=True),
    check_model=check_model,
    notes=notes,
    needs=needs,
    facts=facts,
    at_top="special",
    describe=describe,
)
