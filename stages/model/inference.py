"""Rows through a model without gradients: the loss of labelled tokens, and answers to prompts.

Rows go through in batches of about the same length, the longest first, so that a lack of memory shows at once. A batch
holds at most `tokens` tokens, padding included, or one row. Losses are summed on the CPU in the order of the rows: the
same rows give the same figures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.chat.labels import IGNORED
from stages.runtime.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


Ids = list[int]
Report = Callable[[int], None]
"""Called with the number of rows that are done."""
CHUNK = 256  # positions whose float32 logits are in memory at once; a position with 250,000 logits takes 1 MB


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches, the longest rows first; rows × longest row is at most `tokens`, or one row."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def for_each_batch(
    lengths: Sequence[int], tokens: int, act: Callable[[list[int]], None], report: Report = lambda done: None
) -> None:
    """Call `act` with the indices of every batch, and `report` at most ten times with the number of rows done."""
    done, tenths = 0, 0
    for batch in batches(lengths, tokens):
        act(batch)
        done += len(batch)
        if done * 10 // len(lengths) > tenths:
            tenths = done * 10 // len(lengths)
            report(done)


def positions(model: Any) -> int:
    """The most tokens that a model takes; 10⁹ for a model without such a limit."""
    return int(getattr(model.config, "max_position_embeddings", None) or 10**9)


def _padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> "Tensor":
    """(rows, longest row), int64: rows of different lengths, filled up on the right or on the left."""
    import torch

    width = max(map(len, rows))
    padding = [[fill] * (width - len(row)) for row in rows]
    filled = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, padding, strict=True)]
    return torch.tensor(filled, dtype=torch.long)


def left_padded(prompts: Sequence[Ids], fill: int) -> "tuple[Tensor, Tensor]":
    """(prompts, longest prompt) twice, int64: prompts filled up on the left, and the attention mask."""
    return _padded(prompts, fill, left=True), _padded([[1] * len(prompt) for prompt in prompts], 0, left=True)


def summed_losses(model: Any, texts: Sequence[tuple[Ids, Ids]]) -> list[float]:
    """The cross-entropy in nats of each text's labelled tokens, computed in float32 and summed in float64.

    A text is its token ids and its labels, of the same length; `IGNORED` labels are not counted.
    """
    import torch

    ids, mask = _padded([ids for ids, _ in texts], 0), _padded([[1] * len(ids) for ids, _ in texts], 0)
    targets = _padded([labels for _, labels in texts], IGNORED)[:, 1:]
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    sums = torch.zeros(len(texts), dtype=torch.float64)
    with torch.inference_mode():
        batch = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        logits = model(**batch, use_cache=False).logits
        for start in range(0, len(rows), CHUNK):
            row, place = rows[start : start + CHUNK], places[start : start + CHUNK]
            right = targets[row, place].to(model.device)
            loss = torch.nn.functional.cross_entropy(logits[row, place].float(), right, reduction="none")
            sums.index_add_(0, row, loss.double().cpu())
    return [float(total) for total in sums]


def losses(
    model: Any, texts: Sequence[tuple[Ids, Ids]], tokens: int, report: Report = lambda done: None
) -> list[float]:
    """`summed_losses` of any number of texts, in batches of `tokens`."""
    found = [0.0] * len(texts)

    def act(batch: list[int]) -> None:
        for index, loss in zip(batch, summed_losses(model, [texts[index] for index in batch]), strict=True):
            found[index] = loss

    for_each_batch([len(ids) for ids, _ in texts], tokens, act, report)
    return found


def answers(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Ids],
    tokens: int,
    report: Report = lambda done: None,
    *,
    settings: Mapping[str, Any],
) -> list[Ids]:
    """The tokens that the model generates after each prompt, up to and with the first stop token.

    An answer also ends after `max_new_tokens`, or where the positions of the model end. Greedy answers are the same
    alone and in a batch.

    Args:
        tokenizer: its pad token fills prompts up on the left.
        tokens: prompts and answers in memory at once, in tokens.
        settings: those of transformers' `generate`, `max_new_tokens` among them; greedy unless they say how to sample.

    Raises:
        StageError: a prompt is empty, or it leaves no position for an answer.
    """
    import torch

    limit, stops, pad = positions(model), set(stop_tokens(model)), tokenizer.pad_token_id
    for prompt in prompts:
        if not 0 < len(prompt) < limit:
            raise StageError(
                f"a prompt of {len(prompt):,} tokens cannot be answered; this model takes 1 to {limit - 1:,} tokens"
            )
    found: list[Ids] = [[] for _ in prompts]
    room: int = settings["max_new_tokens"]

    def act(batch: list[int]) -> None:
        asked = [prompts[index] for index in batch]
        width = max(map(len, asked))
        if width + room > limit and len(batch) > 1:  # shorter prompts have room for longer answers
            for index in batch:
                act([index])
            return
        ids, mask = left_padded(asked, pad)
        limits = {"max_new_tokens": min(room, limit - width)}
        with torch.inference_mode():
            given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            whole = model.generate(**given, **{"do_sample": False, "num_beams": 1, **settings, **limits})
        for index, answer in zip(batch, whole[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(answer) if token in stops), len(answer))
            found[index] = answer[: end + 1]

    for_each_batch([len(prompt) + room for prompt in prompts], tokens, act, report)
    return found


def stop_tokens(model: Any) -> Ids:
    """The ids of the tokens that end an answer, from the generation config of the model."""
    stops = model.generation_config.eos_token_id
    return list(stops) if isinstance(stops, list) else [] if stops is None else [int(stops)]
