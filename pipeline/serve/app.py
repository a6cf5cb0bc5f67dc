"""The server: OpenAI's API, `/generate`, a page, health and metrics. FastAPI on a worker that holds the models."""

import asyncio
import base64
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from pipeline.serve.answering import Desk, Limits, Model, Refused, Reply, completion_id, stream
from pipeline.serve.guard import App, Guard, Receive, Scope, Send, error_body
from pipeline.serve.metrics import Metrics
from pipeline.serve.requests import TAGS, ChatBody, CompletionBody, InstructionBody
from pipeline.serve.worker import QueueFull, Worker
from stages.data.questions import Question, as_question
from stages.data.row import RowError
from stages.model.generation import Engine, Ids
from stages.runtime.errors import StageError

PAGE = Path(__file__).parent / "page.html"
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store"}
ERROR = {
    "description": "An error in OpenAI's form.",
    "content": {"application/json": {"schema": {"type": "object", "required": ["error"]}}},
}
ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 403, 404, 408, 413, 415, 429, 500, 504), ERROR)
STREAMS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
}
log = logging.getLogger("stagewise.serve")


def build_app(
    engines: dict[str, Engine],
    *,
    limits: Limits | None = None,
    queue: int = 64,
    batch: int = 8,
    key: str | None = None,
    body: int = 2_000_000,
    body_seconds: float = 30,
) -> Guard:
    """The ASGI application that answers with these models; the first is the default.

    Args:
        queue: requests that may wait; more get 429.
        batch: answers that are generated together.
        key: what requests must bring; None answers only requests to this machine's own names.
        body: the most bytes of a request's body, which must arrive within `body_seconds`.
    """
    limits = limits or Limits()
    models = {name: Model(name, engine) for name, engine in engines.items()}
    worker = Worker(engines, queue=queue, batch=batch, tokens=batch * limits.length)
    desk, metrics = Desk(models, worker, limits), Metrics(worker)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.stop()

    app = FastAPI(title="Stagewise", docs_url=None, redoc_url=None, lifespan=lifespan)
    _handle_errors(app)
    _serve_pages(app, desk, metrics)
    _serve_chat(app, desk, metrics)
    _serve_completions(app, desk, metrics)
    _serve_instructions(app, desk, metrics)
    return Guard(_counted_requests(app, metrics), key, body, body_seconds)


def _error(status: int, message: str, *, headers: dict[str, str] | None = None, **more: str | None) -> JSONResponse:
    return JSONResponse(error_body(status, message, **more), status_code=status, headers=headers)


def _handle_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return _error(error.status, error.message, param=error.param, code=error.code)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        message = f"too many requests wait; try again in {error.seconds} s"
        return _error(429, message, headers={"retry-after": str(error.seconds)}, code="rate_limit_exceeded")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"] if part != "body" and part not in TAGS]
        text, more = str(first["msg"]).removeprefix("Value error, "), first.get("ctx") or {}
        if first["type"] == "json_invalid":
            path, text = [], f"the body is not valid JSON: {more.get('error', text)}"
        elif first["type"] == "model_attributes_type" and not _is_json(request):
            return _error(415, "send the body as JSON, with the header `content-type: application/json`")
        param = path[0] if path else more.get("param")
        return _error(400, f"`{'.'.join(path)}`: {text}" if path else text, param=param)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        text, headers = str(error.detail), dict(error.headers or {})
        if error.status_code == 404:
            text = f"there is no route `{request.url.path}`; /openapi.json describes all routes"
        elif error.status_code == 405 and "allow" in {name.lower() for name in headers}:
            allowed = next(value for name, value in headers.items() if name.lower() == "allow")
            text = f"`{request.url.path}` takes {allowed}, not {request.method}"
        return _error(error.status_code, text, headers=headers)

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> JSONResponse:
        return _error(500, "an internal error; the server's log has the reason")


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _counted_requests(app: App, metrics: Metrics) -> App:
    """The application, with every request counted and logged. Prompts and answers are never logged."""

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), 0

        async def seen(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, seen)
        finally:
            if scope["type"] == "http":
                route = getattr(scope.get("route"), "path", "other")
                metrics.request(route, status or 499)
                user = scope.get("state", {}).get("user")
                of = f" user={user!r}" if user else ""
                seconds = time.monotonic() - began
                log.info("%s %s %s %.2f s%s", scope["method"], route, status or 499, seconds, of)

    return counted


def _serve_pages(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    text = PAGE.read_text(encoding="utf-8")
    headers = {**HEADERS, "content-security-policy": _policy(text)}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
    async def figures() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_as_json(model, desk) for model in desk.models.values()]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> dict[str, Any]:
        return _as_json(desk.model(name), desk)


def _policy(page: str) -> str:
    """The content security policy of a page: its own script and style, by their hashes, and this server alone."""

    def allowed(tag: str) -> str:
        inner = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def _as_json(model: Model, desk: Desk) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "stagewise",
        "max_model_len": model.length(desk.limits),
    }


def _serve_chat(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    @app.post("/v1/chat/completions", responses=STREAMS)
    async def chat(request: Request, body: ChatBody) -> Any:
        request.state.user = body.user
        model = desk.model(body.model)
        tools = body.tools if body.tool_choice == "auto" else []
        if body.messages[-1].role == "assistant":
            raise Refused(400, "the last message is from the assistant; end with the user's question", param="messages")
        row: dict[str, Any] = {"messages": [message.as_row() for message in body.messages], "tools": tools}
        question = _question(row, "messages")
        if question.tools and model.calls is None:
            text = f"the chat template of `{model.name}` writes no calls of tools that could be read back"
            raise Refused(400, text, param="tools")
        reply = desk.ask(
            model,
            [_prompt(model, question)],
            body.sampling,
            limit=body.limit,
            n=body.n,
            stop=body.stops,
            live=body.stream and not question.tools,
            tools=question.tools,
        )
        head = {"id": completion_id("chatcmpl"), "created": int(time.time()), "model": model.name}
        if body.stream:
            chunks = stream(reply, body, {**head, "object": "chat.completion.chunk"}, True)
            return StreamingResponse(_counted(chunks, reply, metrics), media_type="text/event-stream")
        await _ended(reply, request)
        metrics.answered(reply)
        choices = []
        for index, answer in enumerate(reply.answers):
            message, reason = reply.message(answer)
            choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": reason})
        return {**head, "object": "chat.completion", "choices": choices, "usage": reply.usage}


def _serve_completions(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    @app.post("/v1/completions", responses=STREAMS)
    async def complete(request: Request, body: CompletionBody) -> Any:
        request.state.user = body.user
        model = desk.model(body.model)
        prompts = _texts(model, body)
        given: dict[str, Any] = {"limit": body.limit, "n": body.n, "stop": body.stops, "param": "prompt"}
        reply = desk.ask(model, prompts, body.sampling, live=body.stream, strip=False, **given)
        head = {"id": completion_id("cmpl"), "created": int(time.time()), "model": model.name}
        head["object"] = "text_completion"
        if body.stream:
            chunks = stream(reply, body, head, False)
            return StreamingResponse(_counted(chunks, reply, metrics), media_type="text/event-stream")
        await _ended(reply, request)
        metrics.answered(reply)
        choices = [
            {"index": index, "text": answer.text, "logprobs": None, "finish_reason": answer.reason}
            for index, answer in enumerate(reply.answers)
        ]
        return {**head, "choices": choices, "usage": reply.usage}


def _serve_instructions(app: FastAPI, desk: Desk, metrics: Metrics) -> None:
    @app.post("/generate", responses=ERRORS)
    async def generate(request: Request, body: InstructionBody) -> Any:
        model = desk.model(body.model)
        row = {"instruction": body.instruction, "input": body.input, "system": body.system}
        ids = _prompt(model, _question(row, "instruction"))
        limit = body.max_new_tokens
        if body.max_length is not None:
            if body.max_length <= len(ids):
                text = f"`max_length` is {body.max_length}, and the prompt alone has {len(ids)} tokens"
                raise Refused(400, text, param="max_length")
            left = body.max_length - len(ids)
            limit = left if limit is None else min(limit, left)
        reply = desk.ask(model, [ids], body.sampling, limit=limit, param="instruction")
        await _ended(reply, request)
        metrics.answered(reply)
        (answer,) = reply.answers
        return {"response": answer.text, "finish_reason": answer.reason, "usage": reply.usage}


def _question(row: dict[str, Any], param: str) -> Question:
    try:
        return as_question(row)
    except (RowError, RecursionError) as error:
        raise Refused(400, str(error), param=param) from None


def _prompt(model: Model, question: Question) -> Ids:
    try:
        return model.engine.prompt(question.messages, question.tools)
    except StageError as error:
        raise Refused(400, str(error), param="messages") from None


def _texts(model: Model, body: CompletionBody) -> list[Ids]:
    """The token ids of plain prompts. Raises Refused for an id that the model does not have."""
    given = body.prompt
    size = model.engine.model.get_input_embeddings().num_embeddings
    prompts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts:
        raise Refused(400, "`prompt` is empty", param="prompt")
    found = []
    for prompt in prompts:
        ids = model.engine.encoder.token_ids([prompt], special=True)[0] if isinstance(prompt, str) else prompt
        if any(not 0 <= token < size for token in ids):
            raise Refused(400, f"`prompt`: token ids are 0 to {size - 1:,}", param="prompt")
        found.append(ids)
    return found


async def _ended(reply: Reply, request: Request) -> None:
    """Wait for the answers; a client that leaves ends them. Raises Refused."""
    waiting = asyncio.ensure_future(reply.ended())
    try:
        while not (await asyncio.wait({waiting}, timeout=0.5))[0]:
            if await request.is_disconnected():
                raise Refused(499, "the client has left")
        waiting.result()
    finally:
        waiting.cancel()
        reply.cancel()
        if reply.error is not None:
            log.error("the model failed", exc_info=reply.error)


async def _counted(chunks: AsyncIterator[bytes], reply: Reply, metrics: Metrics) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        reply.cancel()
        metrics.answered(reply)
        if reply.error is not None:
            log.error("the model failed", exc_info=reply.error)
