"""Direct preference optimization: a model and preference pairs in, an aligned model out.

The reference is the model the stage started from: with LoRA the same model with the adapter off, with full
fine-tuning a frozen copy. At step 0 both are one, so every reward margin must be 0 and the loss the one of its
closed form; that is measured on the first batch, and anything else stops the stage.
(Rafailov et al., arXiv 2305.18290.)

Figures are means over all pairs, or over all tokens of their answers. TRL takes the mean over batches, in which a pair
of an incomplete last batch counts more than any other.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import Metrics, Model, Parallel, Stage
from stages.model.facts import Facts, Needs
from stages.model.inputs import Inputs
from stages.runtime.errors import Problem
from stages.training import description, loop, loss_head, preparation
from stages.training.needs import facts_after_training, training_needs
from stages.training.reference import check_reference, frozen_copy, mean, measure, prove
from stages.training.rehearsal import check_adapter, check_libraries
from stages.training.settings import TrainingConfig, check_sampling, check_training, more_memory, training_notes

if TYPE_CHECKING:
    from torch import Tensor


ANSWERS = ("chosen", "rejected")
# Figures that TRL records once a batch, by what they are the mean of.
MEANS = {
    "pairs": (
        *("rewards/accuracies", "rewards/margins"),
        *(f"{figure}/{answer}" for figure in ("rewards", "logps") for answer in ANSWERS),
    ),
    "chosen tokens": ("logits/chosen", "mean_token_accuracy"),
    "rejected tokens": ("logits/rejected",),
    "tokens": ("entropy",),
}


SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # the losses of TRL that read `label_smoothing`


class Config(TrainingConfig):
    """Settings of `dpo`; `trainer:` takes TRL's DPOConfig."""

    sequences_of_row = 2


def check(config: Config) -> list[Problem]:
    """A setting of the loss without effect."""
    losses = config.trainer.get("loss_type", "sigmoid")
    named = [losses] if isinstance(losses, str) else losses
    if not config.trainer.get("label_smoothing") or not isinstance(named, list) or {*SMOOTHED} & {*map(str, named)}:
        return []
    text = f"only the losses {', '.join(SMOOTHED)} read it; remove it, or write `loss_type: robust`"
    return [("trainer.label_smoothing", f"`label_smoothing`: {text}")]


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Problems that are known before the first stage starts."""
    problems = check_training(config, facts, ["preference"], chat=True)
    return problems + check_sampling(config, "pairs") + check_reference(config)


def needs(config: Config, facts: Facts) -> Needs:
    """What training needs, with the reference as a second model where it is one."""
    alone = config.lora is not None or config.trainer.get("precompute_ref_log_probs")
    return training_needs(config, facts, copies=1 if alone else 2)


def loss_at_zero(loss_type: str, beta: float) -> float | None:
    """The loss when policy and reference agree, for the losses that have a closed form there."""
    return {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * beta) ** 2}.get(loss_type)


def rehearse(config: Config, inputs: Inputs, out: Path) -> None:
    """Build the settings and prepare the pairs."""
    check_adapter(config, inputs)
    _prepare(config, loop.tokenizer(config, inputs), inputs, out)


def _prepare(config: Config, tokenizer: Any, inputs: Inputs, out: Path) -> preparation.Prepared:
    check_libraries("DPOConfig", config, out)
    return preparation.prepare(config.draw(inputs), tokenizer, loop.row_settings("DPOConfig", config), out)


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Train on the pairs and leave the artifact in `out`."""
    tokenizer = loop.tokenizer(config, inputs)
    rows = _prepare(config, tokenizer, inputs, out)
    args = loop.arguments("DPOConfig", config, out, **loop.checkpointing(config, inputs, out))
    trainer = loop.build(
        _trainer_class(),
        model=loop.start(config, inputs, tokenizer),
        ref_model=frozen_copy(config, inputs, args),
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.held,
        processing_class=tokenizer,
        peft_config=loop.adapter(config, inputs),
    )
    loss_head.install(trainer, every_step=True)
    metrics = loop.train(trainer, config, inputs, out)
    start: dict[str, float] = next((entry for entry in trainer.state.log_history if "margin_at_start" in entry), {})
    return {**rows.account, **metrics, **start}


def _trainer_class() -> Any:
    from trl import DPOTrainer

    class Trainer(DPOTrainer):
        """TRL's DPOTrainer on prepared pairs, which proves its reference on the first batch."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.at_start: dict[str, float] = {}
            super().__init__(*args, **kwargs)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training and self.state.global_step == 0 and not self.at_start:
                loss_of = super().compute_loss
                loss, recorded = measure(self, model, lambda: loss_of(model, inputs))
                self.at_start = proof(self.args, loss, recorded, mixed=self.aux_loss_enabled)
                self.state.log_history.append(self.at_start)  # goes into checkpoints, so a resumed run has it too
            result = super().compute_loss(model, inputs, *args, **kwargs)
            figures = self._metrics["train" if self.model.training else "eval"]
            for name, count in counts(inputs["completion_mask"]).items():
                figures[f"count/{name}"].append(int(self.accelerator.gather(count).sum()))
            return result

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            weigh(self._metrics["train" if self.model.training else "eval"])
            super().log(logs, *args, **kwargs)

    return Trainer


def counts(mask: Any) -> "dict[str, Tensor]":
    """How many pairs and tokens a batch has, under the names of `MEANS`; scalars, int64.

    `mask` is (2 × pairs, width): 1 for the tokens of an answer; first all chosen answers, then all rejected ones. The
    first token of a row is predicted from nothing and is not counted.
    """
    chosen, rejected = mask[:, 1:].sum(dim=1).chunk(2)
    return {
        "pairs": mask.new_tensor(len(chosen)),
        "chosen tokens": chosen.sum(),
        "rejected tokens": rejected.sum(),
        "tokens": chosen.sum() + rejected.sum(),
    }


def weigh(figures: dict[str, list[float]]) -> None:
    """Replace the figures of batches by their means over all pairs or tokens, see `MEANS`.

    `figures`: name → one value a batch. The numbers of pairs and tokens in them, `count/…`, are removed.
    """
    for what, names in MEANS.items():
        sizes = figures.pop(f"count/{what}", [])
        for name in names if sum(sizes) else ():
            figures[name] = [mean(figures[name], sizes)]


def proof(args: Any, loss: float, recorded: Mapping[str, float], *, mixed: bool) -> dict[str, float]:
    """The mean reward margin and the loss of the first batch.

    `recorded` is what TRL recorded of the batch; `mixed`: another loss is added, so that there is no closed form.

    Raises:
        StageError: they are not those of a reference that equals the starting model.
    """
    margin, expected = abs(recorded["rewards/margins"]), None
    closed = len(args.loss_type) == 1 and args.label_smoothing == 0 and not args.use_weighting
    if closed and args.f_divergence_type == "reverse_kl" and not mixed:
        expected = loss_at_zero(args.loss_type[0], args.beta)
    prove(args, "reward margin", margin, loss, expected)
    return {"margin_at_start": margin, "loss_at_start": loss}


STAGE = Stage(
    version=4,
    config=Config,
    run=run,
    headline=description.preference_headline,
    leaves=Model(adapter=lambda config: config.lora is not None),
    check=check,
    check_model=check_model,
    notes=training_notes,
    more_memory=more_memory,
    needs=needs,
    facts=facts_after_training,
    rehearse=rehearse,
    trains=lambda config: config.training(),
    settings={"trainer": "trl.trainer.dpo_config:DPOConfig", "lora": "peft.tuners.lora.config:LoraConfig"},
    parallel=Parallel(not_divided=("sync_ref_model", "precompute_ref_log_probs")),
    describe=description.describe,
    figures=description.figures,
)
