"""A request's prompts in, jobs for the worker out; the answers in the form of OpenAI's API."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.serve.requests import Asked
from pipeline.serve.worker import Job, QueueFull, Worker
from stages.chat.calls import CallForm, call_form
from stages.data.row import Tools
from stages.model import inference
from stages.model.generation import Engine, Ids
from stages.model.live import Answer, Sampling, room
from stages.runtime.errors import StageError


@dataclass(frozen=True)
class Limits:
    """Bounds on a request. They come from the command line, never from a request."""

    tokens: int = 1024
    """Tokens of an answer that does not set its own limit."""
    length: int = 8192
    """Tokens of a prompt and its answer together, where the model itself has no smaller limit."""
    answers: int = 8
    """Answers to one request: prompts × `n`."""
    seconds: float = 300
    """From the arrival of a request to the end of its answers."""


class Refused(Exception):
    """A request that cannot be answered; `param` is the parameter to change."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass
class Model:
    """A loaded model, as the API names it."""

    name: str
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def calls(self) -> CallForm | None:
        """How the chat template writes calls of tools; None if that cannot be read back."""
        try:
            return call_form(self.engine.tokenizer)
        except StageError:
            return None

    def length(self, limits: Limits) -> int:
        """Tokens of a prompt and its answer together."""
        return min(inference.positions(self.engine.model), limits.length)


@dataclass
class Reply:
    """The answers to one request while they are generated."""

    model: Model
    answers: Sequence[Answer]
    n: int
    """Answers to each prompt; those to one prompt are neighbours."""
    tools: Tools | None
    job: Job
    worker: Worker
    pieces: asyncio.Queue[tuple[int, str] | None]
    """Index of an answer and a new piece of its text; None when all have ended."""
    error: Exception | None = None

    def cancel(self) -> None:
        """End the answers, and give their place in the queue to others."""
        self.job.cancel()
        self.worker.drop_cancelled()

    async def ended(self) -> None:
        """Wait until all answers have ended.

        Raises:
            Refused: the time is over, or the generation failed.
        """
        while await self.pieces.get() is not None:
            pass
        self.check()

    def check(self) -> None:
        """Raises Refused if the answers did not end by themselves."""
        if self.error is not None:
            raise Refused(500, "the model failed on this request; the server's log has the reason") from self.error
        if any(answer.reason == "cancelled" for answer in self.answers):
            raise Refused(504, "the answer took too long; ask for fewer tokens with `max_tokens`", code="timeout")

    async def texts(self) -> AsyncIterator[tuple[int, str]]:
        """Pieces of text as they are generated; when the reader leaves, the answers are cancelled."""
        try:
            while (piece := await self.pieces.get()) is not None:
                yield piece
        finally:
            self.cancel()

    def message(self, answer: Answer) -> tuple[dict[str, Any], str]:
        """The assistant's message, and the reason why the answer ended."""
        content = answer.text
        calls: list[dict[str, Any]] = []
        if self.tools and self.model.calls is not None:
            known = {tool["function"]["name"] for tool in self.tools}
            content, calls = self.model.calls.read(answer.text, known)
            for token in self.model.engine.tokenizer.all_special_tokens:  # they were written for the calls alone
                content = content.replace(token, "")
            content = content.strip()
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": json.dumps(call["arguments"], ensure_ascii=False),
                    },
                }
                for call in calls
            ]
        return message, "tool_calls" if calls else str(answer.reason)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of all answers."""
        asked = sum(len(answer.prompt) for answer in self.answers[:: self.n])
        written = sum(len(answer.ids) for answer in self.answers)
        return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


@dataclass(frozen=True)
class Desk:
    """Turns requests into jobs of the worker."""

    models: dict[str, Model]
    """By the name that requests use; the first is the default."""
    worker: Worker
    limits: Limits

    def model(self, name: str | None) -> Model:
        """The model of a request. Raises Refused."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            there = ", ".join(f"`{known}`" for known in self.models)
            raise Refused(404, f"there is no model `{name}`; there is {there}", param="model", code="model_not_found")
        return self.models[name]

    def ask(
        self,
        model: Model,
        prompts: Sequence[Ids],
        sampling: Sampling,
        *,
        limit: int | None,
        n: int = 1,
        stop: Sequence[str] = (),
        live: bool = False,
        strip: bool = True,
        tools: Tools | None = None,
        param: str = "messages",
    ) -> Reply:
        """Hand a request to the worker; `live` if its text is wanted piece by piece, `param` holds the prompt.

        Raises:
            Refused: it asks for too much.
            QueueFull: too many requests wait.
        """
        if len(prompts) * n > self.limits.answers:
            raise Refused(400, f"this server gives {self.limits.answers} answers to a request at most", param="n")
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        answers = [
            Answer(
                prompt=ids,
                max_tokens=self._tokens(model, ids, limit, param),
                stop=stop,
                strip=strip,
                special=tools is not None,
                deadline=time.monotonic() + self.limits.seconds,
            )
            for ids in prompts
            for _ in range(n)
        ]

        def put(piece: tuple[int, str] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended, and its loop is closed
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def on_end(error: Exception | None) -> None:
            reply.error = error
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(timer.cancel)
            put(None)

        for index, answer in enumerate(answers):
            answer.on_text = (lambda text, index=index: put((index, text))) if live else None
        job = Job(model.name, answers, sampling, on_end)
        reply = Reply(model, answers, n, tools, job, self.worker, pieces)
        timer = loop.call_later(self.limits.seconds, reply.cancel)  # also while the request waits
        try:
            self.worker.submit(job)
        except QueueFull:
            timer.cancel()
            raise
        return reply

    def _tokens(self, model: Model, ids: Ids, limit: int | None, param: str) -> int:
        """How many tokens an answer may have. Raises Refused."""
        left = min(room(model.engine, ids), model.length(self.limits) - len(ids))
        if left < 1 or not ids:
            raise Refused(
                400,
                f"the prompt has {len(ids):,} tokens; this model takes 1 to {model.length(self.limits) - 1:,}",
                param=param,
                code="context_length_exceeded",
            )
        if limit is not None and limit > left:
            raise Refused(
                400,
                f"`max_tokens` is {limit:,}, and after a prompt of {len(ids):,} tokens {left:,} are left",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return min(left, limit or self.limits.tokens)


def completion_id(kind: str) -> str:
    """A new id, such as `chatcmpl-0123…`."""
    return f"{kind}-{uuid.uuid4().hex}"


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def stream(reply: Reply, body: Asked, head: dict[str, Any], chat: bool) -> AsyncIterator[bytes]:
    """The chunks of an answer as server-sent events, with `[DONE]` at the end."""
    nothing: dict[str, Any] = {"usage": None} if body.includes_usage else {}

    def chunk(index: int, piece: dict[str, Any], reason: str | None = None) -> bytes:
        part = {"delta": piece} if chat else {"text": piece.get("content", "")}
        choice = {"index": index, **part, "logprobs": None, "finish_reason": reason}
        return event({**head, "choices": [choice], **nothing})

    for index in range(len(reply.answers) if chat else 0):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, text in reply.texts():
        yield chunk(index, {"content": text})
    try:
        reply.check()
    except Refused as error:
        from pipeline.serve.guard import error_body

        yield event(error_body(error.status, error.message, code=error.code))
        yield DONE
        return
    for index, answer in enumerate(reply.answers):
        message, reason = reply.message(answer)
        if reply.tools:  # the text is known to be no call only at its end
            calls = [{"index": place, **call} for place, call in enumerate(message.get("tool_calls", []))]
            pieces: dict[str, Any] = {"content": message["content"]} if message["content"] else {}
            yield chunk(index, {**pieces, **({"tool_calls": calls} if calls else {})})
        yield chunk(index, {}, reason)
    if body.includes_usage:
        yield event({**head, "choices": [], "usage": reply.usage})
    yield DONE
