"""Evaluation: earlier models and held-out data in, one table of figures out. The models pass through unchanged.

Every model is loaded once. The format of the data decides what is measured: perplexity of texts and conversations,
accuracy and margins of preference pairs; also answers to prompts (BLEU, ROUGE, stop rate, repetition), and tasks of
lm-evaluation-harness. Every figure has a confidence interval or says why it has no value, and models are compared in
pairs on the same rows. Formulas and sources are in docs/evaluate.md.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages import Metrics, Report, Stage
from stages.data.row import Row
from stages.data.source import CONVERSATIONS, Reading, Source
from stages.data.spool import Spooled
from stages.measuring.gates import Gate, Verdict, gate_problems, judge_gate
from stages.measuring.losses import Margins, Subject, answer_match, perplexity, preference
from stages.measuring.metrics import Figures, Measured, figure_of, metric_names
from stages.measuring.prompts import Prompt, ask
from stages.measuring.table import ANSWERS, SCHEMA, TABLE, figures_and_comparisons, read_table, values_only
from stages.measuring.tasks import check_tasks, measure_tasks, task_files, task_metrics
from stages.model.device import free_memory
from stages.model.facts import Facts, Needs, check_template
from stages.model.folder import refuse_missing
from stages.model.generation import load_engine
from stages.model.inputs import Inputs
from stages.model.references import Compared
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit

SMALL = 10**7  # parameters; with fewer, the CPU's threads wait for each other longer than they compute
PROMPTS = "prompts"  # the name, among the data sets, of prompts that are written into the config


class Generation(BaseModel):
    """How answers are generated; names and meanings are those of transformers' GenerationConfig."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(default=128, gt=0)
    do_sample: bool = False
    """False: the likeliest token each time (greedy)."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=50, ge=0)
    repetition_penalty: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _used(self) -> "Generation":
        for name in ("temperature", "top_p", "top_k"):
            if not self.do_sample and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` is not used without `do_sample: true`; add that, or remove it")
        return self


class Harness(BaseModel):
    """How lm-evaluation-harness runs its tasks; names and meanings are its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include_path: str | None = None
    """A folder with tasks of your own, their data beside them."""
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, gt=0)
    """Only this many documents of each task, the first ones."""
    apply_chat_template: bool = False
    batch_size: int = Field(default=8, gt=0)


class Config(BaseModel):
    """Settings of `evaluate`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compare: Compared
    """Stages above that leave a model, or `base`, the model at the top. Default: all of them."""
    data: dict[str, Source] = {}
    """Names of held-out data; the format of each decides what is measured."""
    prompts: dict[str, Source] | list[str] = []
    """The name of conversations, whose last answers are the references; or a list of questions."""
    max_prompts: int | None = Field(default=None, gt=0)
    """Only this many prompts, the first ones."""
    tasks: list[str] = []
    """Tasks or groups of lm-evaluation-harness."""
    generation: Generation = Generation()
    harness: Harness = Harness()
    gates: list[Gate] = []
    max_length: int = Field(default=1024, gt=1)
    """Tokens of a row. Longer texts are cut into pieces that all count; conversations and pairs keep their start."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Tokens in memory at once, padding included."""
    template: str | None = None
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _measures_something(self) -> "Config":
        if not (self.data or self.prompts or self.tasks):
            raise ValueError("there is nothing to measure; name held-out `data`, `prompts`, or `tasks`")
        return self


# What is known before the run


def check(config: Config) -> list[Problem]:
    """What the settings alone show."""
    problems = check_tasks(config.tasks, config.harness)
    for name, source in config.data.items():
        if source.format == "labelled":
            problems.append(("data", f"`{name}` has format `labelled`, which nothing is measured on yet; remove it"))
    for name, source in config.prompts.items() if isinstance(config.prompts, dict) else ():
        if source.format not in CONVERSATIONS:
            wanted = ", ".join(f"`{form}`" for form in CONVERSATIONS)
            problems.append(("prompts", f"`{name}` has format `{source.format}`; prompts are of {wanted}"))
    return problems + gate_problems(config.gates, list(config.compare), measured(config))


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """What is wrong with one of the models that are compared."""
    template = config.template or facts.template
    return check_template(template, facts) if template is not None and _talks(config) else []


def _talks(config: Config) -> bool:
    return bool(config.prompts) or any(source.format != "text" for source in config.data.values())


def measured(config: Config) -> dict[str, tuple[str, ...]]:
    """Data set, `prompts` or task → its metrics; empty for a task whose metrics are not known before the run."""
    found: dict[str, tuple[str, ...]] = {}
    for name, source in config.data.items():
        found[name] = _of_format(source.format)
    if isinstance(config.prompts, dict):
        for name in config.prompts:
            found[name] = (*found.get(name, ()), *metric_names("reference", "answer"))
    elif config.prompts:
        found[PROMPTS] = metric_names("answer")
    return found | {task: task_metrics(task, config.harness.include_path) for task in config.tasks}


def _of_format(form: str) -> tuple[str, ...]:
    """The metrics of a data set by its format."""
    if form == "preference":
        return metric_names("preference")
    return metric_names("loss") if form == "text" else metric_names("loss", "match")


def needs(config: Config, facts: Facts) -> Needs:
    """Memory: the weights of one model as they are stored."""
    return Needs(facts.stored, disk=0)


def read_files(config: Config) -> list[Path]:
    """Files that it reads besides models and data."""
    return task_files(config.harness.include_path)


def headline(metrics: Mapping[str, Any]) -> str:
    """The first figure that could be computed, of the first and the last model."""
    models = metrics["models"]
    for metric, by_data in metrics["figures"].items():
        for data, values in by_data.items():
            first, last = values[models[0]], values[models[-1]]
            if last is not None:
                before = f"{models[0]} {first:.4g}, " if first is not None and models[1:] else ""
                return f"{metric} on {data}: {before}{models[-1]} {last:.4g}"
    return "nothing could be computed"


def verdicts(config: Config, folder: Path) -> list[Verdict]:
    """The verdicts of the gates on a finished evaluation."""
    return [judge_gate(gate, read_table(folder)) for gate in config.gates] if config.gates else []


# The run


class _Progress:
    """Reports to the runner how much of an evaluation is done."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps, self.done = out, steps, 0
        emit(out, "total", steps=steps, step=0)

    def step(self, text: str) -> None:
        """Report one more step as done; `text` says what it measured."""
        self.done += 1
        emit(self.out, "step", step=self.done, steps=self.steps)
        emit(self.out, "note", text=text)


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Measure every model, compare them, and leave `evaluation.json` and `answers.jsonl` in `out`."""
    with ExitStack() as stack:
        data: dict[str, Sequence[Row]] = {}
        for name, source in config.data.items():
            rows = (row for _, row in Reading(inputs.read(source)).kept())
            data[name] = stack.enter_context(Spooled(rows, out))
        return _evaluate(config, inputs, data, out)


def _evaluate(config: Config, inputs: Inputs, data: Mapping[str, Sequence[Row]], out: Path) -> Metrics:
    """As `run`, of rows that were read."""
    import torch

    prompts = _prompts(config, inputs)
    progress = _Progress(out, len(inputs.compared) * (len(data) + bool(prompts) + bool(config.tasks)))
    found: dict[str, Figures] = {}
    margins: dict[str, Margins] = {}
    threads = torch.get_num_threads()
    try:
        for name, folders in inputs.compared.items():
            subject = _loaded(name, folders, config, threads, out)
            found[name] = _measure(config, subject, data, prompts, margins, progress)
            del subject
            free_memory()
    finally:
        torch.set_num_threads(threads)
    table = _table(config, found, data, prompts)
    (out / TABLE).write_text(json.dumps(table, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    with open(out / ANSWERS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(prompt.as_json(), ensure_ascii=False) + "\n" for prompt in prompts)
    return {**{key: table[key] for key in ("models", "rows", "prompts", "settings")}, "figures": values_only(table)}


def _prompts(config: Config, inputs: Inputs) -> list[Prompt]:
    """The prompts, each with the reference answer of its row if there is one."""
    found: list[Prompt] = []
    if not isinstance(config.prompts, dict):
        for number, text in enumerate(config.prompts, 1):
            found.append(Prompt(PROMPTS, number, [{"role": "user", "content": text}]))
        return found[: config.max_prompts]
    for name, source in config.prompts.items():
        for number, (_, row) in enumerate(Reading(inputs.read(source)).kept(), 1):
            if len(found) == config.max_prompts:
                return found
            *before, last = row["messages"]
            answered = last["role"] == "assistant"
            reference = last["content"].strip() if answered and not last.get("tool_calls") else None
            found.append(Prompt(name, number, before if answered else row["messages"], row.get("tools"), reference))
    return found[: config.max_prompts]


def _loaded(name: str, folders: Sequence[str], config: Config, threads: int, scratch: Path) -> Subject:
    """A model as it is served, with the template of the run.

    Raises:
        StageError: the folder lacks weights of the model.
    """
    import torch

    engine = load_engine(folders, config.template)
    refuse_missing(folders[0], engine.missing)
    small = sum(weight.numel() for weight in engine.model.parameters()) < SMALL
    torch.set_num_threads(1 if small else threads)
    return Subject(name, engine, config.max_length, config.batch_tokens, config.seed, scratch)


def _measure(
    config: Config,
    subject: Subject,
    data: Mapping[str, Sequence[Row]],
    prompts: Sequence[Prompt],
    margins: dict[str, Margins],
    progress: _Progress,
) -> Figures:
    """Every figure of one model; the first model leaves its margins of preference pairs in `margins`."""
    found: Figures = {}
    for name, rows in data.items():
        metrics = _of_format(config.data[name].format)
        try:
            values = _values(config.data[name], subject, rows, margins, name)
        except StageError as error:
            values = dict.fromkeys(metrics, Measured(why=str(error)))
        found |= {(metric, name): values[metric] for metric in metrics}
        shown = figure_of(metrics[0], values[metrics[0]], config.seed)
        value = str(shown["why"]) if shown["value"] is None else f"{shown['value']:.4g}"
        progress.step(f"{subject.name}: {metrics[0]} on {name} {value}")
    if prompts:
        found |= ask(subject, prompts, config.generation.model_dump())
        progress.step(f"{subject.name}: answered {len(prompts)} prompt{'s' if prompts[1:] else ''}")
    if config.tasks:
        found |= _task_figures(config, subject)
        progress.step(f"{subject.name}: tasks {', '.join(config.tasks)}")
    return found


def _values(
    source: Source, subject: Subject, rows: Sequence[Row], margins: dict[str, Margins], name: str
) -> dict[str, Measured]:
    """Metric → its values on one data set; `margins` is as for `_measure`."""
    if source.format == "preference":
        values, own = preference(subject, rows, margins.get(name))
        margins.setdefault(name, own)
        return values
    values = perplexity(subject, rows)
    return values | answer_match(subject, rows) if source.format in CONVERSATIONS else values


def _task_figures(config: Config, subject: Subject) -> Figures:
    """The figures of the tasks; if the harness cannot run them, each says why, and the other figures stay."""
    engine = subject.engine
    try:
        return measure_tasks(engine.model, engine.tokenizer, config.tasks, config.harness, config.seed)
    except StageError as error:
        names = {task: task_metrics(task, config.harness.include_path) or ("acc",) for task in config.tasks}
        why = Measured(why=str(error))
        return {(metric, task): why for task, metrics in names.items() for metric in metrics}


def _table(
    config: Config, found: Mapping[str, Figures], data: Mapping[str, Sequence[Row]], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """The content of evaluation.json, as documented in docs/evaluate.md."""
    settings = config.model_dump(mode="json", exclude={"compare", "data", "prompts", "gates", "template"})
    asked = dict(Counter(prompt.data for prompt in prompts))
    counts = {"rows": {name: len(rows) for name, rows in data.items()}, "prompts": asked}
    return {"schema": SCHEMA, "models": list(found), **counts, "settings": settings} | figures_and_comparisons(
        found, config.seed
    )


STAGE = Stage(
    version=3,
    config=Config,
    run=run,
    headline=headline,
    leaves=Report(verdicts=verdicts),
    check=check,
    check_model=check_model,
    needs=needs,
    more_memory=lambda config: f"halve `batch_tokens`, which is {config.batch_tokens}",
    reads_files=read_files,
    libraries=("numpy", "gptqmodel", "jieba", "rouge-chinese", "nltk", "lm_eval"),
    judges_only=("gates",),
)
