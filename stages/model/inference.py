"""Rows through a model without gradients: the loss of labelled tokens, and answers to prompts.

Rows go through in batches of about the same length, the longest first, so that too little memory shows at once; never
more than `tokens` tokens, padding too, or one row, on the device. Sums are made on the CPU in the rows' order: the
same rows give the same figures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.chat.labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Ids = list[int]
CHUNK = 256  # positions whose float32 logits are in memory at once; a row of 250,000 logits takes 1 MB


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches, the longest first; rows × the longest of them is at most `tokens`, or one row."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def each(
    lengths: Sequence[int], tokens: int, act: Callable[[list[int]], None], told: Callable[[int], None] = lambda _: None
) -> None:
    """Call `act` with every batch, and `told` with how many rows are done, ten times at most."""
    done, tenths = 0, 0
    for batch in batches(lengths, tokens):
        act(batch)
        done += len(batch)
        if done * 10 // len(lengths) > tenths:
            tenths = done * 10 // len(lengths)
            told(done)


def positions(model: Any) -> int:
    """How many tokens a model takes; those without such a limit take any number."""
    return int(getattr(model.config, "max_position_embeddings", None) or 10**9)


def summed_losses(model: Any, texts: Sequence[tuple[Ids, Ids]]) -> list[float]:
    """The sum over each text's labelled tokens of their cross-entropy in nats, in float32 and summed in float64."""
    import torch

    width = max(len(ids) for ids, _ in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for line, (tokens, wanted) in enumerate(texts):
        ids[line, : len(tokens)], mask[line, : len(tokens)] = torch.tensor(tokens), 1
        labels[line, : len(wanted)] = torch.tensor(wanted)
    targets = labels[:, 1:]
    lines, places = (targets != IGNORED).nonzero(as_tuple=True)
    sums = torch.zeros(len(texts), dtype=torch.float64)
    with torch.inference_mode():
        seen = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        logits = model(**seen, use_cache=False).logits
        for start in range(0, len(lines), CHUNK):
            line, place = lines[start : start + CHUNK], places[start : start + CHUNK]
            right = targets[line, place].to(model.device)
            loss = torch.nn.functional.cross_entropy(logits[line, place].float(), right, reduction="none")
            sums.index_add_(0, line, loss.double().cpu())
    return [float(total) for total in sums]


def losses(
    model: Any, texts: Sequence[tuple[Ids, Ids]], tokens: int, told: Callable[[int], None] = lambda _: None
) -> list[float]:
    """`summed_losses` of any number of texts, in batches."""
    found = [0.0] * len(texts)

    def act(batch: list[int]) -> None:
        for place, loss in zip(batch, summed_losses(model, [texts[place] for place in batch]), strict=True):
            found[place] = loss

    each([len(ids) for ids, _ in texts], tokens, act, told)
    return found


def answers(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Ids],
    tokens: int,
    told: Callable[[int], None] = lambda _: None,
    *,
    settings: Mapping[str, Any],
) -> list[Ids]:
    """What the model goes on with after each prompt, up to its stop token, which is kept.

    `settings` are those of transformers' GenerationConfig, `max_new_tokens` among them; greedy unless they say
    otherwise. Prompts are padded on the left. A token that stops is one of the model's generation config.
    """
    import torch

    stops = set(stop_tokens(model))
    found: list[Ids] = [[] for _ in prompts]
    how = {"do_sample": False, "num_beams": 1, **settings}
    max_new_tokens: int = settings["max_new_tokens"]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"

    def act(batch: list[int]) -> None:
        given = tokenizer.pad({"input_ids": [prompts[place] for place in batch]}, return_tensors="pt").to(model.device)
        width = given["input_ids"].shape[1]
        how["max_new_tokens"] = min(max_new_tokens, positions(model) - width)
        with torch.inference_mode():
            made = model.generate(**given, **how)
        for place, ids in zip(batch, made[:, width:].tolist(), strict=True):
            end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
            found[place] = ids[: end + 1]

    try:
        each([len(prompt) + max_new_tokens for prompt in prompts], tokens, act, told)
    finally:
        tokenizer.padding_side = side
    return found


def stop_tokens(model: Any) -> Ids:
    """The ids at which the model's generation config ends an answer."""
    known = model.generation_config.eos_token_id
    return list(known) if isinstance(known, list) else [] if known is None else [int(known)]
