"""The settings that the training stages share, and their checks before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stages.data.drawing import Draw
from stages.data.mixture import Mixture
from stages.data.source import Source
from stages.model import quantized
from stages.model.device import has_gpu
from stages.model.facts import Facts, check_template
from stages.model.inputs import Inputs
from stages.model.references import ModelRef
from stages.runtime.errors import Problem, nearest
from stages.training import adapters, checkpointing, effects, packages, quantized_base

LIMIT = "set `trainer.max_length`"
SAVE_STEPS = 0.1  # a share of all steps: a killed run loses a tenth at most
MAX_LENGTH = 1024  # TRL's default
BATCH = 8  # transformers' default
LOGGING_STEPS = 10  # TRL's default, and how often it evaluates unless `eval_steps` says otherwise
# What TRL measures on held-out rows, and `metric_for_best_model` can name.
MEASURED = ("loss", "mean_token_accuracy", "entropy", "aux_loss")
MEASURED_OF_PAIRS = tuple(
    f"{figure}/{of}"
    for figure, them in {
        "rewards": ("accuracies", "margins", "chosen", "rejected"),
        "logps": ("chosen", "rejected"),
        "logits": ("chosen", "rejected"),
    }.items()
    for of in them
)

# Settings that must be positive; TRL and PEFT accept other values, and then fail late or train nothing.
POSITIVE = {
    "trainer": (
        *("learning_rate", "num_train_epochs", "max_length", "beta", "gradient_accumulation_steps"),
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
    ),
    "lora": ("r", "lora_alpha"),
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training stage trains on, for the plan and for views."""

    draw: Draw
    max_length: int | None
    """Tokens of a sequence; None for no limit."""
    cut: bool
    """Whether longer texts are cut into pieces, none lost. Otherwise a sequence keeps its start."""
    whole: bool = False
    """Whether pairs are conversations as a reward model reads them, of which longer ones are dropped."""
    batch: int
    """Sequences of a batch on one device."""
    inexact: str | None
    """Why resuming is not bit-exact; None if it is."""
    packages: frozenset[str] = frozenset()
    """Packages that only these settings need."""


class TrainingConfig(BaseModel):
    """The settings that `pt`, `sft` and `dpo` share."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sequences_of_row: ClassVar[int] = 1
    """How many sequences the model reads for a row of data."""

    model: ModelRef
    """A folder, a Hub name with its revision, or an earlier stage as `$name`."""
    data: Mixture
    """Names of declared data; with weights, such as `{books: 1, general: 5}`, the shares of rows drawn from each."""
    rows: int | None = Field(default=None, gt=0)
    """How many rows are drawn by the weights. Default: the largest number that repeats no row."""
    eval_data: list[Source] = []
    """Names of declared data that is held out and never trained on."""
    eval_size: float = Field(default=0, ge=0)
    """Rows of `data` held out: a share below 1, or a number of rows."""
    lora: dict[str, Any] | None = None
    """PEFT's LoraConfig; without it the whole model is trained."""
    quantized_base: quantized.Method | None = None
    """QLoRA: the adapter is trained on a base whose linear layers are in 4 bits (`nf4`) or in 8 bits (`int8`)."""
    trainer: dict[str, Any] = {}
    """TRL's own settings."""
    early_stopping: int | None = Field(default=None, gt=0)
    """Stop after this many evaluations in a row without improvement."""
    template: str | None = None
    """The chat template's text; without it the model keeps its own."""
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _drawn_by_weights(self) -> "TrainingConfig":
        if self.rows is not None and not self.data.weights:
            raise ValueError("`rows` are drawn by weights; write `data: {books: 1, general: 5}`")
        return self

    @property
    def max_length(self) -> int | None:
        """Tokens of a sequence; None for no limit."""
        length: int | None = self.trainer.get("max_length", MAX_LENGTH)
        return length

    @property
    def sequences(self) -> int:
        """Sequences that the model reads at once on one device."""
        return self.sequences_of_row * int(self.trainer.get("per_device_train_batch_size", BATCH))

    def room_for_layers(self, model: Mapping[str, Any], memory: int | None = None) -> tuple[int, int] | None:
        """Where the stage needs no gradient checkpointing, the bytes of `checkpointing.room`; else None."""
        return checkpointing.room(self.trainer, model, self.sequences, self.max_length, memory)

    def draw(self, inputs: Inputs | None = None) -> Draw:
        """Which rows are trained on; with `inputs`, each `$stage` is the file of its rows."""
        read = (inputs or Inputs()).read
        return Draw(
            sources=[read(source) for source in self.data.sources],
            weights=self.data.weights,
            rows=self.rows,
            eval_data=[read(source) for source in self.eval_data],
            eval_size=self.eval_size,
            seed=self.seed,
        )

    def training(self, *, cut: bool = False, whole: bool = False) -> Training:
        """What the stage trains on; `cut` and `whole` as in `Training`."""
        return Training(
            draw=self.draw(),
            max_length=self.max_length,
            cut=cut,
            whole=whole,
            batch=self.trainer.get("per_device_train_batch_size", BATCH),
            inexact=inexact_resume(self),
            packages=frozenset(packages.needed(self.trainer, self.quantized_base)),
        )

    @field_validator("eval_size")
    @classmethod
    def _share_or_rows(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"`eval_size` {value} is neither a share below 1 nor a whole number of rows")
        return value


def check_training(
    config: TrainingConfig, facts: Facts, formats: Sequence[str], *, chat: bool, measured: Sequence[str] = ()
) -> list[Problem]:
    """Problems that are known before anything is loaded.

    `measured`: the figures of held-out rows that `metric_for_best_model` can name. Default: those of the formats.
    """
    problems: list[Problem] = []
    for key, sources in (("data", config.data.sources), ("eval_data", config.eval_data)):
        for source in sources:
            if source.format not in formats:
                wanted = ", ".join(f"`{name}`" for name in formats)
                problems.append((key, f"`{source.path}` has format `{source.format}`; this stage reads {wanted}"))
    if "quantization_config" in facts.config:
        problems.append(
            (
                "model",
                f"{facts.source} is quantized already and cannot be trained; start from the model before",
            )
        )
    if config.trainer.get("truncation_mode") == "keep_end":
        problems.append(("trainer.truncation_mode", "`keep_end` cuts off how the prompt begins; remove it"))
    if config.trainer.get("eval_strategy", "no") != "no" and not (config.eval_data or config.eval_size):
        problems.append(
            (
                "trainer.eval_strategy",
                "evaluation needs held-out rows; add `eval_size: 0.05` or `eval_data: NAME`",
            )
        )
    of_formats = (*MEASURED, *MEASURED_OF_PAIRS) if "preference" in formats else MEASURED
    problems += _check_best(config, measured or of_formats)
    if text := facts.too_long(config.max_length):
        problems.append(("trainer.max_length", text))
    problems += _check_values(config) + packages.check(config.trainer) + effects.check(config.trainer)
    if config.lora is not None:
        problems += adapters.check(config.lora, facts)
    if config.quantized_base is not None:
        problems += quantized_base.check(config.quantized_base, config.lora, config.trainer, facts)
    if chat or config.template:
        problems += check_template(config.template, facts)
    return problems


def training_notes(config: TrainingConfig, facts: Facts) -> list[str]:
    """What a user should know of the settings that is no problem."""
    found = effects.notes(config.trainer)
    if config.quantized_base == "int8" and has_gpu():
        text = "on a GPU, LLM.int8 rounds the inputs of layers in training, which the folded and merged model does not"
        found.append(f"`quantized_base: int8`: {text}")
    limit, length = facts.positions, config.max_length
    if length and limit and length > limit and not facts.learned_positions:
        found.append(f"`max_length` {length} is above the {limit} positions that {facts.source} was made for")
    return found


def more_memory(config: TrainingConfig) -> str:
    """What to set when memory runs out."""
    batch = config.trainer.get("per_device_train_batch_size", BATCH)
    found = ["train with `lora`"] if config.lora is None else []
    if isinstance(batch, int) and batch > 1:
        found.append(
            f"halve `trainer.per_device_train_batch_size`, which is {batch}, and double `gradient_accumulation_steps`"
        )
    if not config.trainer.get("gradient_checkpointing", config.trainer.get("activation_checkpointing", True)):
        found.append("set `trainer.gradient_checkpointing: true`")
    if config.lora is not None and config.quantized_base is None:
        found.append("set `quantized_base: nf4`")
    found.append(f"lower `trainer.max_length`, which is {config.max_length}" if config.max_length else LIMIT)
    return ", or ".join(found)


def _check_best(config: TrainingConfig, measured: Sequence[str]) -> list[Problem]:
    """Early stopping and `load_best_model_at_end` need evaluations, and a checkpoint at each of them."""
    problems: list[Problem] = []
    trainer, best = config.trainer, config.trainer.get("load_best_model_at_end")
    evaluates = trainer.get("eval_strategy", "no")
    if config.early_stopping is not None and evaluates == "no":
        text = "it counts evaluations; add `eval_strategy: steps` and `eval_steps: 50` to `trainer`"
        problems.append(("early_stopping", text))
    if config.early_stopping is not None and not best:
        text = "the last model would be kept, which is not the best; add `load_best_model_at_end: true` to `trainer`"
        problems.append(("early_stopping", text))
    if best and evaluates == "no":
        text = "the best is found by evaluating; add `eval_strategy: steps`"
        problems.append(("trainer.load_best_model_at_end", text))
    metric = trainer.get("metric_for_best_model")
    bare = str(metric).removeprefix("eval_")
    if metric is not None and bare not in measured:
        text = f"`{metric}` is not measured here{nearest(bare, measured)}"
        problems.append(("trainer.metric_for_best_model", text))
    saves = {**saving(trainer), **trainer}["save_strategy"]
    if best and evaluates != "no" and saves not in ("best", evaluates):
        text = f"is `{saves}`, and with `load_best_model_at_end` it saves when it evaluates; write `{evaluates}`"
        problems.append(("trainer.save_strategy", f"`save_strategy` {text}, or leave it out"))
    elif best and saves == evaluates == "steps":
        problems += _check_save_steps(trainer)
    return problems


def _check_save_steps(trainer: Mapping[str, Any]) -> list[Problem]:
    """transformers requires `save_steps` to be a multiple of `eval_steps` when it loads the best model."""
    step = trainer.get("eval_steps") or trainer.get("logging_steps") or LOGGING_STEPS
    save = {**saving(trainer), **trainer}["save_steps"]
    if (step < 1) == (save < 1) and round(save * 1_000_000) % round(step * 1_000_000) == 0:
        return []
    text = f"{save} is no multiple of `eval_steps`, {step}, as `load_best_model_at_end` needs; write {step}"
    return [("trainer.save_steps", f"{text}, or leave it out")]


def saving(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The default checkpoint schedule: every tenth of the run, or at each evaluation if the best model is wanted."""
    usual = {"save_strategy": "steps", "save_steps": SAVE_STEPS}
    if not trainer.get("load_best_model_at_end"):
        return usual
    if trainer.get("eval_strategy") == "epoch":
        return {**usual, "save_strategy": "epoch"}
    evaluates = trainer.get("eval_steps") or trainer.get("logging_steps") or LOGGING_STEPS
    return {**usual, "save_steps": evaluates if evaluates >= 1 else SAVE_STEPS}


def _check_values(config: TrainingConfig) -> list[Problem]:
    problems: list[Problem] = []
    for part, names in POSITIVE.items():
        values = getattr(config, part) or {}
        for name in names:
            if isinstance(values.get(name), int | float) and values[name] <= 0:
                problems.append((f"{part}.{name}", f"`{name}` is {values[name]}; it must be above 0"))
    dropout = (config.lora or {}).get("lora_dropout", 0)
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        problems.append(("lora.lora_dropout", f"`lora_dropout` is {dropout}; it is a share: at least 0 and below 1"))
    return problems


def check_sampling(config: TrainingConfig, rows: str) -> list[Problem]:
    """Refuse to sample by length where TRL does not know the length of `rows`, such as `pairs`."""
    order = config.trainer.get("train_sampling_strategy")
    if order not in ("group_by_length", "batch_rebalance"):
        return []
    why = f"goes by the length of a row, which TRL does not know of {rows}"
    advice = "leave it out, or write `sequential` to keep the order of the file"
    return [("trainer.train_sampling_strategy", f"`{order}` {why}; {advice}")]


def inexact_resume(config: TrainingConfig) -> str | None:
    """Why resuming is not bit-exact; None if it is.

    tests/training/test_resume.py shows both on a CPU. A run that goes on with another device or another number of
    processes than it began with is not bit-exact.
    """
    evaluates = config.trainer.get("logging_steps", LOGGING_STEPS)
    settings = {**saving(config.trainer), "eval_steps": evaluates, **config.trainer}
    between = settings["save_strategy"] == "steps" and settings["eval_steps"] != settings["save_steps"]
    if settings.get("load_best_model_at_end") and between:
        return (
            "with `load_best_model_at_end`, a stop at an evaluation between two checkpoints leaves one more to choose "
            "the best from; set `eval_steps` to `save_steps`"
        )
    if config.trainer.get("dataloader_persistent_workers"):  # they draw a seed when they start, not in each epoch
        return "with `dataloader_persistent_workers`, dropout draws other numbers after a stop; remove it"
    return None
