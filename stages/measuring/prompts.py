"""Prompts that every model answers, and the metrics of the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.chat.writing import Refused
from stages.data.row import Message, Tools
from stages.measuring.losses import Subject
from stages.measuring.metrics import Figures, Measured, metric_names, score_answer
from stages.model import inference
from stages.runtime.errors import StageError


@dataclass
class Prompt:
    """A prompt, its reference answer if it has one, and the answers of the models so far."""

    data: str
    """The data set, or `prompts` for prompts that are written into the config."""
    row: int
    messages: list[Message]
    tools: Tools | None = None
    reference: str | None = None
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Model → `answer`, `stopped` and the metrics of the answer; without an answer, `answer` is None and `why` the
    reason."""

    def as_json(self) -> dict[str, Any]:
        """A line of answers.jsonl."""
        messages = [{key: value for key, value in message.items() if value} for message in self.messages]
        line = {"data": self.data, "row": self.row, "prompt": messages, "reference": self.reference}
        return {**line, "answers": self.answers}


def ask(subject: Subject, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> Figures:
    """Put a model's answers into `prompts`.

    `generation` has settings of transformers' GenerationConfig, `max_new_tokens` among them.

    Returns:
        The metrics of the answers. If the template cannot render a prompt, each of them says so.
    """
    metrics = metric_names("reference", "answer")
    try:
        _answer(subject, prompts, generation)
    except StageError as error:
        for prompt in prompts:
            prompt.answers[subject.name] = {"answer": None, "why": str(error)}
        why = Measured(why=str(error))
        return {(metric, prompt.data): why for prompt in prompts for metric in metrics}
    absent = dict.fromkeys(metric_names("reference"), "no reference answers")
    absent["repetition"] = "no answer has four tokens"
    found: Figures = {}
    for data in dict.fromkeys(prompt.data for prompt in prompts):
        answers = [prompt.answers[subject.name] for prompt in prompts if prompt.data == data]
        for metric in metrics:
            rows = [None if answer.get(metric) is None else (answer[metric], 1.0) for answer in answers]
            found[metric, data] = Measured(rows, None if any(rows) else absent.get(metric))
    return found


def _answer(subject: Subject, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> None:
    from transformers import set_seed

    set_seed(subject.seed)
    encoded: list[list[int]] = []
    why = dict.fromkeys(range(len(prompts)), "the prompt leaves no room for an answer")
    for index, prompt in enumerate(prompts):
        try:
            encoded.append(subject.engine.prompt(prompt.messages, prompt.tools))
        except Refused as error:
            encoded.append([])
            why[index] = str(error)
    room = inference.positions(subject.engine.model) - generation["max_new_tokens"]
    fits = [index for index, ids in enumerate(encoded) if 0 < len(ids) <= room]
    settings = dict(generation)
    if not settings["do_sample"]:
        settings |= dict.fromkeys(("temperature", "top_p", "top_k"))
    answers = subject.engine.generate([encoded[index] for index in fits], settings, tokens=subject.batch_tokens)
    for index, ids in zip(fits, answers, strict=True):
        prompt, stopped, text = prompts[index], subject.engine.stopped(ids), subject.engine.text(ids)
        values = score_answer(text, ids[:-1] if stopped else ids, reference=prompt.reference, stopped=stopped)
        prompt.answers[subject.name] = {"answer": text, "stopped": stopped, **values}
    for index in set(range(len(prompts))) - set(fits):
        prompts[index].answers[subject.name] = {"answer": None, "why": why[index]}
