"""What the three training stages share: their settings, the run itself, checkpoints, metrics and the artifact."""

import contextlib
import importlib.util
import json
import math
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.errors import Interrupted, StageError, nearest
from stages import _checkpoint, _model, _resume, _rows, _template
from stages._events import emit, main_process

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

# Kinds of LoRA that are no plain update of a weight.
UNFOLDABLE = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
)

SAVE_STEPS = 0.1  # a share of all steps: a killed run loses a tenth at most
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

# Settings that TRL and PEFT take at any value, and that fail late or train nothing when they are not positive.
POSITIVE = {
    "trainer": (
        *("learning_rate", "num_train_epochs", "max_length", "beta", "gradient_accumulation_steps"),
        *("per_device_train_batch_size", "per_device_eval_batch_size"),
    ),
    "lora": ("r", "lora_alpha"),
}
# Packages that a setting's value needs and that do not come with this project.
NEEDS = {
    "report_to": {name: name for name in ("wandb", "tensorboard", "mlflow", "swanlab", "trackio", "comet_ml")},
    "optim": {"adamw_8bit": "bitsandbytes", "adamw_bnb_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes"},
}


class TrainingConfig(BaseModel):
    """The settings that `pt`, `sft` and `dpo` share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | list[str]
    """A folder, a Hub name with its revision, or an earlier stage as `$name`."""
    data: list[_rows.Source] = Field(min_length=1)
    """Names of declared data; with weights, such as `{books: 1, general: 5}`, the shares of rows drawn from each."""
    weights: list[float] = []
    """Those of `data`; filled in by the pipeline."""
    rows: int | None = Field(default=None, gt=0)
    """How many rows are drawn by the weights; without it as many as repeat none."""
    eval_data: list[_rows.Source] = []
    """Names of declared data that is held out, never trained on."""
    eval_size: float = Field(default=0, ge=0)
    """Rows of `data` held out: a share below 1, or a number of rows."""
    lora: dict[str, Any] | None = None
    """PEFT's LoraConfig; without it the whole model is trained."""
    trainer: dict[str, Any] = {}
    """TRL's own settings."""
    early_stopping: int | None = Field(default=None, gt=0)
    """Stop after so many evaluations in a row that are no better than the best one."""
    template: str | None = None
    """The chat template's text; without it the model keeps its own."""
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _drawn_by_weights(self) -> "TrainingConfig":
        if self.rows is not None and not self.weights:
            raise ValueError("`rows` are drawn by weights; write `data: {books: 1, general: 5}`")
        return self

    @field_validator("eval_size")
    @classmethod
    def _share_or_rows(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"`eval_size` {value} is neither a share below 1 nor a whole number of rows")
        return value


def check(config: TrainingConfig, facts: _model.Facts, formats: Sequence[str], *, chat: bool) -> list[_model.Problem]:
    """What can be known to fail before anything is loaded."""
    problems: list[_model.Problem] = []
    for key, sources in (("data", config.data), ("eval_data", config.eval_data)):
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
    problems += _check_best(config, (*MEASURED, *MEASURED_OF_PAIRS) if "preference" in formats else MEASURED)
    problems += _check_values(config)
    if config.lora is not None:
        problems += _check_targets(config.lora, facts) + _check_foldable(config.lora, facts)
    if chat or config.template:
        problems += check_template(config.template, facts)
    return problems


def _check_best(config: TrainingConfig, measured: Sequence[str]) -> list[_model.Problem]:
    """The best model is chosen among checkpoints, by a figure that is measured when they are written."""
    problems: list[_model.Problem] = []
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


def _check_save_steps(trainer: Mapping[str, Any]) -> list[_model.Problem]:
    """Every checkpoint that could be the best must have been evaluated: transformers' own rule."""
    step = trainer.get("eval_steps") or trainer.get("logging_steps") or LOGGING_STEPS
    save = {**saving(trainer), **trainer}["save_steps"]
    if (step < 1) == (save < 1) and round(save * 1_000_000) % round(step * 1_000_000) == 0:
        return []
    text = f"{save} is no multiple of `eval_steps`, {step}, as `load_best_model_at_end` needs; write {step}"
    return [("trainer.save_steps", f"{text}, or leave it out")]


def saving(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """When to save unless the user says it: at each tenth, or where the best is wanted whenever it evaluates."""
    usual = {"save_strategy": "steps", "save_steps": SAVE_STEPS}
    if not trainer.get("load_best_model_at_end"):
        return usual
    if trainer.get("eval_strategy") == "epoch":
        return {**usual, "save_strategy": "epoch"}
    evaluates = trainer.get("eval_steps") or trainer.get("logging_steps") or LOGGING_STEPS
    return {**usual, "save_steps": evaluates if evaluates >= 1 else SAVE_STEPS}


def _check_values(config: TrainingConfig) -> list[_model.Problem]:
    problems: list[_model.Problem] = []
    for part, names in POSITIVE.items():
        values = getattr(config, part) or {}
        for name in names:
            if isinstance(values.get(name), int | float) and values[name] <= 0:
                problems.append((f"{part}.{name}", f"`{name}` is {values[name]}; it must be above 0"))
    dropout = (config.lora or {}).get("lora_dropout", 0)
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        problems.append(("lora.lora_dropout", f"`lora_dropout` is {dropout}; it is a share: at least 0 and below 1"))
    for name, packages in NEEDS.items():
        value = config.trainer.get(name)
        for word in value if isinstance(value, list) else [value]:
            package = packages.get(str(word))
            if package is not None and importlib.util.find_spec(package) is None:
                problems.append((f"trainer.{name}", f"`{word}` needs a package; `pip install {package}`, or remove it"))
    return problems


def _check_targets(lora: Mapping[str, Any], facts: _model.Facts) -> list[_model.Problem]:
    targets, modules = lora.get("target_modules", "all-linear"), facts.linear_modules()
    if broken := _no_patterns(lora):
        return broken
    if not modules or targets in ("all-linear", None):
        return []
    kinds = sorted({name.rsplit(".", 1)[-1] for name in modules} - {"lm_head"})
    there = "it has " + ", ".join(f"`{kind}`" for kind in kinds)
    if targets == "all":
        return [("lora.target_modules", "`all` is no pattern of PEFT; write `all-linear`, or leave it out")]
    if isinstance(targets, str):
        if any(_is_named(name, targets) for name in modules):
            return []
        return [("lora.target_modules", f"`{targets}` matches no linear layer of {facts.source}; {there}")]
    return [
        ("lora.target_modules", f"`{target}` matches no linear layer of {facts.source}; {there}")
        for target in targets
        if not any(_is_named(name, [target]) for name in modules)
    ]


def _no_patterns(lora: Mapping[str, Any]) -> list[_model.Problem]:
    """Text that PEFT would read as a regular expression, and that is none."""
    texts = [(name, lora[name]) for name in ("target_modules", "exclude_modules") if isinstance(lora.get(name), str)]
    texts += [(name, text) for name in ("rank_pattern", "alpha_pattern") for text in lora.get(name) or {}]
    problems: list[_model.Problem] = []
    for name, text in texts:
        try:
            re.compile(str(text))
        except re.error as error:
            way = "text is read as one, so mend it or give a list of names" if "modules" in name else "mend it"
            problems.append((f"lora.{name}", f"`{text}` is no regular expression ({error}); {way}"))
    return problems


def _is_named(module: str, targets: str | Sequence[str]) -> bool:
    """PEFT's own rule: a string is a pattern for the whole name, a list holds names or their ends."""
    if isinstance(targets, str):
        with contextlib.suppress(re.error):  # `_check_targets` tells of it
            return re.fullmatch(targets, module) is not None
        return False
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _check_foldable(lora: Mapping[str, Any], facts: _model.Facts) -> list[_model.Problem]:
    advice = "later stages could not fold the adapter into its base; remove it"
    problems = [(f"lora.{name}", f"with `{name}` {advice}") for name in UNFOLDABLE if lora.get(name)]
    start = str(lora.get("init_lora_weights"))
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        problems.append(("lora.init_lora_weights", f"`{start}` also changes the base, so {advice}"))
    tied = facts.weights and "lm_head.weight" not in facts.weights
    for name in lora.get("modules_to_save") or [] if tied else []:
        if name in ("lm_head", "embed_tokens", "word_embeddings", "wte"):
            clause = f"input and output embeddings of {facts.source} are one weight, and `{name}` would train a copy"
            problems.append(("lora.modules_to_save", f"{clause}; {advice}"))
    return problems


def check_template(template: str | None, facts: _model.Facts) -> list[_model.Problem]:
    """Problems of the chat template that a stage will use with this model's tokenizer."""
    text = template or facts.template
    if text is None and not facts.known:
        return []
    if text is None:
        names = ", ".join(f"`{name}`" for name in _template.names())
        return [
            (
                "",
                f"{facts.source} brings no chat template; set `template:` at the top to one of {names}, or a file",
            )
        ]
    if facts.known and not facts.tokenizer.get("eos_token"):
        return [("model", f"the tokenizer of {facts.source} has no eos_token; set it in its tokenizer_config.json")]
    lost = [token for token in _template.tokens(text) if not facts.has_token(token)]
    if not lost:
        trouble = _template.trial(text, facts.tokenizer, facts.has_token) if facts.known else None
        return [] if trouble is None else [("template", trouble)]
    shown = ", ".join(f"`{token}`" for token in lost)
    return [
        (
            "template",
            f"the template writes {shown}, which the tokenizer of {facts.source} does not know as one token; "
            "`med`, `alpaca_zh` and `plain` end a turn with the model's own eos_token",
        )
    ]


def held_out(eval_size: float, rows: int) -> int:
    """How many of so many rows are held out."""
    return math.ceil(eval_size * rows) if eval_size < 1 else int(eval_size)


def too_many_held_out(eval_size: float, rows: int) -> str | None:
    """What is wrong with holding out so much of so many rows."""
    count = held_out(eval_size, rows)
    return None if count < rows else f"`eval_size` holds out {count} of {rows} rows; nothing is left to train on"


def tokenizer(config: TrainingConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer of the stage's model with the run's template."""
    loaded = _model.load_tokenizer(config.model)
    _template.install(loaded, config.template)
    return loaded


def start(config: TrainingConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """The model that the stage starts from.

    Weights are float32 for full fine-tuning and on the CPU, else bfloat16; `model_init_kwargs` says otherwise.
    """
    settings = dict(config.trainer.get("model_init_kwargs") or {})
    settings.setdefault("dtype", "bfloat16" if config.lora is not None and has_bf16() else "float32")
    model = _model.load(config.model, **settings)
    _model.set_stop_tokens(model, tokenizer)
    return model


def needs(config: TrainingConfig, facts: _model.Facts, copies: int = 1) -> _model.Needs:
    """Memory: `copies` of the whole model, and gradients and Adam's two moments of what is trained. Disk: the
    checkpoints that lie there while one more is written, and the result.

    Not in it: activations and logits (often the most), what autocast and libraries hold, files besides the weights,
    moments of another optimizer than 32-bit AdamW. A run whose steps are not known is taken to reach every share of
    them that `save_steps` asks for.
    """
    if not facts.weights:
        return _model.Needs(0, 0)
    whole = facts.parameters * _width(config, facts)
    trained = whole if config.lora is None else 4 * _adapter_parameters(config.lora, facts)
    optimizer = str(config.trainer.get("optim", "adamw_torch"))
    moments = 2 * trained if optimizer.startswith("adamw") and "bit" not in optimizer else 0
    adapter_weights = 0 if config.lora is None else trained
    memory = copies * whole + adapter_weights + trained + moments
    return _model.Needs(memory, disk=_checkpoints(config.trainer) * (trained + moments) + trained)


def facts_after(config: TrainingConfig, facts: _model.Facts) -> _model.Facts:
    """What later stages can know of the result: the whole model has the width that it was trained in."""
    if config.lora is not None:
        return facts
    return replace(facts, stored=facts.parameters * _width(config, facts))


def _width(config: TrainingConfig, facts: _model.Facts) -> int:
    """Bytes of a weight in memory, as `start` loads it; a GPU is taken to compute in bfloat16."""
    dtype = (config.trainer.get("model_init_kwargs") or {}).get("dtype")
    if dtype == "auto":
        return max(1, facts.stored // facts.parameters)
    if dtype is None:
        return 2 if config.lora is not None and shutil.which("nvidia-smi") else 4
    return {"float32": 4, "float64": 8}.get(str(dtype), 2)


def _adapter_parameters(lora: Mapping[str, Any], facts: _model.Facts) -> int:
    """The weights A (r × in) and B (out × r) of each layer that LoRA targets, and whole copies of `modules_to_save`."""
    saved = [rf"(.*\.)?{re.escape(name)}(\..*)?" for name in lora.get("modules_to_save") or []]
    copied = {
        name: math.prod(shape)
        for name, shape in facts.weights.items()
        if any(re.fullmatch(pattern, name.rpartition(".")[0]) for pattern in saved)
    }
    ranks: Mapping[str, int] = lora.get("rank_pattern") or {}
    count = sum(copied.values())
    for module in facts.linear_modules():
        if f"{module}.weight" not in copied and _is_targeted(module, lora):
            own = (rank for pattern, rank in ranks.items() if _is_named(module, rf"(.*\.)?({pattern})"))
            count += next(own, lora.get("r", 8)) * sum(facts.weights[f"{module}.weight"])
    return count


def _is_targeted(module: str, lora: Mapping[str, Any]) -> bool:
    targets, layers = lora.get("target_modules", "all-linear"), lora.get("layers_to_transform")
    if targets is None or _is_named(module, lora.get("exclude_modules") or []):
        return False
    if targets == "all-linear":
        return not module.endswith("lm_head")
    if layers is not None and not isinstance(targets, str):
        index = re.match(r".*\.[^.]*\.(\d+)\.", module)
        if index is None or int(index[1]) not in (layers if isinstance(layers, list) else [layers]):
            return False
    return _is_named(module, targets)


def _checkpoints(trainer: Mapping[str, Any]) -> int:
    """How many lie on the disk at one time: those that are kept, and the one that is being written."""
    settings = {**saving(trainer), **trainer}
    strategy, step = settings["save_strategy"], settings["save_steps"]
    steps = int(trainer.get("max_steps") or 0)
    if strategy in ("no", "best"):
        return 0
    last = 1
    if strategy == "epoch" and steps <= 0:
        last = math.ceil(trainer.get("num_train_epochs", 3))
    elif strategy == "steps" and step and steps > 0:
        last = math.ceil(steps / (step if step >= 1 else math.ceil(step * steps)))
    elif strategy == "steps" and 0 < step < 1:
        last = math.ceil(1 / step)
    return min(last, int(trainer.get("save_total_limit") or 2) + 1)


def inexact(config: TrainingConfig) -> str | None:
    """Why a run that is stopped and goes on may end otherwise than one that never stops; None: it ends bit for bit
    the same.

    tests/test_train_resume.py shows both on a CPU. Nothing is promised for another device or another number of
    processes than the run began on.
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


def has_bf16() -> bool:
    """Is there a GPU that computes in bfloat16 itself (Ampere and newer)?"""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))


def arguments(kind: str, config: TrainingConfig, out: Path, **defaults: Any) -> "TrainingArguments":
    """The TRL config `kind` with the user's settings over `defaults` over ours.

    Raises:
        StageError: the library itself refuses the settings.
    """
    import torch
    import trl

    gpu = torch.cuda.is_available()
    ours = {
        "output_dir": str(out / "checkpoints"),
        "seed": config.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # transformers would log a NaN loss as 0
        "use_cpu": not gpu,
        "bf16": has_bf16() and not config.trainer.get("fp16"),
        **saving(config.trainer),
        "dataloader_pin_memory": gpu,
    }
    theirs = {
        key: value for key, value in config.trainer.items() if key not in ("model_init_kwargs", "save_total_limit")
    }
    try:
        return getattr(trl, kind)(**{**ours, **defaults, **theirs})
    except (ValueError, TypeError, ImportError) as error:
        raise StageError(f"{kind} refuses these settings: {error}") from None


def build(trainer: Any, **parts: Any) -> Any:
    """A TRL trainer of its parts.

    Raises:
        StageError: it refuses the settings, which it checks only now.
    """
    try:
        built = trainer(**parts)
    except (ValueError, NotImplementedError) as error:
        raise StageError(f"TRL refuses these settings: {error}") from None
    if parts.get("peft_config") is not None:
        for parameter in built.model.parameters():
            if parameter.requires_grad:  # PEFT leaves `modules_to_save` in the base's bfloat16, where steps get lost
                parameter.data = parameter.data.float()
    return built


def adapter(config: TrainingConfig) -> Any:
    """PEFT's LoraConfig, or None when the whole model is trained."""
    if config.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **config.lora})


def train(trainer: "Trainer", config: TrainingConfig, out: Path) -> dict[str, Any]:
    """Run a prepared trainer from where it was, leave the artifact in `out`, and hand back its metrics.

    Raises:
        Interrupted: SIGTERM came; a checkpoint was written at the next step.
        StageError: the loss or a weight is not finite.
    """
    from transformers import set_seed

    checkpoints = Path(trainer.args.output_dir)
    checkpoint, notes = _checkpoint.newest_whole(checkpoints, with_best=trainer.args.load_best_model_at_end)
    for note in notes:
        emit(out, "note", text=note)
    progress = _Progress(trainer, out, int(config.trainer.get("save_total_limit") or 2), config.early_stopping)
    trainer.add_callback(progress.callback())
    before = _evaluate_before(trainer, out, resumed=checkpoint is not None)
    if checkpoint is None:
        set_seed(trainer.args.seed)  # the held-out pass above drew random numbers
    else:
        trainer.args.eval_on_start = False
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    early = progress.no_better()  # the evaluation below would count as one more
    if progress.stopped and not early:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
    after = trainer.evaluate() if trainer.eval_dataset is not None else {}
    _save(trainer, config, out)
    stopped = {"stopped_early": early} if config.early_stopping is not None else {}
    return {**_metrics(trainer, before, after), **stopped}


def _evaluate_before(trainer: "Trainer", out: Path, *, resumed: bool) -> dict[str, float]:
    """The held-out figures of the model that the stage started from; a resumed run reads what it measured then."""
    if trainer.eval_dataset is None:
        return {}
    file = out / "before.json"
    if resumed:
        with contextlib.suppress(OSError, ValueError):  # torn by a power cut: the model is still the starting one
            return dict(json.loads(file.read_text(encoding="utf-8")))
    emit(out, "note", text="measures the held-out rows before training")
    figures = trainer.evaluate()
    if main_process():
        file.write_text(json.dumps(figures), encoding="utf-8")
    return dict(figures)


class _Progress:
    """Reports steps, seals checkpoints, stops on SIGTERM, early, and on a loss that is not finite."""

    def __init__(self, trainer: Any, out: Path, keep: int, patience: int | None) -> None:
        from transformers import EarlyStoppingCallback

        self.out, self.keep = out, keep
        self.checkpoints = Path(trainer.args.output_dir)
        self.rest = _resume.Rest(trainer)
        self.asked = self.stopped = self.to_save = False
        self.shown = 0.0
        self.early = EarlyStoppingCallback(patience) if patience is not None else None
        if self.early is not None:
            trainer.add_callback(self.early)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))

    def callback(self) -> "TrainerCallback":
        from transformers import TrainerCallback

        progress = self

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                emit(progress.out, "total", steps=state.max_steps, step=state.global_step, **_batch(args))
                progress.rest.load(progress.newest(state))
                progress.recall(state)
                if state.best_model_checkpoint is not None:  # the folder may have moved since
                    best = progress.checkpoints / Path(state.best_model_checkpoint).name
                    state.best_model_checkpoint = str(best)

            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress.rest.begin_epoch(int(state.epoch), kwargs["train_dataloader"])

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
        """Count on from the checkpoint; transformers' own way would also bring back what the loop was about to do."""
        if self.early is not None:
            known = state.stateful_callbacks.get(type(self.early).__name__, {}).get("attributes", {})
            self.early.early_stopping_patience_counter = known.get("early_stopping_patience_counter", 0)

    def no_better(self) -> bool:
        """Has it stopped early? That goes before a stop by the user: there is nothing to go on with."""
        early = self.early
        return early is not None and early.early_stopping_patience_counter >= early.early_stopping_patience

    def step(self, args: Any, state: Any, control: Any) -> None:
        from transformers.trainer_utils import SaveStrategy

        if time.monotonic() - self.shown > 0.25:
            self.shown = time.monotonic()
            emit(self.out, "step", step=state.global_step)
        if _any_process(self.asked, args.world_size) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            args.save_strategy = SaveStrategy.STEPS  # `best` would not save a step that is no better
        if _is_whole(state.epoch):  # what belongs to the epoch's end must be in the checkpoint
            self.to_save, control.should_save = control.should_save, False

    def epoch_end(self, state: Any, control: Any) -> None:
        """Also called when a stop cuts an epoch short, which is no reason to log, evaluate or save once more."""
        if _is_whole(state.epoch):
            control.should_save |= self.to_save
            self.to_save = False
        elif self.stopped and not self.no_better():
            control.should_log = control.should_evaluate = control.should_save = False

    def newest(self, state: Any) -> Path:
        return self.checkpoints / f"checkpoint-{state.global_step}"

    def log(self, state: Any, logs: Mapping[str, float]) -> None:
        figures = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        emit(self.out, "log", step=state.global_step, **figures)
        for key in ("loss", "grad_norm", "eval_loss"):
            scaled = key == "grad_norm" and self.rest.trainer.args.fp16  # whose scaler skips steps until it fits
            if key in figures and not math.isfinite(figures[key]) and not scaled:
                raise StageError(
                    f"`{key}` is {figures[key]} at step {state.global_step}; nothing of it is kept as a result. "
                    "Lower `trainer.learning_rate`, set `trainer.max_grad_norm`, or train in bf16 instead of fp16; "
                    "then run again"
                )

    def save(self, state: Any, model: Any) -> None:
        """Seal the newest checkpoint. The last one is not: going on from it would do a step too many."""
        newest = self.newest(state)
        self.rest.save(newest)
        _wait_for_all()  # every process writes its random state and its sums
        try:
            check_finite(model, state.global_step)
        except StageError:
            shutil.rmtree(newest, ignore_errors=True)
            raise
        last = state.global_step >= state.max_steps or self.no_better()
        if main_process() and newest.is_dir() and not last:
            _checkpoint.seal(newest)
            _checkpoint.rotate(self.checkpoints, self.keep, state.best_model_checkpoint)
        _wait_for_all()


def _is_whole(epoch: float) -> bool:
    return epoch == int(epoch)


def _wait_for_all() -> None:
    """A barrier when several processes train."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def check_finite(model: Any, step: int) -> None:
    """
    Raises:
        StageError: a trained weight is NaN or infinite; it must become neither a checkpoint nor a result.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise StageError(
                f"the weight `{name}` is not finite after step {step}; lower `trainer.learning_rate` and run again"
            )


def _batch(args: Any) -> dict[str, int]:
    return {
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "processes": args.world_size,
    }


def _any_process(asked: bool, processes: int) -> bool:
    """True when any process was asked to stop: all must leave at the same step."""
    if processes == 1:
        return asked
    import torch

    flag = torch.tensor([int(asked)], device="cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _save(trainer: "Trainer", config: TrainingConfig, out: Path) -> None:
    """Write adapter or model, tokenizer with template, and generation config; drop what only training needed."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_finite(model, trainer.state.global_step)
    if not main_process():
        return
    whole = model.get_base_model() if config.lora is not None else model
    if config.lora is not None:
        alone = len(config.model) == 1
        # An adapter on adapters must not be loaded onto the bare base: that would be another model, silently.
        base = str(Path(config.model[0]).resolve()) if alone else "a chain of adapters, see `model` in record.json"
        model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(out, **({"save_embedding_layers": False} if config.lora is not None else {}))
    if config.lora is not None:
        whole.generation_config.save_pretrained(out)
    trainer.processing_class.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _metrics(trainer: "Trainer", before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics: dict[str, Any] = {"steps": trainer.state.global_step, **_batch(trainer.args)}
    if logs:
        metrics |= {"loss_first": logs[0], "loss_last": logs[-1]}
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        metrics["best_step"] = trainer.state.best_global_step
    kept = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_mean_token_accuracy")
    for key in kept:
        if key in before and key in after:
            metrics |= {f"{key}_before": before[key], key: after[key]}
    return metrics


def best(metrics: Mapping[str, Any]) -> str:
    """Which step was kept, where that is not simply the last, as a clause."""
    if "best_step" not in metrics:
        return ""
    stopped = f", stopped early at step {metrics['steps']}" if metrics.get("stopped_early") else ""
    return f"{stopped}, best at step {metrics['best_step']}"


def figure(metrics: Mapping[str, Any]) -> str:
    """The stage's key figure for people."""
    if "eval_loss" in metrics:
        return f"held-out loss {metrics['eval_loss_before']:.3f} → {metrics['eval_loss']:.3f}{best(metrics)}"
    if "loss_last" in metrics:
        return f"loss {metrics['loss_first']:.3f} → {metrics['loss_last']:.3f}"
    return f"{metrics['steps']} steps"
