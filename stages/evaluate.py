"""Evaluation: earlier models and held-out data in, one table of figures out. The models pass through unchanged.

Every model is loaded once. What is measured follows from the data: perplexity of texts and conversations, accuracy
and margins of preference pairs, answers to prompts (BLEU, ROUGE, stop rate, repetition), tasks of
lm-evaluation-harness. Every figure has a confidence interval or says why it has no value, and models are compared
pair by pair on the same rows. Formulas and sources are in docs/evaluate.md.
"""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.chat import encoding
from stages.chat.labels import IGNORED, encode_chat
from stages.chat.rendering import render
from stages.chat.template import install_template
from stages.data.row import Row
from stages.data.source import Source, rows_of
from stages.measuring import gates as gates_module
from stages.measuring import tasks as tasks_module
from stages.measuring.metrics import (
    ANSWER_METRICS,
    CHAT_METRICS,
    LEVEL,
    LOSS_METRICS,
    MATCH_METRICS,
    PREFERENCE_METRICS,
    REFERENCE_METRICS,
    RESAMPLES,
    Measured,
    compare_models,
    figure_of,
    lower_is_better,
    score_answer,
)
from stages.model import generation as generation_module
from stages.model import inference
from stages.model.facts import Facts, Needs, Problem, check_template
from stages.model.folder import load_tokenizer, set_stop_tokens
from stages.runtime.errors import StageError
from stages.runtime.events import emit

VERSION = 2
LEAVES_MODEL = False  # the stage below starts from the model above
NO_RECIPE = ("gates",)  # settings that judge the result and do not change it
SCHEMA = 1  # of evaluation.json
TABLE = "evaluation.json"
ANSWERS = "answers.jsonl"
TALKS = ("alpaca", "prompt_completion", "messages", "sharegpt")
SMALL = 10**7  # parameters below which the CPU's threads wait for each other longer than they compute
PROMPTS = "prompts"  # what prompts that are written into the config are called among the data

Ids = list[int]
Texts = list[tuple[Ids, Ids]]
Figures = dict[tuple[str, str], Measured]  # by metric and data


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
    """Only the first so many documents of each task."""
    apply_chat_template: bool = False
    batch_size: int = Field(default=8, gt=0)


class Config(BaseModel):
    """Settings of `evaluate`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compare: list[str] | dict[str, list[str]]
    """Stages above that leave a model, or `base`, the model at the top; all of them unless given."""
    data: dict[str, Source] = {}
    """Names of held-out data; what is measured follows from its format."""
    prompts: dict[str, Source] | list[str] = []
    """The name of conversations, whose last answers are the references; or a list of questions."""
    max_prompts: int | None = Field(default=None, gt=0)
    """Only the first so many of them."""
    tasks: list[str] = []
    """Tasks or groups of lm-evaluation-harness."""
    generation: Generation = Generation()
    harness: Harness = Harness()
    gates: list[gates_module.Gate] = []
    max_length: int = Field(default=1024, gt=1)
    """Tokens of a row. Texts are cut into pieces, none lost; conversations and pairs keep their start."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Tokens in memory at once, padding too."""
    template: str | None = None
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _measures_something(self) -> "Config":
        if not (self.data or self.prompts or self.tasks):
            raise ValueError("there is nothing to measure; name held-out `data`, `prompts`, or `tasks`")
        return self


# What is known beforehand


def check(config: Config, facts: Facts | None) -> list[Problem]:
    """What can be known to fail before anything is loaded; with facts, what is wrong with one of the models."""
    if facts is not None:
        template = config.template or facts.template
        return check_template(template, facts) if template is not None and _talks(config) else []
    problems = tasks_module.check(config.tasks, config.harness)
    for name, source in config.data.items():
        if source.format == "labelled":
            problems.append(("data", f"`{name}` has format `labelled`, which nothing is measured on yet; remove it"))
    for name, source in config.prompts.items() if isinstance(config.prompts, dict) else ():
        if source.format not in TALKS:
            wanted = ", ".join(f"`{one}`" for one in TALKS)
            problems.append(("prompts", f"`{name}` has format `{source.format}`; prompts are of {wanted}"))
    known = (*CHAT_METRICS, *PREFERENCE_METRICS, *ANSWER_METRICS)
    return problems + gates_module.problems(config.gates, list(config.compare), measured(config), known)


def _talks(config: Config) -> bool:
    return bool(config.prompts) or any(source.format != "text" for source in config.data.values())


def measured(config: Config) -> dict[str, tuple[str, ...]]:
    """Data set, `prompts` or task → its metrics; empty for a task whose metrics are not known beforehand."""
    found: dict[str, tuple[str, ...]] = {}
    for name, source in config.data.items():
        found[name] = _of_format(source.format)
    if isinstance(config.prompts, dict):
        for name in config.prompts:
            found[name] = (*found.get(name, ()), *ANSWER_METRICS)
    elif config.prompts:
        found[PROMPTS] = tuple(metric for metric in ANSWER_METRICS if metric not in REFERENCE_METRICS)
    return found | {task: tasks_module.metrics(task, config.harness.include_path) for task in config.tasks}


def _of_format(form: str) -> tuple[str, ...]:
    return {"preference": PREFERENCE_METRICS, "text": LOSS_METRICS}.get(form, CHAT_METRICS)


def needs(config: Config, facts: Facts) -> Needs:
    """Memory: the weights as they are stored, of one model at a time."""
    return Needs(facts.stored, disk=0)


def read_files(config: Config) -> list[Path]:
    """What it reads besides models and data."""
    return tasks_module.read_files(config.harness.include_path)


def figure(metrics: Mapping[str, Any]) -> str:
    """The stage's key figure for people: the first one, of the first and the last model."""
    models = metrics["models"]
    for metric, by_data in metrics["figures"].items():
        for data, values in by_data.items():
            first, last = values[models[0]], values[models[-1]]
            if last is not None:
                before = f"{models[0]} {first:.4g}, " if first is not None and models[1:] else ""
                return f"{metric} on {data}: {before}{models[-1]} {last:.4g}"
    return "nothing could be computed"


def verdicts(config: Config, folder: Path) -> list[gates_module.Verdict]:
    """What the gates say to a finished evaluation."""
    return [gates_module.judge(gate, table(folder)) for gate in config.gates] if config.gates else []


def table(folder: Path) -> dict[str, Any]:
    """The table of a finished evaluation."""
    return dict(json.loads((folder / TABLE).read_text(encoding="utf-8")))


# The run


@dataclass
class _Asked:
    """A prompt, and what each model answered."""

    data: str
    row: int
    messages: list[dict[str, Any]]
    tools: Any
    reference: str | None
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Model:
    """A model at work, and how to tell how far it is."""

    name: str
    model: Any
    tokenizer: Any
    config: Config
    tell: Callable[[str], None]

    @property
    def limit(self) -> int:
        return min(self.config.max_length, inference.positions(self.model))

    def losses(self, texts: Texts) -> list[float]:
        return inference.losses(self.model, texts, self.config.batch_tokens)


def run(config: Config, out: Path) -> dict[str, Any]:
    """Measure every model, compare them, and leave `evaluation.json` and `answers.jsonl` in `out`."""
    import torch

    models: Mapping[str, list[str]] = config.compare if isinstance(config.compare, dict) else {}
    data = {name: rows_of(source) for name, source in config.data.items()}
    asked = _asked(config)
    steps = len(models) * (len(data) + bool(asked) + bool(config.tasks))
    emit(out, "total", steps=steps, step=0)
    done = 0

    def tell(text: str) -> None:
        nonlocal done
        done += 1
        emit(out, "step", step=done, steps=steps)
        emit(out, "note", text=text)

    found: dict[str, Figures] = {}
    reference: dict[str, list[tuple[float, float]]] = {}
    threads = torch.get_num_threads()
    try:
        for name, folders in models.items():
            found[name] = _measure(_loaded(name, folders, config, tell, threads), data, asked, reference)
            gc.collect()  # the next model needs the room
            torch.cuda.empty_cache()
    except torch.OutOfMemoryError:
        raise StageError(f"out of memory; halve `batch_tokens`, which is {config.batch_tokens}") from None
    finally:
        torch.set_num_threads(threads)
    result = _result(config, found, data, asked)
    (out / TABLE).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    with open(out / ANSWERS, "w", encoding="utf-8") as file:
        for one in asked:
            prompt = [{key: value for key, value in said.items() if value} for said in one.messages]
            line = {"data": one.data, "row": one.row, "prompt": prompt, "reference": one.reference}
            file.write(json.dumps({**line, "answers": one.answers}, ensure_ascii=False) + "\n")
    return _main_figures(result)


def _asked(config: Config) -> list[_Asked]:
    """The prompts, with references where there are any."""
    if not isinstance(config.prompts, dict):
        said = [
            _Asked(PROMPTS, n, [{"role": "user", "content": text}], None, None) for n, text in _numbered(config.prompts)
        ]
        return said[: config.max_prompts]
    asked = []
    for name, source in config.prompts.items():
        for number, row in _numbered(rows_of(source)):
            *before, last = row["messages"]
            reference = last["content"].strip() if last["role"] == "assistant" and not last.get("tool_calls") else None
            before = before if last["role"] == "assistant" else row["messages"]
            asked.append(_Asked(name, number, before, row.get("tools"), reference))
    return asked[: config.max_prompts]


def _numbered(rows: Sequence[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(rows, 1))


def _loaded(name: str, folders: Sequence[str], config: Config, tell: Callable[[str], None], threads: int) -> _Model:
    """The model as it is served: in the dtype that it is stored in, with the run's template."""
    import torch

    model, missing = generation_module.load(folders)
    if missing:
        raise StageError(f"`{name}` lacks weights ({', '.join(missing[:3])}), so its figures would be random")
    small = sum(weight.numel() for weight in model.parameters()) < SMALL
    torch.set_num_threads(1 if small else threads)
    tokenizer = load_tokenizer(folders)
    install_template(tokenizer, config.template)
    set_stop_tokens(model, tokenizer)
    return _Model(name, model, tokenizer, config, tell)


def _measure(
    at: _Model,
    data: Mapping[str, Sequence[Row]],
    asked: Sequence[_Asked],
    reference: dict[str, list[tuple[float, float]]],
) -> Figures:
    """Every figure of one model; the first one leaves its log-probabilities of preference pairs in `reference`."""
    found: Figures = {}
    for name, rows in data.items():
        form = at.config.data[name].format
        metrics = _of_format(form)
        try:
            values = _pairs(at, name, rows, reference) if form == "preference" else _perplexity(at, rows)
            if form in TALKS:
                values |= _answer_match(at, rows)
        except StageError as error:
            values = dict.fromkeys(metrics, Measured(why=str(error)))
        found |= {(metric, name): values[metric] for metric in metrics}
        shown = figure_of(metrics[0], values[metrics[0]], at.config.seed)
        at.tell(f"{at.name}: {metrics[0]} on {name} {_short(shown)}")
    if asked:
        found |= _answers_or_why(at, asked)
        at.tell(f"{at.name}: answered {len(asked)} prompt{'s' if asked[1:] else ''}")
    if at.config.tasks:
        found |= _task_figures(at)
        at.tell(f"{at.name}: tasks {', '.join(at.config.tasks)}")
    return found


def _task_figures(at: _Model) -> Figures:
    """What the harness says, or why it says nothing; the other figures stay."""
    config = at.config
    try:
        return tasks_module.measure(at.model, at.tokenizer, config.tasks, config.harness, config.seed)
    except StageError as error:
        names = {task: tasks_module.metrics(task, config.harness.include_path) or ("acc",) for task in config.tasks}
        why = Measured(why=str(error))
        return {(metric, task): why for task, metrics in names.items() for metric in metrics}


def _short(shown: Mapping[str, Any]) -> str:
    return str(shown["why"]) if shown["value"] is None else f"{shown['value']:.4g}"


# Perplexity


def _perplexity(at: _Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """Negative log-likelihood by row, over its tokens in the loss and over the UTF-8 bytes of their text."""
    texts: Texts = []
    owners: list[int] = []
    size = [0] * len(rows)
    for index, row in enumerate(rows):
        pieces, size[index] = _text(at, row["text"]) if "text" in row else _conversation(at, row)
        texts += pieces
        owners += [index] * len(pieces)
    total, count = [0.0] * len(rows), [0] * len(rows)
    for index, (_, labels), loss in zip(owners, texts, at.losses(texts), strict=True):
        total[index] += loss
        count[index] += sum(label != IGNORED for label in labels[1:])
    by_token = [(loss, float(tokens)) if tokens else None for loss, tokens in zip(total, count, strict=True)]
    by_byte = [
        (loss, float(size)) if size and tokens else None for loss, size, tokens in zip(total, size, count, strict=True)
    ]
    why = "no row has a token in the loss within `max_length`"
    return {
        metric: Measured(values, None if any(values) else why)
        for metric, values in (("perplexity", by_token), ("bits_per_byte", by_byte))
    }


def _text(at: _Model, text: str) -> tuple[Texts, int]:
    """A text in pieces, each after the token that starts a text, so that every token of it is predicted."""
    tokenizer = at.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: Ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [ids[start : start + at.limit - 1] for start in range(0, len(ids), at.limit - 1)]
    return [([first, *piece], [IGNORED, *piece]) for piece in pieces], len(text.encode())


def _conversation(at: _Model, row: Row) -> tuple[Texts, int]:
    """A conversation with the labels that training has, and the bytes of the words among them."""
    _check_chat(at)
    ids, labels = encode_chat(at.tokenizer, row["messages"], row.get("tools"))
    ids, labels = ids[: at.limit], labels[: at.limit]
    runs: list[Ids] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    words = at.tokenizer.batch_decode(runs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [(ids, labels)], sum(len(said.encode()) for said in words)


def _answer_match(at: _Model, rows: Sequence[Row]) -> dict[str, Measured]:
    """Is a row's last answer likelier after its own question than after that of the next row, and by how much?"""
    if len(rows) < 2:
        why = Measured(why="one row has no other question to compare with")
        return dict.fromkeys(MATCH_METRICS, why)
    asked = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    swapped = [{**row, "prompt": asked[place - len(rows) + 1]["prompt"]} for place, row in enumerate(asked)]
    texts: Texts = []
    counts = []
    for (own,), (other,) in zip(_completions(at, asked), _completions(at, swapped), strict=True):
        both = [own, other]
        counts.append(min(sum(label != IGNORED for label in labels) for _, labels in both))
        texts += [_with_labels(*one, counts[-1]) for one in both]  # a long question leaves less of the answer
    losses = at.losses(texts)
    margins = [losses[2 * n + 1] - losses[2 * n] if count else None for n, count in enumerate(counts)]
    per_token = [None if one is None else (one, float(count)) for one, count in zip(margins, counts, strict=True)]
    return {"answer_match": _shares(margins), "answer_margin": Measured(per_token)}


def _with_labels(ids: Ids, labels: Ids, count: int) -> tuple[Ids, Ids]:
    """The row up to its label number `count`."""
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    end = places[count - 1] + 1 if count else 1
    return ids[:end], labels[:end]


def _check_chat(at: _Model) -> None:
    if not at.tokenizer.chat_template:
        raise StageError(f"`{at.name}` has no chat template; set `template:` at the top")


# Preference


def _pairs(
    at: _Model, name: str, rows: Sequence[Row], reference: dict[str, list[tuple[float, float]]]
) -> dict[str, Measured]:
    """Accuracy and margins: log π of the chosen answer less that of the rejected one, in nats."""
    _check_chat(at)
    texts = [side for pair in _completions(at, rows) for side in pair]
    found = [-loss for loss in at.losses(texts)]
    counts = [sum(label != IGNORED for label in labels) for _, labels in texts]
    whole: list[tuple[float, float] | None] = []
    means: list[tuple[float, float] | None] = []
    for place in range(0, len(texts), 2):
        both, tokens = (found[place], found[place + 1]), (counts[place], counts[place + 1])
        whole.append(both if all(tokens) else None)
        means.append((both[0] / tokens[0], both[1] / tokens[1]) if all(tokens) else None)
    first = reference.setdefault(name, [pair or (0.0, 0.0) for pair in whole])
    margins = [None if pair is None else pair[0] - pair[1] for pair in whole]
    rewards = [
        None if margin is None else margin - (base[0] - base[1]) for margin, base in zip(margins, first, strict=True)
    ]
    per_token = [None if pair is None else pair[0] - pair[1] for pair in means]
    values = {
        "preference_accuracy": _shares(margins),
        "preference_accuracy_per_token": _shares(per_token),
        "preference_margin": _values(margins),
        "preference_margin_per_token": _values(per_token),
        "reward_accuracy": _shares(rewards),
        "reward_margin": _values(rewards),
    }
    if at.name == next(iter(at.config.compare)):
        itself = Measured(why="it is the model that rewards are measured against")
        values |= {"reward_accuracy": itself, "reward_margin": itself}
    return values


def _values(values: Sequence[float | None]) -> Measured:
    return Measured([None if value is None else (value, 1.0) for value in values])


def _shares(margins: Sequence[float | None]) -> Measured:
    return _values([margin if margin is None or margin != margin else float(margin > 0) for margin in margins])


def _completions(at: _Model, rows: Sequence[Row]) -> list[Texts]:
    """Prompt and answer of each row, or of both its answers, with labels for the answer and its end of turn alone."""
    return [
        [(one.ids[: at.limit], one.labels[: at.limit]) for one in row] for row in encoding.encode(at.tokenizer, rows)
    ]


# Answers


def _answers_or_why(at: _Model, asked: Sequence[_Asked]) -> Figures:
    """`_answers`; where the template cannot write a prompt, why there are none."""
    try:
        return _answers(at, asked)
    except StageError as error:
        for one in asked:
            one.answers[at.name] = {"answer": None, "why": str(error)}
        why = Measured(why=str(error))
        return {(metric, one.data): why for one in asked for metric in ANSWER_METRICS}


def _answers(at: _Model, asked: Sequence[_Asked]) -> Figures:
    """The model's answers, kept in `asked`, and what they come to by data set."""
    from transformers import set_seed

    set_seed(at.config.seed)
    longest = at.config.generation.max_new_tokens
    prompts = [_prompt(at, one) for one in asked]
    room = inference.positions(at.model) - longest
    fits = [index for index, ids in enumerate(prompts) if 0 < len(ids) <= room]
    settings = at.config.generation.model_dump()
    if not settings["do_sample"]:
        settings |= dict.fromkeys(("temperature", "top_p", "top_k"))
    given = [prompts[index] for index in fits]
    made = inference.answers(at.model, at.tokenizer, given, at.config.batch_tokens, settings=settings)
    stops = set(inference.stop_tokens(at.model))
    for index, ids in zip(fits, made, strict=True):
        one, stopped = asked[index], ids[-1:] != [] and ids[-1] in stops
        said = at.tokenizer.decode(ids, skip_special_tokens=True).strip()
        words = ids[:-1] if stopped else ids
        values = score_answer(said, words, reference=one.reference, stopped=stopped)
        one.answers[at.name] = {"answer": said, "stopped": stopped, **values}
    for index in set(range(len(asked))) - set(fits):
        asked[index].answers[at.name] = {"answer": None, "why": "the prompt leaves no room for an answer"}
    whys = dict.fromkeys(REFERENCE_METRICS, "no reference answers") | {"repetition": "no answer has four tokens"}
    found: Figures = {}
    for data in dict.fromkeys(one.data for one in asked):
        told = [one.answers[at.name] for one in asked if one.data == data]
        for metric in ANSWER_METRICS:
            rows = [None if one.get(metric) is None else (one[metric], 1.0) for one in told]
            found[metric, data] = Measured(rows, None if any(rows) else whys.get(metric))
    return found


def _prompt(at: _Model, one: _Asked) -> Ids:
    """The prompt's ids; without a chat template those of its last message."""
    if at.tokenizer.chat_template:
        text = render(at.tokenizer, one.messages, prompt=True, tools=one.tools)
        return list(at.tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(at.tokenizer(one.messages[-1]["content"])["input_ids"])


# The table


def _result(
    config: Config, found: Mapping[str, Figures], data: Mapping[str, Sequence[Row]], asked: Sequence[_Asked]
) -> dict[str, Any]:
    """Everything that was measured, as documented in docs/evaluate.md."""
    models = list(found)
    measured = list(dict.fromkeys(key for figures in found.values() for key in figures))
    absent = Measured(why="the harness gives none")
    by_key = {key: {model: found[model].get(key, absent) for model in models} for key in measured}
    figures = [
        {"metric": metric, "data": name, "model": model, "lower_is_better": lower_is_better(metric)}
        | figure_of(metric, by_model[model], config.seed)
        for (metric, name), by_model in by_key.items()
        for model in models
    ]
    pairs = dict.fromkeys(
        pair for place in range(1, len(models)) for pair in ((place, place - 1), (place, 0))
    )  # each model with the one before, and with the first
    comparisons = []
    for (metric, name), by_model in by_key.items():
        for one, other in pairs:
            of, versus = models[one], models[other]
            result = compare_models(metric, by_model[of], by_model[versus], config.seed)
            winner = {1: of, 0: versus}.get(result["better"]) if result["better"] is not None else None
            comparisons.append(
                {"metric": metric, "data": name, "model": of, "versus": versus} | result | {"better": winner}
            )
    settings = config.model_dump(mode="json", exclude={"compare", "data", "prompts", "gates", "template"})
    rows = {name: len(rows) for name, rows in data.items()}
    prompts = {name: sum(one.data == name for one in asked) for name in dict.fromkeys(one.data for one in asked)}
    counts = {"rows": rows, "prompts": prompts}
    return {"schema": SCHEMA, "models": models, **counts, "settings": settings} | {
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL},
        "figures": figures,
        "comparisons": comparisons,
    }


def _main_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the record holds: the values alone, by metric, data and model."""
    figures: dict[str, dict[str, dict[str, float | None]]] = {}
    for one in result["figures"]:
        figures.setdefault(one["metric"], {}).setdefault(one["data"], {})[one["model"]] = one["value"]
    return {**{key: result[key] for key in ("models", "rows", "prompts", "settings")}, "figures": figures}
