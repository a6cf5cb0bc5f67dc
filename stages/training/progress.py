"""What happens during training: steps are reported, checkpoints sealed, and the run is stopped."""

import math
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import StageError
from stages.runtime.events import emit, main_process
from stages.training.checkpoint import rotate, seal
from stages.training.engine import check_engine, own_part
from stages.training.resume import ExactResume
from stages.training.sharing import sharing

if TYPE_CHECKING:
    from transformers import (
        TrainerCallback,
    )


SAVE_SECONDS = 30 * 60  # a checkpoint is written at least this often


class Progress:
    """Reports steps, seals checkpoints, stops on SIGTERM, early, and on a loss that is not finite."""

    def __init__(self, trainer: Any, out: Path, keep: int, patience: int | None) -> None:
        from transformers import EarlyStoppingCallback

        self.out, self.keep = out, keep
        self.checkpoints = Path(trainer.args.output_dir)
        self.resume = ExactResume(trainer)
        self.asked = self.stopped = self.to_save = False
        self.shown, self.saved = 0.0, time.monotonic()
        self.early = EarlyStoppingCallback(patience) if patience is not None else None
        if self.early is not None:
            trainer.add_callback(self.early)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))

    def callback(self) -> "TrainerCallback":
        from transformers import TrainerCallback

        progress = self

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                check_engine(progress.resume.trainer.model_wrapped, sharing())
                emit(progress.out, "total", steps=state.max_steps, step=state.global_step, **batch_sizes(args))
                progress.resume.load(progress.newest(state))
                progress.recall(state)
                if state.best_model_checkpoint is not None:  # the folder may have moved since
                    best = progress.checkpoints / Path(state.best_model_checkpoint).name
                    state.best_model_checkpoint = str(best)

            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress.resume.begin_epoch(int(state.epoch), kwargs["train_dataloader"])

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress.epoch_end(state, control)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress.step(args, state, control)

            def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress.log(state, kwargs["logs"])

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress.save(state, kwargs["model"])

        return Callback()

    def recall(self, state: Any) -> None:
        """Restore the count of evaluations without improvement from the checkpoint.

        transformers' own way would also restore what the loop was about to do when it stopped.
        """
        if self.early is not None:
            known = state.stateful_callbacks.get(type(self.early).__name__, {}).get("attributes", {})
            self.early.early_stopping_patience_counter = known.get("early_stopping_patience_counter", 0)

    def no_better(self) -> bool:
        """Whether training stopped early. That counts before a stop by the user, since nothing is left to resume."""
        early = self.early
        return early is not None and early.early_stopping_patience_counter >= early.early_stopping_patience

    def step(self, args: Any, state: Any, control: Any) -> None:
        from transformers.trainer_utils import SaveStrategy

        if time.monotonic() - self.shown > 0.25:
            self.shown = time.monotonic()
            emit(self.out, "step", step=state.global_step)
        asked, due = _any_process((self.asked, self.save_is_due(args)), args.world_size)
        control.should_save |= due
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            args.save_strategy = SaveStrategy.STEPS  # `best` would not save a step without improvement
        if is_whole(state.epoch):  # the log and evaluation at the end of an epoch must be in its checkpoint
            self.to_save, control.should_save = control.should_save, False

    def save_is_due(self, args: Any) -> bool:
        """Whether the last checkpoint is so old that a kill would cost too much.

        Not if the user wants no checkpoints, or if the choice of the best model would depend on the clock.
        """
        wanted = str(args.save_strategy.value) in ("steps", "epoch") and not args.load_best_model_at_end
        return wanted and time.monotonic() - self.saved > SAVE_SECONDS

    def epoch_end(self, state: Any, control: Any) -> None:
        """transformers calls this also when a stop cuts an epoch short; then nothing is logged or saved again."""
        if is_whole(state.epoch):
            control.should_save |= self.to_save
            self.to_save = False
        elif self.stopped and not self.no_better():
            control.should_log = control.should_evaluate = control.should_save = False

    def newest(self, state: Any) -> Path:
        return self.checkpoints / f"checkpoint-{state.global_step}"

    def log(self, state: Any, logs: Mapping[str, float]) -> None:
        if "train_runtime" in logs and self.stopped and not self.no_better():
            return  # the summary of an unfinished run is not a figure of its last step
        figures = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        emit(self.out, "log", step=state.global_step, **figures)
        for key in ("loss", "grad_norm", "eval_loss"):
            scaled = key == "grad_norm" and self.resume.trainer.args.fp16  # its loss scaler skips steps
            if key in figures and not math.isfinite(figures[key]) and not scaled:
                raise StageError(
                    f"`{key}` is {figures[key]} at step {state.global_step}; nothing of it is kept as a result. "
                    "Lower `trainer.learning_rate`, set `trainer.max_grad_norm`, or train in bf16 instead of fp16; "
                    "then run again"
                )

    def save(self, state: Any, model: Any) -> None:
        """Seal the newest checkpoint, except for the last step: resuming from that one would train a step too many."""
        newest = self.newest(state)
        self.saved = time.monotonic()
        self.resume.save(newest)
        wait_for_all()  # every process writes its random state and its sums
        try:
            check_finite(model, state.global_step)
        except StageError:
            shutil.rmtree(newest, ignore_errors=True)
            raise
        last = state.global_step >= state.max_steps or self.no_better()
        if main_process() and newest.is_dir() and not last:
            seal(newest)
            rotate(self.checkpoints, self.keep, state.best_model_checkpoint)
        wait_for_all()


def is_whole(epoch: float) -> bool:
    return epoch == int(epoch)


def wait_for_all() -> None:
    """A barrier when several processes train."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def check_finite(model: Any, step: int) -> None:
    """Check every trained weight before it becomes a checkpoint or a result; each process checks its part.

    Raises:
        StageError: a weight is NaN or infinite.
    """
    import torch

    trained = ((name, own_part(weight)) for name, weight in model.named_parameters() if weight.requires_grad)
    found = [next((name for name, part in trained if not torch.isfinite(part).all()), None)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, found[0])
    for name in found:
        if name is not None:
            raise StageError(
                f"the weight `{name}` is not finite after step {step}; lower `trainer.learning_rate` and run again"
            )


def batch_sizes(args: Any) -> dict[str, int]:
    return {
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "processes": args.world_size,
    }


def _any_process(flags: Sequence[bool], processes: int) -> list[bool]:
    """For each flag whether it is set in any process, since all processes must stop and save at the same step."""
    if processes == 1:
        return list(flags)
    import torch

    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    together = torch.tensor([int(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in together.tolist()]
