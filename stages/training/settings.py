"""The settings that the training stages share, and their checks before anything is loaded."""

import contextlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stages.data.drawing import Draw
from stages.data.mixture import Mixture
from stages.data.source import Source
from stages.model.facts import EMBEDDINGS, Facts, check_template
from stages.model.inputs import Inputs
from stages.model.lora import check_foldable
from stages.model.references import ModelRef
from stages.runtime.errors import Problem, nearest


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
# Packages that are not dependencies of this project, by the values of settings that need them.
PACKAGES = {
    "report_to": {name: name for name in ("wandb", "tensorboard", "mlflow", "swanlab", "trackio", "comet_ml")},
    "optim": {"adamw_8bit": "bitsandbytes", "adamw_bnb_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes"},
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


class TrainingConfig(BaseModel):
    """The settings that `pt`, `sft` and `dpo` share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
            max_length=self.trainer.get("max_length", MAX_LENGTH),
            cut=cut,
            whole=whole,
            batch=self.trainer.get("per_device_train_batch_size", BATCH),
            inexact=inexact_resume(self),
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
    problems += _check_values(config)
    if config.lora is not None:
        problems += _check_targets(config.lora, facts) + _check_foldable(config.lora, facts)
    if chat or config.template:
        problems += check_template(config.template, facts)
    return problems


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
    for name, packages in PACKAGES.items():
        value = config.trainer.get(name)
        for word in value if isinstance(value, list) else [value]:
            package = packages.get(str(word))
            if package is not None and importlib.util.find_spec(package) is None:
                problems.append((f"trainer.{name}", f"`{word}` needs a package; `pip install {package}`, or remove it"))
    return problems


def _check_targets(lora: Mapping[str, Any], facts: Facts) -> list[Problem]:
    targets, modules = lora.get("target_modules", "all-linear"), facts.linear_modules()
    if broken := _no_patterns(lora):
        return broken
    if facts.experts > 1 and (unfoldable := _check_experts(targets, modules)):
        return unfoldable
    if not modules or targets in ("all-linear", None):
        return []
    kinds = sorted({name.rsplit(".", 1)[-1] for name in modules} - {"lm_head"})
    there = "it has " + ", ".join(f"`{kind}`" for kind in kinds)
    if targets == "all":
        return [("lora.target_modules", "`all` is no pattern of PEFT; write `all-linear`, or leave it out")]
    if isinstance(targets, str):
        if any(is_named(name, targets) for name in modules):
            return []
        return [("lora.target_modules", f"`{targets}` matches no linear layer of {facts.source}; {there}")]
    return [
        ("lora.target_modules", f"`{target}` matches no linear layer of {facts.source}; {there}")
        for target in targets
        if not any(is_named(name, [target]) for name in modules)
    ]


def _check_experts(targets: str | Sequence[str] | None, modules: Sequence[str]) -> list[Problem]:
    """PEFT trains the experts, which transformers keep in one 3-D tensor, as `target_parameters`: see `FOLDED`."""
    ends = {name: name.rsplit(".", 1)[-1] for name in modules}
    routed = {end for name, end in ends.items() if ".experts." in name} | {"gate", "router"}
    others = sorted({*ends.values()} - routed - {"lm_head"})
    whole = targets in ("all-linear", None)
    reached = routed if whole else {end for name, end in ends.items() if is_named(name, targets or [])} & routed
    if not reached:
        return []
    clause = "an adapter on experts or their router cannot be folded into the base"
    advice = f"write `target_modules: [{', '.join(others)}]`, or remove `lora` to train all weights"
    return [("lora.target_modules" if not whole else "lora", f"{clause}; {advice}")]


def _no_patterns(lora: Mapping[str, Any]) -> list[Problem]:
    """Strings that PEFT would read as regular expressions and that are not valid ones."""
    texts = [(name, lora[name]) for name in ("target_modules", "exclude_modules") if isinstance(lora.get(name), str)]
    texts += [(name, text) for name in ("rank_pattern", "alpha_pattern") for text in lora.get(name) or {}]
    problems: list[Problem] = []
    for name, text in texts:
        try:
            re.compile(str(text))
        except re.error as error:
            way = "text is read as one, so mend it or give a list of names" if "modules" in name else "mend it"
            problems.append((f"lora.{name}", f"`{text}` is no regular expression ({error}); {way}"))
    return problems


def check_sampling(config: TrainingConfig, rows: str) -> list[Problem]:
    """Refuse to sample by length where TRL does not know the length of `rows`, such as `pairs`."""
    order = config.trainer.get("train_sampling_strategy")
    if order not in ("group_by_length", "batch_rebalance"):
        return []
    why = f"goes by the length of a row, which TRL does not know of {rows}"
    advice = "leave it out, or write `sequential` to keep the order of the file"
    return [("trainer.train_sampling_strategy", f"`{order}` {why}; {advice}")]


def is_named(module: str, targets: str | Sequence[str]) -> bool:
    """PEFT's own rule: a string is a pattern for the whole name, a list holds names or their ends."""
    if isinstance(targets, str):
        with contextlib.suppress(re.error):  # `_check_targets` reports it
            return re.fullmatch(targets, module) is not None
        return False
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _check_foldable(lora: Mapping[str, Any], facts: Facts) -> list[Problem]:
    advice = "later stages could not fold the adapter into its base; remove it"
    problems = [(f"lora.{name}", text) for name, text in check_foldable(lora)]
    tied = facts.weights and not {"lm_head.weight", "embed_out.weight"} & facts.weights.keys()
    tied = tied and not lora.get("ensure_weight_tying")  # with it, PEFT trains both as one
    for name in lora.get("modules_to_save") or [] if tied else []:
        if name in ("lm_head", *EMBEDDINGS):
            clause = f"input and output embeddings of {facts.source} are one weight, and `{name}` would train a copy"
            problems.append(("lora.modules_to_save", f"{clause}; {advice}"))
    problems += _check_token_rows(lora, facts) if tied else []
    targets, excluded = lora.get("target_modules") or [], lora.get("exclude_modules") or []
    for name in facts.weights if tied and targets != "all-linear" else ():
        module = name.removesuffix(".weight")
        if is_named(module, EMBEDDINGS) and is_named(module, targets) and not is_named(module, excluded):
            clause = f"input and output embeddings of {facts.source} are one weight, and an adapter on `{module}`"
            problems.append(("lora.target_modules", f"{clause} would change both when it is folded; leave it out"))
    return problems


def _check_token_rows(lora: Mapping[str, Any], facts: Facts) -> list[Problem]:
    """Where input and output embeddings are one weight, a row is trained in both."""
    given = lora.get("trainable_token_indices")
    rows = given if isinstance(given, dict) else {}
    inputs = next((ids for name, ids in rows.items() if is_named(name, EMBEDDINGS)), None)
    for name, ids in rows.items():
        if ids != inputs:
            clause = f"input and output embeddings of {facts.source} are one weight, and `{name}` has ids of its own"
            return [("lora.trainable_token_indices", f"{clause}; write one list of ids")]
    return []


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
