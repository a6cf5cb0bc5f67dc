"""Prompts that every model answers, and the figures of the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.data.row import Message, Tools
from stages.measuring.losses import Subject
from stages.measuring.metrics import ANSWER_METRICS, REFERENCE_METRICS, Figures, Measured, score_answer
from stages.model import inference
from stages.runtime.errors import StageError


@dataclass
class Prompt:
    """A prompt, its reference if it has one, and the answers of the models that were asked so far."""

    data: str
    """The data set, or `prompts` for prompts that are written into the config."""
    row: int
    messages: list[Message]
    tools: Tools | None = None
    reference: str | None = None
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Model → `answer` (None if there is none, then `why` says why), `stopped`, and its metrics."""

    def as_json(self) -> dict[str, Any]:
        """A line of answers.jsonl."""
        messages = [{key: value for key, value in message.items() if value} for message in self.messages]
        line = {"data": self.data, "row": self.row, "prompt": messages, "reference": self.reference}
        return {**line, "answers": self.answers}


def ask(at: Subject, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> Figures:
    """Keep the answers of a model in `prompts`, and hand back their figures by metric and data set.

    `generation` has settings of transformers' GenerationConfig, `max_new_tokens` among them. Where the template cannot
    render a prompt, every figure says so.
    """
    try:
        _answer(at, prompts, generation)
    except StageError as error:
        for prompt in prompts:
            prompt.answers[at.name] = {"answer": None, "why": str(error)}
        why = Measured(why=str(error))
        return {(metric, prompt.data): why for prompt in prompts for metric in ANSWER_METRICS}
    absent = dict.fromkeys(REFERENCE_METRICS, "no reference answers") | {"repetition": "no answer has four tokens"}
    found: Figures = {}
    for data in dict.fromkeys(prompt.data for prompt in prompts):
        answers = [prompt.answers[at.name] for prompt in prompts if prompt.data == data]
        for metric in ANSWER_METRICS:
            rows = [None if answer.get(metric) is None else (answer[metric], 1.0) for answer in answers]
            found[metric, data] = Measured(rows, None if any(rows) else absent.get(metric))
    return found


def _answer(at: Subject, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> None:
    from transformers import set_seed

    set_seed(at.seed)
    encoded = [at.engine.prompt(prompt.messages, prompt.tools) for prompt in prompts]
    room = inference.positions(at.engine.model) - generation["max_new_tokens"]
    fits = [index for index, ids in enumerate(encoded) if 0 < len(ids) <= room]
    settings = dict(generation)
    if not settings["do_sample"]:
        settings |= dict.fromkeys(("temperature", "top_p", "top_k"))
    made = at.engine.generate([encoded[index] for index in fits], settings, tokens=at.batch_tokens)
    for index, ids in zip(fits, made, strict=True):
        prompt, stopped, text = prompts[index], at.engine.stopped(ids), at.engine.text(ids)
        values = score_answer(text, ids[:-1] if stopped else ids, reference=prompt.reference, stopped=stopped)
        prompt.answers[at.name] = {"answer": text, "stopped": stopped, **values}
    for index in set(range(len(prompts))) - set(fits):
        prompts[index].answers[at.name] = {"answer": None, "why": "the prompt leaves no room for an answer"}
