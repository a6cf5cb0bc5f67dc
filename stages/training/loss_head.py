"""The head of the loss in TRL's trainers: what it computes, and at which steps.

TRL's fused head returns for each labelled token its log-probability, which the loss needs, and the entropy and whether
the label is the most likely token, which only the log shows. Both figures take a pass over all logits. `install` lets
`SFTTrainer` measure them where they are shown: at the step that is logged, and in evaluation.

Off a GPU, TRL's head scores also the tokens without a label, and computes all logits twice. Here a CPU computes them
once, for labelled tokens only. The numbers are TRL's up to rounding.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stages.runtime.interfaces import require, require_parameters

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # TRL's, in its order
# What SFTTrainer records of these fields, by the name in the log.
FIGURES = {"entropy": "entropy", "is_top1": "mean_token_accuracy"}
AT_ONCE = (
    2**27
)  # logits that are kept for the backward pass; more are computed in blocks, and again in the backward pass


def install(trainer: Any, *, every_step: bool) -> None:
    """Give a TRL trainer this head; without `every_step`, `FIGURES` are of the steps that are logged alone.

    Raises:
        StageError: the installed TRL has another head.
    """
    from trl.trainer import utils

    require("trl", trainer, "compute_loss", "_metrics")
    require("trl", utils, "_ChunkedLogProbFunction", "_use_triton")
    expected = ("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping")
    require_parameters("trl", utils._ChunkedLogProbFunction.forward, *expected, "logit_scale", "outputs")
    real = trainer.compute_loss

    @functools.wraps(real)
    def compute_loss(model: Any, *args: Any, **kwargs: Any) -> Any:
        shown = every_step or not trainer.model.training or _is_logged(trainer)
        with _replaced(() if shown else tuple(FIGURES)):
            loss = real(model, *args, **kwargs)
        if not shown:
            for figure in FIGURES.values():
                trainer._metrics["train"].pop(figure, None)
        return loss

    trainer.compute_loss = compute_loss


def _is_logged(trainer: Any) -> bool:
    """Whether the step that is being computed will be logged, or may be: an epoch ends at a step that is not known."""
    args, step = trainer.args, trainer.state.global_step + 1
    strategy = str(args.logging_strategy.value)
    first = args.logging_first_step and step == 1
    return strategy == "epoch" or first or (strategy == "steps" and step % trainer.state.logging_steps == 0)


@contextlib.contextmanager
def _replaced(skipped: tuple[str, ...]) -> Iterator[None]:
    """Replace TRL's head while a loss is computed; the fields `skipped` are zeros."""
    from trl.trainer import utils

    real, on_gpu = utils._ChunkedLogProbFunction, utils._use_triton
    utils._ChunkedLogProbFunction = _Head(real, skipped)
    utils._use_triton = lambda device: device.type == "cpu" or on_gpu(device)  # scores labelled tokens alone
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = real, on_gpu


class _Head:
    """Takes the place of TRL's autograd function."""

    def __init__(self, real: Any, skipped: tuple[str, ...]) -> None:
        self.real, self.skipped = real, skipped

    def apply(
        self,
        hidden: "Tensor",
        weight: "Tensor",
        bias: "Tensor | None",
        targets: "Tensor",
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> "tuple[Tensor | None, ...]":
        """The fields of N tokens, each (N,), in the order of `FIELDS`; None for those that are not in `outputs`.

        `hidden` is (N, hidden size), `weight` (vocabulary, hidden size), `bias` (vocabulary,), `targets` (N,).
        """
        import torch

        wanted = tuple(field for field in outputs if field not in self.skipped)
        if hidden.device.type == "cpu":
            found = scores(hidden, weight, bias, targets, temperature, softcap, logit_scale, wanted)
        else:
            settings = (temperature, chunk_size, softcap, logit_scale, wanted)
            found = self.real.apply(hidden, weight, bias, targets, *settings)
        fields = dict(zip(FIELDS, found, strict=True))
        for field in set(outputs) - set(wanted):
            kind = torch.bool if field == "is_top1" else torch.float32
            fields[field] = torch.zeros(len(targets), dtype=kind, device=hidden.device)
        return tuple(fields[field] for field in FIELDS)


def scores(
    hidden: "Tensor",
    weight: "Tensor",
    bias: "Tensor | None",
    targets: "Tensor",
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    wanted: tuple[str, ...],
) -> "list[Tensor | None]":
    """What `_Head.apply` returns, in plain torch, at most `AT_ONCE` logits at a time."""
    import torch
    from torch.utils.checkpoint import checkpoint

    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def block(hidden: "Tensor", targets: "Tensor", weight: "Tensor", bias: "Tensor | None") -> "list[Tensor | None]":
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        if logit_scale != 1:
            logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if temperature != 1:
            logits = logits / temperature
        log_probs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return [log_probs, *_figures(logits.detach(), targets, wanted)]

    parts = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = max(1, AT_ONCE // len(weight))
    if len(hidden) <= rows:
        return block(parts[0], targets, *parts[1:])
    found = [
        checkpoint(block, *pair, *parts[1:], use_reentrant=False, preserve_rng_state=False)
        for pair in zip(parts[0].split(rows), targets.split(rows), strict=True)
    ]
    return [None if field[0] is None else torch.cat(field) for field in zip(*found, strict=True)]


def _figures(logits: "Tensor", targets: "Tensor", wanted: tuple[str, ...]) -> "Iterator[Tensor | None]":
    """The other fields of tokens with these logits, (N, vocabulary), without gradients."""
    log_probs = logits.log_softmax(-1) if {"entropy", "log_sum_sq_probs"} & {*wanted} else logits
    yield -(log_probs.exp() * log_probs).sum(-1) if "entropy" in wanted else None
    yield (2 * log_probs).logsumexp(-1) if "log_sum_sq_probs" in wanted else None
    yield logits.mean(-1) if "mean_logits" in wanted else None
    yield logits.argmax(-1) == targets if "is_top1" in wanted else None
