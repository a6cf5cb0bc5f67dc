"""Kahneman-Tversky optimization: a model and answers that are labelled good or bad in, an aligned model out.

An answer y to a prompt x has the reward r = β · (log π(y|x) − log π_ref(y|x)). The loss of a good answer is
λ · (1 − σ(r − β·z)), of a bad answer λ · (1 − σ(β·z − r)), where λ is `desirable_weight` or `undesirable_weight` and
z ≥ 0 estimates the KL divergence between π and π_ref in nats: the mean of log π − log π_ref over the prompts of a
batch, each with the answer of another row. (Ethayarajh et al., arXiv 2402.01306; the loss `apo_zero_unpaired` has no z:
D'Oosterlinck et al., 2408.06266.)

The reference is the model the stage started from: with LoRA the same model with the adapter off, with full
fine-tuning a frozen copy. At step 0 both are one, so every reward must be 0 and the loss the one of its closed form;
that is measured on the first batch, and anything else stops the stage.

TRL pairs prompts with the answers of other rows ahead, in the order of the file, and refuses to shuffle. Here a batch
is paired when it is put together, from its own rows, so rows are shuffled and a resumed run sees the same pairs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import Metrics, Model, Parallel, Stage
from stages.model.facts import Facts, Needs
from stages.model.inputs import Inputs
from stages.runtime import interfaces
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit
from stages.training import description, loop, loss_head, preparation
from stages.training.adapters import is_named
from stages.training.needs import facts_after_training, training_needs
from stages.training.reference import check_reference, frozen_copy, mean, measure, prove
from stages.training.rehearsal import check_adapter, check_libraries
from stages.training.settings import TrainingConfig, check_sampling, check_training, more_memory, training_notes

if TYPE_CHECKING:
    from datasets import Dataset


DEFAULTS = {"train_sampling_strategy": "random"}  # of KTOConfig
WITHOUT_KL = ("apo_zero_unpaired",)
BALANCE = (1, 4 / 3)  # λ_good · good rows ÷ λ_bad · bad rows: equation 8 of the paper
# What TRL measures on held-out rows, and `metric_for_best_model` can name.
MEASURED = (
    *("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"),
    *("logits/chosen", "logits/rejected", "kl", "entropy", "aux_loss"),
)

Ids = list[int]


class Config(TrainingConfig):
    """Settings of `kto`; `trainer:` takes TRL's KTOConfig."""

    sequences_of_row = 2

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss has the term z."""
        return self.trainer.get("loss_type", "kto") not in WITHOUT_KL


# What is known before the first stage starts


def check(config: Config) -> list[Problem]:
    """Problems of the settings alone."""
    trainer, problems = config.trainer, check_sampling(config, "labelled answers")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if config.estimates_kl and trainer.get(name) == 1:
            why = "the KL term of this loss is estimated from the answers of other rows of a batch"
            problems.append((f"trainer.{name}", f"{why}, and a batch of 1 has none; write 2 or more"))
    for name in ("desirable_weight", "undesirable_weight"):
        if isinstance(weight := trainer.get(name), int | float) and weight <= 0:
            problems.append((f"trainer.{name}", f"`{name}` is {weight}; it must be above 0"))
    return problems + check_reference(config)


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Problems with the model that the stage starts from."""
    problems = check_training(config, facts, ["labelled"], chat=True, measured=MEASURED)
    lora, head = config.lora or {}, "embed_out" if "embed_out.weight" in facts.weights else "lm_head"
    targets = lora.get("target_modules") or "all-linear"
    excluded = is_named(head, lora.get("exclude_modules") or [])
    if targets != "all-linear" and is_named(head, targets) and not excluded:
        text = f"TRL reads the weight of `{head}` itself, so an adapter on it would not be trained; leave it out"
        problems.append(("lora.target_modules", text))
    return problems


def needs(config: Config, facts: Facts) -> Needs:
    """What training needs, with the reference as a second model where it is one."""
    alone = config.lora is not None or config.trainer.get("precompute_ref_log_probs")
    return training_needs(config, facts, copies=1 if alone else 2)


# Rows


def partners(answers: Sequence[Ids], spare: Sequence[Ids]) -> list[Ids]:
    """For each row of a batch the answer of another row: of the row before it, as in TRL.

    A row that would meet its own answer takes the first of `spare` that differs from it: else z would be its own
    log-ratio. That happens in a batch of a single row, and where a row that is drawn twice follows itself.
    """
    before = [*answers[-1:], *answers[:-1]]
    return [
        other if other != own else next((ids for ids in spare if ids != own), own)
        for own, other in zip(answers, before, strict=True)
    ]


def _labels(rows: "Dataset") -> list[bool]:
    return list(rows.data.column("label").to_pylist())


def _check_labels(config: Config, train: Sequence[bool], held: Sequence[bool]) -> None:
    """
    Raises:
        StageError: all rows have one label, or held-out rows lack the label whose figure chooses the best model.
    """
    if len(set(train)) == 1:
        label, other = ("true", "false") if train[0] else ("false", "true")
        advice = f"add rows with `label: {other}`" + (", or train `sft` on them" if train[0] else "")
        raise StageError(f"all {len(train):,} rows have `label: {label}`, and KTO learns from both; {advice}")
    metric = str(config.trainer.get("metric_for_best_model")).removeprefix("eval_")
    wanted = {"chosen": {True}, "rejected": {False}, "margins": {True, False}}.get(metric.rpartition("/")[2], set())
    for lacking in wanted - set(held) if held else ():
        word = str(lacking).lower()
        raise StageError(f"`{metric}` needs held-out rows with `label: {word}`, and there are none; hold out more rows")


def balance(config: Config, good: int, bad: int) -> str | None:
    """What to write where the weights are outside of the range that the paper recommends; None inside of it."""
    weights = [config.trainer.get(f"{word}desirable_weight", 1.0) for word in ("", "un")]
    ratio = (weights[0] * good) / (weights[1] * bad)
    if BALANCE[0] - 1e-9 <= ratio <= BALANCE[1] + 1e-9:
        return None
    low, high = BALANCE
    if ratio < low:
        name, least, most = "desirable_weight", weights[0] * low / ratio, weights[0] * high / ratio
    else:
        name, least, most = "undesirable_weight", weights[1] * ratio / high, weights[1] * ratio / low
    return f"{good:,} good and {bad:,} bad answers; the paper recommends `{name}` from {least:.2f} to {most:.2f} here"


def _paired_ahead(rows: "Dataset", batch: int, spare: Sequence[Ids]) -> "Dataset":
    """The rows with the column `KL_completion_ids`, for log-probabilities that are computed once, ahead."""

    def pair(columns: Mapping[str, list[Any]]) -> dict[str, list[Ids]]:
        return {"KL_completion_ids": partners(columns["completion_ids"], spare)}

    return rows.map(pair, batched=True, batch_size=batch)


def _collator(tokenizer: Any, args: Any, spare: Sequence[Ids], *, pairs: bool) -> Any:
    """TRL's collator, which gives each row the answer of another one if `pairs`."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    class Collator(DataCollatorForUnpairedPreference):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            if pairs and "KL_completion_ids" not in examples[0]:
                others = partners([example["completion_ids"] for example in examples], spare)
                examples = [
                    {**example, "KL_completion_ids": ids} for example, ids in zip(examples, others, strict=True)
                ]
            return dict(super().torch_call(examples))

    return Collator(tokenizer.pad_token_id, args.max_length, args.pad_to_multiple_of)


# Training


def rehearse(config: Config, inputs: Inputs, out: Path) -> None:
    """Build the settings, prepare the labelled answers and look at their labels."""
    _trainer_class()
    check_adapter(config, inputs)
    _prepare(config, loop.tokenizer(config, inputs), inputs, out)


def _prepare(config: Config, tokenizer: Any, inputs: Inputs, out: Path) -> tuple[preparation.Prepared, list[bool]]:
    """The rows, and the labels of those that are trained on."""
    check_libraries("KTOConfig", config, out, **DEFAULTS)
    settings = loop.row_settings("KTOConfig", config, **DEFAULTS)
    rows = preparation.prepare(config.draw(inputs), tokenizer, settings, out)
    labels = _labels(rows.train)
    _check_labels(config, labels, _labels(rows.held) if rows.held is not None else [])
    return rows, labels


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Train on the labelled answers and leave the artifact in `out`."""
    kind = _trainer_class()
    tokenizer = loop.tokenizer(config, inputs)
    rows, labels = _prepare(config, tokenizer, inputs, out)
    args = loop.arguments("KTOConfig", config, out, **DEFAULTS, **loop.checkpointing(config, inputs, out))
    train, held = rows.train, rows.held
    counts = {"good": sum(labels), "bad": len(labels) - sum(labels)}
    if (text := balance(config, **counts)) is not None:
        emit(out, "note", text=text, warning=True)
    spare = [train[labels.index(label)]["completion_ids"] for label in (True, False)]
    if config.estimates_kl and args.precompute_ref_log_probs:
        train = _paired_ahead(train, args.per_device_train_batch_size, spare)
        held = _paired_ahead(held, args.per_device_eval_batch_size, spare) if held is not None else None
    trainer = loop.build(
        kind,
        model=loop.start(config, inputs, tokenizer),
        ref_model=frozen_copy(config, inputs, args),
        args=args,
        data_collator=_collator(tokenizer, args, spare, pairs=config.estimates_kl),
        train_dataset=train,
        eval_dataset=held,
        processing_class=tokenizer,
        peft_config=loop.adapter(config, inputs),
    )
    loss_head.install(trainer, every_step=True)
    metrics = loop.train(trainer, config, inputs, out)
    start: dict[str, float] = next((entry for entry in trainer.state.log_history if "reward_at_start" in entry), {})
    return {**rows.account, **counts, **metrics, **start}


def _trainer_class() -> Any:
    from trl import KTOTrainer
    from trl.trainer import kto_trainer

    interfaces.require("trl", KTOTrainer, "_prepare_dataset")
    interfaces.require("trl", kto_trainer, "DataCollatorForUnpairedPreference")

    class Trainer(KTOTrainer):
        """TRL's KTOTrainer on prepared rows in any order, which proves its reference on the first batch."""

        def __init__(self, *, args: Any, **parts: Any) -> None:
            self.at_start: dict[str, float] = {}
            order, args.train_sampling_strategy = args.train_sampling_strategy, "sequential"
            try:
                super().__init__(args=args, **parts)  # refuses any other order, see the top of this file
            finally:
                args.train_sampling_strategy = order
            interfaces.require("trl", self, "aux_loss_enabled")

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training and self.state.global_step == 0 and not self.at_start:
                self.at_start = self.prove(model, inputs)
                self.state.log_history.append(self.at_start)  # goes into checkpoints, so a resumed run has it too
            result = super().compute_loss(model, inputs, *args, **kwargs)
            counts = self._metrics["train" if self.model.training else "eval"]
            for name, labels in (("chosen", inputs["label"]), ("rejected", ~inputs["label"])):
                count = int(self.accelerator.gather_for_metrics(labels.sum()).sum())
                if count:
                    counts[f"count/{name}"].append(count)
            return result

        def prove(self, model: Any, inputs: Any) -> dict[str, float]:
            """`proof` on a batch, without dropout and noise."""
            loss_of = super().compute_loss
            loss, recorded = measure(self, model, lambda: loss_of(model, inputs))
            return proof(self.args, loss, recorded, inputs["label"].tolist(), mixed=self.aux_loss_enabled)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            weigh(self._metrics["train" if self.model.training else "eval"])
            super().log(logs, *args, **kwargs)

    return Trainer


def loss_at_zero(args: Any, labels: Sequence[bool]) -> float:
    """The loss of a batch where every reward and z are 0: 1 − σ(0) = σ(0) = 1/2 of each row, times its weight."""
    good = sum(labels)
    weights = args.desirable_weight * good + args.undesirable_weight * (len(labels) - good)
    return float(weights / len(labels) / 2)


def proof(
    args: Any, loss: float, recorded: Mapping[str, float], labels: Sequence[bool], *, mixed: bool
) -> dict[str, float]:
    """The largest reward (the mean over good or over bad answers, or β·z) and the loss of the first batch.

    `recorded` is what TRL recorded of the batch; `mixed`: another loss is added, so that there is no closed form.

    Raises:
        StageError: they are not those of a reference that equals the starting model.
    """
    rewards = [recorded.get("rewards/chosen", 0.0), recorded.get("rewards/rejected", 0.0), args.beta * recorded["kl"]]
    reward = max(map(abs, rewards))
    expected = None if mixed else loss_at_zero(args, labels)
    prove(args, "largest reward", reward, loss, expected)
    return {"reward_at_start": reward, "loss_at_start": loss}


def weigh(figures: dict[str, list[float]]) -> None:
    """Replace figures of batches by their mean over all good or all bad answers, and the margin by its difference.

    TRL takes the mean over batches, however many of the answers in each are good, and has no margin where no batch
    holds both. `figures`: name → one value a batch that has such answers; `count/chosen` and `count/rejected` are
    their numbers, and are removed.
    """
    for name in ("chosen", "rejected"):
        counts = figures.pop(f"count/{name}", [])
        for figure in (f"rewards/{name}", f"logps/{name}") if counts else ():
            figures[figure] = [mean(figures[figure], counts)]
    figures.pop("rewards/margins", None)
    if figures.get("rewards/chosen") and figures.get("rewards/rejected"):
        figures["rewards/margins"] = [figures["rewards/chosen"][0] - figures["rewards/rejected"][0]]


STAGE = Stage(
    version=2,
    config=Config,
    run=run,
    headline=description.headline,
    leaves=Model(adapter=lambda config: config.lora is not None),
    check=check,
    check_model=check_model,
    notes=training_notes,
    more_memory=more_memory,
    needs=needs,
    facts=facts_after_training,
    rehearse=rehearse,
    trains=lambda config: config.training(),
    settings={"trainer": "trl.trainer.kto_config:KTOConfig", "lora": "peft.tuners.lora.config:LoraConfig"},
    parallel=Parallel(
        not_divided=("sync_ref_model", "precompute_ref_log_probs"),
        least_rows=lambda config: 2 if config.estimates_kl else 1,
    ),
    describe=description.describe,
    figures=description.figures,
)
