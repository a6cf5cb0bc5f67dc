"""The reference of preference training: the model that the stage starts from, and what is measured to prove it."""

from collections.abc import Callable, Sequence
from typing import Any

from stages.model.folder import load_model
from stages.model.inputs import Inputs
from stages.runtime import interfaces
from stages.runtime.errors import Problem, StageError
from stages.training.settings import TrainingConfig

LIVE_TOLERANCE = 1e-5  # the same forward pass twice, in the same process
STORED_TOLERANCE = 0.5  # nats, times beta: `precompute_ref_log_probs` pads its batches differently


def check_reference(config: TrainingConfig) -> list[Problem]:
    """Problems of settings under which the reference would not be the model that the stage starts from."""
    trainer, problems = config.trainer, list[Problem]()
    if trainer.get("sync_ref_model") and trainer.get("precompute_ref_log_probs"):
        text = "the reference moves, so it cannot be computed ahead; remove one of the two"
        problems.append(("trainer.sync_ref_model", text))
    if config.lora is None:
        return problems
    if trainer.get("sync_ref_model"):  # with LoRA the reference is the same model with the adapter off
        text = "with `lora` the reference is the base itself and cannot move; remove it, or `lora`"
        problems.append(("trainer.sync_ref_model", text))
    if trainer.get("neftune_noise_alpha"):
        text = "with `lora` the noise would be in the reference too, which is the same model; remove it"
        problems.append(("trainer.neftune_noise_alpha", text))
    if config.lora.get("init_lora_weights") is False:
        text = "`false` starts from a random adapter, so the model would not be its reference at step 0; remove it"
        problems.append(("lora.init_lora_weights", text))
    return problems


def frozen_copy(config: TrainingConfig, inputs: Inputs, args: Any) -> Any:
    """A frozen copy of the starting model for full fine-tuning; None where TRL takes it from the model itself."""
    if config.lora is not None or args.precompute_ref_log_probs:
        return None
    settings = dict(config.trainer.get("model_init_kwargs") or {})
    return load_model(inputs.model, **settings)


def measure(trainer: Any, model: Any, loss_of: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """The loss of a batch, and the figures that TRL records of it, without gradients, dropout and NEFTune's noise."""
    import torch

    interfaces.require("trl", trainer, "_metrics")
    model.eval()
    with torch.no_grad():
        loss = float(loss_of())
    model.train()
    recorded = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    trainer._metrics["eval"].clear()
    return loss, recorded


def mean(values: Sequence[float], counts: Sequence[float]) -> float:
    """The mean over all answers, from the mean of each batch and the number of answers in it."""
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


def prove(args: Any, name: str, reward: float, loss: float, expected: float | None) -> None:
    """Check the largest reward and the loss of the first batch; `expected` is its closed form, if there is one.

    Raises:
        StageError: they are not those of a reference that equals the starting model.
    """
    allowed = STORED_TOLERANCE * args.beta if args.precompute_ref_log_probs else LIVE_TOLERANCE
    wrong = not reward <= allowed  # also NaN
    if expected is not None:
        wrong = wrong or not abs(loss - expected) <= 2 * allowed * max(1.0, expected)
    if wrong:
        due = "" if expected is None else f" and {expected:.6f}"
        raise StageError(
            f"at step 0 the {name} is {reward:.2g} and the loss {loss:.6f}, not 0{due}: "
            "the reference is not the model this stage started from"
        )
