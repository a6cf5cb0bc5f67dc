"""State that a bit-exact resume needs and transformers does not keep in its checkpoints.

tests/training/test_resume.py stops every kind of run at every step and compares the bytes.
"""

import json
from pathlib import Path
from typing import Any

from stages.runtime.events import main_process
from stages.runtime.interfaces import require

REFERENCE = "reference.safetensors"


class ExactResume:
    """Keeps the order of rows in each epoch, the figures summed since the last log, and a reference model that moves.

    It works on private attributes of transformers' and TRL's trainers.

    Raises:
        StageError: the installed libraries do not have these attributes.
    """

    def __init__(self, trainer: Any) -> None:
        require("transformers", trainer, "_get_train_sampler")
        require("trl", trainer, "_metrics")
        self.trainer = trainer
        self.sampler: Any = None
        self.make_sampler, trainer._get_train_sampler = trainer._get_train_sampler, self._get_train_sampler

    def _get_train_sampler(self, *args: Any) -> Any:
        """transformers' sampler, with a generator of its own. Without one it shares the random numbers of dropout."""
        import torch

        self.sampler = self.make_sampler(*args)
        if hasattr(self.sampler, "generator"):
            self.sampler.generator = torch.Generator()
        return self.sampler

    def begin_epoch(self, epoch: int, loader: Any) -> None:
        """Make the order of rows depend on seed and epoch alone.

        accelerate does not always pass the epoch on when it skips the batches that were trained on before a stop.
        """
        loader.set_epoch(epoch)
        if hasattr(self.sampler, "generator"):
            self.sampler.generator.manual_seed(self.trainer.args.seed + epoch)
        elif hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def save(self, checkpoint: Path) -> None:
        """Add this state to a checkpoint; every process writes its own sums."""
        from safetensors.torch import save_model

        trainer = self.trainer
        sums = {
            "loss": trainer._tr_loss.item(),
            "logged": trainer._globalstep_last_logged,
            "tokens": trainer._total_train_tokens,
            "figures": trainer._metrics["train"],
        }
        self._sums(checkpoint).write_text(json.dumps(sums), encoding="utf-8")
        if getattr(trainer.args, "sync_ref_model", False) and main_process():
            save_model(trainer.accelerator.unwrap_model(trainer.ref_model), str(checkpoint / REFERENCE))

    def load(self, checkpoint: Path) -> None:
        """Restore what `save` added to a checkpoint; without such files nothing is restored."""
        from safetensors.torch import load_model

        trainer = self.trainer
        require("transformers", trainer, "_tr_loss", "_globalstep_last_logged", "_total_train_tokens")
        if self._sums(checkpoint).is_file():
            sums = json.loads(self._sums(checkpoint).read_text(encoding="utf-8"))
            trainer._tr_loss.fill_(sums["loss"])
            trainer._globalstep_last_logged = sums["logged"]
            trainer._total_train_tokens = sums["tokens"]
            trainer._metrics["train"].update(sums["figures"])
        if (checkpoint / REFERENCE).is_file():
            load_model(trainer.accelerator.unwrap_model(trainer.ref_model), str(checkpoint / REFERENCE))

    def _sums(self, checkpoint: Path) -> Path:
        return checkpoint / f"sums_{self.trainer.args.process_index}.json"
