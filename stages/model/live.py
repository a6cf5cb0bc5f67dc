"""Answers while they are generated: each of a batch has its own length limit and stop texts, and can be cancelled."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stages.model import inference
from stages.model.generation import Engine, Ids

Reason = Literal["stop", "length", "cancelled"]
REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes that are not a whole character yet


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Requests with equal sampling can be generated as one batch.

    Without `temperature`, the model's generation config decides. At temperature 0 the likeliest token is taken.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer holds (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time that the answer holds it (OpenAI's definition)."""
    seed: int | None = None
    """The same seed, prompts and settings give the same answers."""

    def settings(self) -> dict[str, Any]:
        """As settings of transformers' `generate`."""
        given = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given = {name: value for name, value in given.items() if value is not None}
        found: dict[str, Any] = {"num_beams": 1}
        if self.temperature == 0:
            found |= {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))}
        elif self.temperature is not None or given:
            temperature = 1.0 if self.temperature is None else self.temperature
            # A model's own generation config must not narrow what the request asks for.
            found |= {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0, **given}
        if self.repetition_penalty is not None:
            found["repetition_penalty"] = self.repetition_penalty
        return found


@dataclass
class Answer:
    """One answer: what was asked, and what has been generated so far."""

    prompt: Ids
    max_tokens: int
    stop: Sequence[str] = ()
    """Texts before which the answer ends."""
    strip: bool = True
    """Whether blanks around the answer are removed."""
    special: bool = False
    """Whether special tokens are written as text."""
    on_text: Callable[[str], None] | None = None
    """Called with each new piece of the text; the pieces together are `text`."""
    deadline: float = float("inf")
    """On `time.monotonic`'s clock; the answer is cancelled after it."""
    ids: Ids = field(default_factory=list)
    """The generated token ids, with the stop token if there is one."""
    text: str = ""
    reason: Reason | None = None
    """Why the answer ended; None while it is generated."""
    _sent: str = ""

    def cancel(self) -> None:
        """End the answer at the next token."""
        self.reason = self.reason or "cancelled"

    def take(self, token: int, engine: Engine, stops: set[int]) -> None:
        """Add a token; the answer ends with a stop token, a stop text, its length limit or its deadline."""
        if self.reason is not None:
            return
        self.ids.append(token)
        if time.monotonic() > self.deadline:
            self.reason = "cancelled"
        elif token in stops:
            self.reason = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.reason = "length"
        if self.reason is not None or self.stop or self.on_text is not None:
            self._update_text(engine, stops)

    def _update_text(self, engine: Engine, stops: set[int]) -> None:
        ids = self.ids[:-1] if self.ids[-1:] and self.ids[-1] in stops else self.ids
        whole = str(engine.tokenizer.decode(ids, skip_special_tokens=not self.special))
        whole = whole.lstrip() if self.strip else whole
        found = [place for stop in self.stop if (place := whole.find(stop)) >= 0]
        if found:
            whole, self.reason = whole[: min(found)], "stop"
        ended = self.reason is not None
        self.text = (whole.rstrip() if self.strip else whole) if ended else self._settled(whole)
        if self.on_text is not None and self.text.startswith(self._sent) and len(self.text) > len(self._sent):
            piece, self._sent = self.text[len(self._sent) :], self.text
            self.on_text(piece)

    def _settled(self, text: str) -> str:
        """The part of a text that later tokens do not change."""
        text = text.rstrip(REPLACEMENT)
        longest = max((_overlap(text, stop) for stop in self.stop), default=0)
        text = text[: len(text) - longest]
        return text.rstrip() if self.strip else text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)


def generate(engine: Engine, answers: Sequence[Answer], sampling: Sampling) -> None:
    """Generate answers as one batch, and fill them in.

    Each prompt and its `max_tokens` must fit the positions of the model (`room`). With a seed, the same batch gives the
    same answers; without one, answers do not depend on the seeds of earlier calls.
    """
    import torch

    if sampling.seed is None:
        torch.seed()
    else:
        torch.manual_seed(sampling.seed)
    _generate(engine, answers, sampling)


def _generate(engine: Engine, answers: Sequence[Answer], sampling: Sampling) -> None:
    import torch
    from transformers import StoppingCriteriaList

    model = engine.model
    width = max(len(answer.prompt) for answer in answers)
    limit = inference.positions(model)
    longest = max(answer.max_tokens for answer in answers)
    if width + longest > limit and len(answers) > 1:  # shorter prompts have room for longer answers
        for answer in answers:
            _generate(engine, [answer], sampling)
        return
    ids, mask = inference.left_padded([answer.prompt for answer in answers], engine.tokenizer.pad_token_id)
    with torch.inference_mode():
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=longest,
            stopping_criteria=StoppingCriteriaList([_follow(engine, answers)]),
            logits_processor=_penalties(sampling, width),
            **sampling.settings(),
        )


def room(engine: Engine, prompt: Ids) -> int:
    """How many tokens an answer to this prompt can have."""
    return inference.positions(engine.model) - len(prompt)


def _follow(engine: Engine, answers: Sequence[Answer]) -> Any:
    """A stopping criterion that hands every new token to its answer."""
    import torch
    from transformers import StoppingCriteria

    stops = set(inference.stop_tokens(engine.model))

    class Follow(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
            for answer, token in zip(answers, input_ids[:, -1].tolist(), strict=True):
                answer.take(token, engine, stops)
            return torch.tensor([answer.reason is not None for answer in answers], device=input_ids.device)

    return Follow()


def _penalties(sampling: Sampling, width: int) -> Any:
    """OpenAI's penalties, which count the tokens of the answer and not those of the prompt."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Penalties(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            import torch

            written = input_ids[:, width:]
            counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
            return scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)

    wanted = sampling.presence_penalty or sampling.frequency_penalty
    return LogitsProcessorList([Penalties()] if wanted else [])
