"""Scores of rows by models: losses of answers, rewards, embeddings, and answers that a model gives itself.

Rows go through in batches of at most `batch_tokens` tokens (see stages/model/inference.py).
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.chat.labels import IGNORED, encode_chat
from stages.chat.rendering import render
from stages.chat.template import install_template
from stages.chat.writing import Refused
from stages.data.row import Row, message_texts
from stages.data.spool import Spooled
from stages.model.device import compute_dtype, torch_device
from stages.model.folder import load_model, load_tokenizer, refuse_missing, set_stop_tokens
from stages.model.generation import Engine
from stages.model.inference import for_each_batch, losses, positions
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError
from stages.runtime.events import emit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
Unscored = dict[int, str]
"""Index of a row that has no score → why, as the end of "3 rows …"."""
TOO_LONG, REFUSED = "longer than `max_length`", "for which the template cannot be used"
PROBE = "A question."  # rendered to find what the template writes around it


class Settings(Protocol):
    """The settings of a stage that are read here."""

    @property
    def template(self) -> str | None: ...
    @property
    def max_length(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...


def _progress(out: Path, doing: str, count: int) -> Callable[[int], None]:
    return lambda done: emit(out, "note", text=f"{doing} {done:,} of {count:,}")


# The model that the stage starts from


def _own(config: Settings, inputs: Inputs) -> Engine:
    """The model that the stage starts from, with the template of the run, on a GPU if there is one."""
    # Not by `load_engine`: that computes in the stored dtype, and scores of a model stored in 16 bits would change.
    tokenizer = load_tokenizer(inputs.model)
    install_template(tokenizer, config.template)
    model = load_model(inputs.model, dtype=compute_dtype())
    return Engine(model.to(torch_device()), tokenizer)


# Losses of answers


def answer_losses(
    config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path
) -> tuple[list[float | None], list[float | None], Unscored]:
    """Mean cross-entropy in nats over the tokens of each row's answers: given the question, and alone.

    These are the two means of IFD (Li et al., arXiv 2308.12032). Both are over the same tokens: those that training
    has in the loss (`encode_chat`), without the token that ends each turn, as published. An answer alone comes after
    what the template opens an answer with (`opening`). A conversation with several answers counts all of them, each
    after everything before it, and each alone.

    Returns:
        Two lists with one value for each row, and the rows that have none: they are longer than `max_length` or the
        model's positions, or the template cannot be used for them.
    """
    engine = _own(config, inputs)
    tokenizer, limit = engine.tokenizer, min(config.max_length, positions(engine.model))
    start = opening(tokenizer)
    owners: list[tuple[int, int]] = []  # the row of each text, and 1 if the answer is alone in it
    tokens = [0] * len(rows)
    unscored: Unscored = {}
    with Spooled[tuple[Ids, Ids]](folder=out) as texts:
        for index, row in enumerate(rows):
            try:
                ids, labels = encode_chat(engine.encoder, row["messages"], row.get("tools"))
            except Refused:
                unscored[index] = REFUSED
                continue
            if len(ids) > limit:
                unscored[index] = TOO_LONG
                continue
            answers = _answers(labels)
            tokens[index] = sum(map(len, answers))
            whole = [IGNORED] * len(ids)
            for places in answers:
                whole[places.start : places.stop] = ids[places.start : places.stop]
                answer = ids[places.start : places.stop]
                texts.append((start + answer, [IGNORED] * len(start) + answer))
                owners.append((index, 1))
            texts.append((ids, whole))
            owners.append((index, 0))
        found = losses(engine.model, texts, config.batch_tokens, _progress(out, "scored texts:", len(texts)))
    sums = [[0.0] * len(rows), [0.0] * len(rows)]
    for (index, alone), loss in zip(owners, found, strict=True):
        sums[alone][index] += loss
    given, by_itself = ([total / n if n else None for total, n in zip(part, tokens, strict=True)] for part in sums)
    return given, by_itself, unscored


def opening(tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """The token ids before an answer that is scored alone; at least one, so that every token of the answer is scored.

    They are what the template adds to ask for an answer (`<|im_start|>assistant` in ChatML). If the template writes
    that at the end of every question, they are what follows the words of the question (`### 回答:` in `med`), without
    leading blanks. The template's start-of-text token (BOS) comes first if it writes one. If all of that is empty, BOS
    or the end-of-text token is used.
    """
    asked = [{"role": "user", "content": PROBE}]
    prompt, closed = render(tokenizer, asked, prompt=True), render(tokenizer, asked)
    longer = prompt.startswith(closed) and len(prompt) > len(closed)
    text = prompt[len(closed) :] if longer else prompt.rpartition(PROBE)[2].lstrip()
    if tokenizer.bos_token and prompt.startswith(tokenizer.bos_token):
        text = tokenizer.bos_token + text
    ids: Ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [int(first)]


def _answers(labels: Sequence[int]) -> list[range]:
    """The positions of each answer's tokens, without the token that ends its turn."""
    found, begun = [], None
    for place, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and begun is None:
            begun = place
        elif label == IGNORED and begun is not None:
            found.append(range(begun, place - 1))
            begun = None
    return [places for places in found if places]


# Answers of the model itself


def own_answers(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> tuple[list[str | None], Unscored]:
    """The likeliest answer (greedy) to each conversation up to its last answer, and the rows that have none."""
    engine = _own(config, inputs)
    set_stop_tokens(engine.model, engine.tokenizer)
    limit = min(config.max_length, positions(engine.model) - 1)
    asked: list[int] = []
    unscored: Unscored = {}
    with Spooled[Ids](folder=out) as prompts:
        for index, row in enumerate(rows):
            try:
                prompt = engine.prompt(row["messages"][:-1], row.get("tools"))
            except Refused:
                unscored[index] = REFUSED
                continue
            if len(prompt) > limit:
                unscored[index] = TOO_LONG
                continue
            prompts.append(prompt)
            asked.append(index)
        answers = engine.generate(
            prompts,
            {"max_new_tokens": config.max_new_tokens},
            tokens=config.batch_tokens,
            report=_progress(out, "answered questions:", len(asked)),
        )
    found: list[str | None] = [None] * len(rows)
    for index, ids in zip(asked, answers, strict=True):
        found[index] = engine.text(ids)
    return found, unscored


def with_answer(row: Row, answer: str) -> Row:
    """The row with another last answer."""
    return {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}


# Rewards


def rewards(config: Settings, inputs: Inputs, rows: Iterable[Row], out: Path) -> tuple[list[float], int]:
    """The scorer's single logit for each row, and the number of rows that were cut.

    A scorer with a chat template reads the rendered conversation; NaN for a row that the template cannot be used for. A
    scorer without one reads question and answer as a pair of texts.

    Raises:
        StageError: the scorer lacks weights, or has more than one label.
    """
    import torch

    model, tokenizer = _classifier(inputs.others["scorer"])
    limit = min(config.max_length, _longest_input(model, tokenizer))
    found: list[float] = []
    scored: list[int] = []
    lengths: list[int] = []
    cut = 0
    with Spooled[dict[str, Ids]](folder=out) as encoded:
        for index, row in enumerate(rows):
            found.append(math.nan)
            try:
                whole = _for_scorer(tokenizer, row)
            except Refused:
                continue
            if len(whole["input_ids"]) > limit:
                whole, cut = _for_scorer(tokenizer, row, limit), cut + 1
            encoded.append(whole)
            scored.append(index)
            lengths.append(len(whole["input_ids"]))

        def act(batch: list[int]) -> None:
            given = tokenizer.pad([encoded[place] for place in batch], return_tensors="pt").to(model.device)
            with torch.inference_mode():
                logits = model(**given).logits[:, 0].double().tolist()
            for place, score in zip(batch, logits, strict=True):
                found[scored[place]] = score

        for_each_batch(lengths, config.batch_tokens, act, _progress(out, "scored rows:", len(lengths)))
    return found, cut


def _classifier(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    settings = {"local_files_only": True, "trust_remote_code": False}
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=compute_dtype(), use_safetensors=True, output_loading_info=True, **settings
    )
    if info["missing_keys"]:
        missing = ", ".join(f"`{name}`" for name in sorted(info["missing_keys"])[:3])
        raise StageError(
            f"the scorer `{folder}` has no {missing}, so its scores would be random; choose a reward model"
        )
    if model.config.num_labels != 1:
        raise StageError(f"the scorer `{folder}` has {model.config.num_labels} labels; choose one with a single label")
    tokenizer = _padded(AutoTokenizer.from_pretrained(folder, **settings))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval().to(torch_device()), tokenizer


def _padded(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    install_template(tokenizer, None)
    return tokenizer


def _longest_input(model: Any, tokenizer: Any) -> int:
    """How many tokens both the model and its tokenizer take, by their own settings."""
    return min(positions(model), int(tokenizer.model_max_length) if tokenizer.model_max_length < 10**9 else 10**9)


def _for_scorer(tokenizer: Any, row: Row, limit: int | None = None) -> dict[str, Ids]:
    """The scorer's input for a row, cut to `limit` tokens."""
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    if "text" in row:
        return dict(tokenizer(row["text"], **cut))
    if tokenizer.chat_template:
        text = render(tokenizer, [*before(row), last(row)], tools=row.get("tools"))
        return dict(tokenizer(text, add_special_tokens=False, **cut))
    return dict(tokenizer(question(row), words(last(row)), **cut))


# Embeddings


def embeddings(
    config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path, *, answer: bool
) -> tuple["NDArray[np.float32]", int]:
    """The mean of the last hidden states over the tokens of each row, and the number of rows that were cut.

    Only the question of a row is read, or with `answer` the whole row.

    Returns:
        An array of rows × hidden size, and the number of rows that were cut.
    """
    import numpy as np
    import torch

    model, tokenizer = _encoder(config, inputs)
    limit = min(config.max_length, _longest_input(model, tokenizer))
    lengths: list[int] = []
    cut = 0
    points = np.zeros((len(rows), model.config.hidden_size), dtype=np.float32)
    with Spooled[dict[str, Ids]](folder=out) as encoded:
        for row in rows:
            text = written(row, answer=answer)
            one = tokenizer(text, truncation=True, max_length=limit)
            cut += len(one["input_ids"]) == limit and len(tokenizer(text)["input_ids"]) > limit
            encoded.append(dict(one))
            lengths.append(len(one["input_ids"]))

        def act(batch: list[int]) -> None:
            given = tokenizer.pad([encoded[index] for index in batch], return_tensors="pt").to(model.device)
            with torch.inference_mode():
                hidden = model(**given).last_hidden_state.float()
            mask = given["attention_mask"].unsqueeze(-1)
            means = hidden.masked_fill(mask == 0, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            points[batch] = means.cpu().numpy()

        for_each_batch(lengths, config.batch_tokens, act, _progress(out, "placed rows:", len(rows)))
    return points, cut


def _encoder(config: Settings, inputs: Inputs) -> tuple[Any, Any]:
    """The embedder, or the model that the stage starts from without its head; and its tokenizer.

    Raises:
        StageError: the embedder lacks weights.
    """
    if "embedder" not in inputs.others:
        engine = _own(config, inputs)
        return engine.model.base_model, _padded(engine.tokenizer)
    from transformers import AutoModel, AutoTokenizer

    folder = inputs.others["embedder"]
    settings = {"local_files_only": True, "trust_remote_code": False}
    encoder, info = AutoModel.from_pretrained(
        folder, dtype=compute_dtype(), use_safetensors=True, output_loading_info=True, **settings
    )
    # Many encoders come without their pooler, which hidden states do not pass through.
    refuse_missing(folder, sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")))
    return encoder.eval().to(torch_device()), _padded(AutoTokenizer.from_pretrained(folder, **settings))


# The words of a row


def before(row: Row) -> list[dict[str, Any]]:
    """The messages up to the last answer."""
    return list(row["messages"][:-1] if "messages" in row else row["prompt"])


def last(row: Row) -> dict[str, Any]:
    """The last answer; of a preference pair the chosen one."""
    return dict((row["messages"] if "messages" in row else row["chosen"])[-1])


def words(message: dict[str, Any]) -> str:
    """The thought and the content of a message, and its tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(filter(None, [*message_texts(message), *calls]))


def question(row: Row) -> str:
    """All messages before the last answer, without the system prompt, which is often the same in every row."""
    return "\n".join(words(message) for message in before(row) if message["role"] != "system")


def written(row: Row, *, answer: bool) -> str:
    """The text of a row: its question, and with `answer` the last answer too."""
    if "text" in row:
        return str(row["text"])
    return f"{question(row)}\n{words(last(row))}" if answer else question(row)
