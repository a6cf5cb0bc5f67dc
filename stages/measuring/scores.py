"""What models say of rows: the loss of answers, rewards, embeddings, and answers of their own.

Rows go through in batches of at most `batch_tokens` tokens, as `_inference` says.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.chat.encoder import Encoder
from stages.chat.labels import IGNORED, encode_chat
from stages.chat.rendering import render
from stages.chat.template import install_template
from stages.data.row import Row
from stages.model import inference
from stages.model.device import has_bf16
from stages.model.folder import load_model, load_tokenizer, set_stop_tokens
from stages.model.inference import each, losses, positions
from stages.model.inputs import Inputs
from stages.runtime.errors import StageError
from stages.runtime.events import emit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


Ids = list[int]
PROBE = "A question."


class Settings(Protocol):
    """What is read of the stage's config."""

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


# The stage's own model


def _own(config: Settings, inputs: Inputs) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """The model that the stage stands on, with the run's template, on a GPU if there is one."""
    tokenizer = load_tokenizer(inputs.model)
    install_template(tokenizer, config.template)
    model = load_model(inputs.model, dtype=_dtype())
    return model.to(_device()), tokenizer


def _dtype() -> str:
    return "bfloat16" if has_bf16() else "float32"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# Losses of answers


def answer_losses(
    config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path
) -> tuple[list[float | None], list[float | None]]:
    """Mean cross-entropy in nats over the tokens of each row's answers: given the question, and alone.

    The tokens are the same both times: those with labels in `_template.encode`, less the one that ends each turn,
    as published. Alone, an answer comes after what the template opens one with (`opening`). A conversation with
    several answers counts all of them, each given all before it, and each alone. None for rows that are longer than
    `max_length` or the model's positions.
    """
    model, tokenizer = _own(config, inputs)
    limit = min(config.max_length, positions(model))
    start, encoder = opening(tokenizer), Encoder(tokenizer)
    texts: list[tuple[Ids, Ids]] = []
    owners: list[tuple[int, int]] = []  # the row of each text, and whether the answer is alone
    tokens = [0] * len(rows)
    for index, row in enumerate(rows):
        ids, labels = encode_chat(encoder, row["messages"], row.get("tools"))
        if len(ids) > limit:
            continue
        answers = _answers(labels)
        tokens[index] = sum(map(len, answers))
        whole = [IGNORED] * len(ids)
        for places in answers:
            whole[places.start : places.stop] = ids[places.start : places.stop]
            said = ids[places.start : places.stop]
            texts.append((start + said, [IGNORED] * len(start) + said))
            owners.append((index, 1))
        texts.append((ids, whole))
        owners.append((index, 0))
    found = losses(model, texts, config.batch_tokens, _progress(out, "scored texts:", len(texts)))
    sums = [[0.0] * len(rows), [0.0] * len(rows)]
    for (index, alone), loss in zip(owners, found, strict=True):
        sums[alone][index] += loss
    given, alone_ = ([total / n if n else None for total, n in zip(part, tokens, strict=True)] for part in sums)
    return given, alone_


def opening(tokenizer: "PreTrainedTokenizerBase") -> Ids:
    """The token ids that stand before an answer alone, of which there is at least one, so that all of it is scored.

    That is what the template adds to ask for an answer (`<|im_start|>assistant` of ChatML), or, where a question
    itself ends with that, what comes after the question's words (`### 回答:` of `med`); leading blanks go. A start of
    text (BOS) that the template writes stands before it; if there is nothing, BOS or the end-of-text token does.
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
    """The places of each answer's tokens, the token that ends its turn left out."""
    found, begun = [], None
    for place, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and begun is None:
            begun = place
        elif label == IGNORED and begun is not None:
            found.append(range(begun, place - 1))
            begun = None
    return [places for places in found if places]


# Answers of the model's own


def own_answers(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> list[str | None]:
    """The likeliest answer (greedy) to each conversation up to its last answer; None where the prompt is too long."""
    model, tokenizer = _own(config, inputs)
    set_stop_tokens(model, tokenizer)
    limit = min(config.max_length, positions(model) - 1)
    prompts = [render(tokenizer, row["messages"][:-1], prompt=True, tools=row.get("tools")) for row in rows]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    asked = [index for index, prompt in enumerate(ids) if len(prompt) <= limit]
    found: list[str | None] = [None] * len(rows)
    told = _progress(out, "answered questions:", len(asked))
    given, how = [ids[index] for index in asked], {"max_new_tokens": config.max_new_tokens}
    made = inference.answers(model, tokenizer, given, config.batch_tokens, told, settings=how)
    for index, text in zip(asked, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
        found[index] = text.strip()
    return found


def with_answer(row: Row, answer: str) -> Row:
    """The row with another last answer."""
    return {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": answer}]}


# Rewards


def rewards(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> tuple[list[float], int]:
    """The one logit of the scorer for each row, and how many rows it did not see whole.

    A scorer with a chat template reads the conversation in it, any other one question and answer as a pair of texts.
    """
    import torch

    folder = inputs.others["scorer"]
    model, tokenizer = _classifier(folder)
    limit = min(config.max_length, _reach(model, tokenizer))
    encoded, cut = [], 0
    for row in rows:
        whole = _for_scorer(tokenizer, row)
        if len(whole["input_ids"]) > limit:
            whole, cut = _for_scorer(tokenizer, row, limit), cut + 1
        encoded.append(whole)
    found = [0.0] * len(rows)

    def act(batch: list[int]) -> None:
        given = tokenizer.pad([encoded[index] for index in batch], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits = model(**given).logits[:, 0].double().tolist()
        for index, score in zip(batch, logits, strict=True):
            found[index] = score

    if rows:
        each(
            [len(one["input_ids"]) for one in encoded],
            config.batch_tokens,
            act,
            _progress(out, "scored rows:", len(rows)),
        )
    return found, cut


def _classifier(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    settings = {"local_files_only": True, "trust_remote_code": False}
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=_dtype(), use_safetensors=True, output_loading_info=True, **settings
    )
    if info["missing_keys"]:
        lost = ", ".join(f"`{name}`" for name in sorted(info["missing_keys"])[:3])
        raise StageError(f"the scorer `{folder}` has no {lost}, so its scores would be random; choose a reward model")
    if model.config.num_labels != 1:
        raise StageError(f"the scorer `{folder}` has {model.config.num_labels} labels; choose one with a single label")
    tokenizer = _padded(AutoTokenizer.from_pretrained(folder, **settings))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval().to(_device()), tokenizer


def _padded(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _reach(model: Any, tokenizer: Any) -> int:
    """How many tokens a model and its tokenizer say they take."""
    return min(positions(model), int(tokenizer.model_max_length) if tokenizer.model_max_length < 10**9 else 10**9)


def _for_scorer(tokenizer: Any, row: Row, limit: int | None = None) -> dict[str, Ids]:
    """The scorer's input for a row, cut to `limit` tokens."""
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    if "text" in row:
        return dict(tokenizer(row["text"], **cut))
    if tokenizer.chat_template:
        said = [*before(row), last(row)]
        text = render(tokenizer, said, tools=row.get("tools"))
        return dict(tokenizer(text, add_special_tokens=False, **cut))
    return dict(tokenizer(question(row), words(last(row)), **cut))


# Embeddings


def embeddings(
    config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path, *, answer: bool
) -> tuple["NDArray[np.float32]", int]:
    """One point a row (rows × hidden size): the mean of the last hidden states over its tokens; and the rows cut.

    Only what is asked is read, or with `answer` the whole row.
    """
    import numpy as np
    import torch

    model, tokenizer = _encoder(config, inputs)
    limit = min(config.max_length, _reach(model, tokenizer))
    encoded, cut = [], 0
    for row in rows:
        text = written(row, answer=answer)
        one = tokenizer(text, truncation=True, max_length=limit)
        cut += len(one["input_ids"]) == limit and len(tokenizer(text)["input_ids"]) > limit
        encoded.append(dict(one))
    points = np.zeros((len(rows), model.config.hidden_size), dtype=np.float32)

    def act(batch: list[int]) -> None:
        given = tokenizer.pad([encoded[index] for index in batch], return_tensors="pt").to(model.device)
        with torch.inference_mode():
            hidden = model(**given).last_hidden_state.float()
        mask = given["attention_mask"].unsqueeze(-1)
        means = hidden.masked_fill(mask == 0, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        points[batch] = means.cpu().numpy()

    each(
        [len(one["input_ids"]) for one in encoded], config.batch_tokens, act, _progress(out, "placed rows:", len(rows))
    )
    return points, cut


def _encoder(config: Settings, inputs: Inputs) -> tuple[Any, Any]:
    """The embedder, or the stage's own model without its head."""
    if "embedder" not in inputs.others:
        model, tokenizer = _own(config, inputs)
        return model.base_model, _padded(tokenizer)
    from transformers import AutoModel, AutoTokenizer

    settings = {"local_files_only": True, "trust_remote_code": False}
    encoder = AutoModel.from_pretrained(inputs.others["embedder"], dtype=_dtype(), use_safetensors=True, **settings)
    return encoder.eval().to(_device()), _padded(AutoTokenizer.from_pretrained(inputs.others["embedder"], **settings))


# The words of a row


def before(row: Row) -> list[dict[str, Any]]:
    """The messages up to the last answer."""
    return list(row["messages"][:-1] if "messages" in row else row["prompt"])


def last(row: Row) -> dict[str, Any]:
    """The last answer; of a pair the better one."""
    return dict((row["messages"] if "messages" in row else row["chosen"])[-1])


def words(message: dict[str, Any]) -> str:
    """What a message says, its tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(filter(None, [message["content"], *calls]))


def question(row: Row) -> str:
    """All that was said before the last answer but the system prompt, which is often the same in every row."""
    return "\n".join(words(message) for message in before(row) if message["role"] != "system")


def written(row: Row, *, answer: bool) -> str:
    """The text of a row: what is asked, and the last answer too if `answer`."""
    if "text" in row:
        return str(row["text"])
    return f"{question(row)}\n{words(last(row))}" if answer else question(row)
