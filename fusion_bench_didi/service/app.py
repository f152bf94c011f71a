"""The service as an ASGI application."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ..errors import DiDiError
from .batching import Batcher, Row
from .classification import Classification
from .language import Completion, Language
from .limits import Limits, Refused
from .messages import (
    ASKED,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    faults,
    listed,
)
from .opening import Runner

#: The model's name for tasks that the router finds.
ROUTED = "routed"
#: That a prompt is continued by if nothing is said, as OpenAI's; a conversation by as many as are allowed and have room.
TOKENS = 16
Scope = MutableMapping[str, Any]
#: So many times the bytes allowed are read, and dropped, for the caller to hear that there are too many.
DRAINED = 8


def make_app(runner: Runner, limits: Limits = Limits()) -> FastAPI:
    """The application; its thread begins with it and ends with it."""
    model = runner.model
    names = [*model.tasks, *([ROUTED] if model.router is not None else [])]
    begun = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(runner, limits)
        yield
        await asyncio.to_thread(app.state.batcher.close)

    app = FastAPI(title="didi", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, most=limits.body_kb * 1024)
    for kind in (Refused, DiDiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _told)

    def bounded(tokens: int | None) -> int | None:
        if tokens and tokens > limits.tokens:
            raise Refused(400, f"{tokens} tokens are asked for, at most {limits.tokens}.")  # fmt: skip
        return tokens

    def check_model(name: str) -> None:
        """Before all else: what is right of the rest depends on it, or the caller means another service."""
        if name not in names:
            raise Refused(404, f"The model {name!r} does not exist; there are {names}.")

    async def answers(
        name: str, asked: Sequence[Any], row: Callable[[str | None, Any], Row]
    ) -> list[Any]:
        if len(asked) > (most := min(limits.batch, limits.queue)):
            raise Refused(400, f"{len(asked)} inputs in one request, at most {most}.")
        task = None if name == ROUTED and ROUTED not in model.tasks else name
        rows = await asyncio.to_thread(lambda: [row(task, one) for one in asked])
        waiting = app.state.batcher.submit(rows)
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, waiting))
        finally:
            for one in waiting:
                one.cancel()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": app.state.batcher.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [
                {"id": n, "object": "model", "created": begun, "owned_by": "didi"}
                for n in names
            ],
        }

    if isinstance(runner, Language):

        @app.post("/v1/completions")
        async def completions(asked: CompletionRequest) -> dict[str, Any]:
            check_model(asked.model)
            tokens = bounded(asked.max_tokens) or min(TOKENS, limits.tokens)
            found = await answers(
                asked.model,
                listed(asked.prompt),
                lambda task, text: runner.row(task, text, tokens),
            )
            choices = [{"text": one.text} for one in found]
            return _as_openai("text_completion", "cmpl", asked.model, found, choices)

        @app.post("/v1/chat/completions")
        async def chat(asked: ChatRequest) -> dict[str, Any]:
            check_model(asked.model)
            tokens = bounded(asked.tokens)
            found = await answers(
                asked.model,
                [asked.messages],
                lambda task, messages: runner.turn(task, messages, tokens),
            )
            said = [{"role": "assistant", "content": one.text} for one in found]
            choices = [{"message": message} for message in said]
            return _as_openai("chat.completion", "chatcmpl", asked.model, found, choices)  # fmt: skip

    if isinstance(runner, Classification):

        @app.post("/v1/classify")
        async def classify(asked: ClassifyRequest) -> dict[str, Any]:
            check_model(asked.model)
            given = asked.image if runner.images else asked.input
            if given is None:
                key = "image (base64)" if runner.images else "input (texts)"
                raise Refused(400, f"This model classifies {key}.")
            found = await answers(asked.model, listed(given), runner.row)
            return {
                "object": "list",
                "model": asked.model,
                "data": [
                    {"index": place, "label": next(iter(scores)), "scores": scores}
                    for place, scores in enumerate(found)
                ],
            }

    return app


def _as_openai(
    kind: str,
    start: str,
    name: str,
    found: Sequence[Completion],
    choices: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The answer in OpenAI's form.

    Args:
        start: of its identifier.
        choices: what is said in each, by the key that it has there.
    """
    before = sum(one.prompt_tokens for one in found)
    after = sum(one.tokens for one in found)
    return {
        "id": f"{start}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
        "choices": [
            {"index": i, **choice, "finish_reason": one.finish, "logprobs": None}
            for i, (choice, one) in enumerate(zip(choices, found))
        ],
        "usage": {
            "prompt_tokens": before,
            "completion_tokens": after,
            "total_tokens": before + after,
        },
    }


def _told(request: Request | None, error: Exception) -> JSONResponse:
    """An error in OpenAI's form; what the caller cannot mend is not told."""
    headers = getattr(error, "headers", None)
    if isinstance(error, Refused):
        status, reason = error.status, str(error)
        headers = {"Retry-After": "1"} if status == 429 else None
    elif isinstance(error, RequestValidationError):
        status, reason = 400, faults(
            error.errors(), error.body, ASKED[request.url.path]
        )
        if isinstance(error.body, bytes):  # which nobody has read
            reason = "The body is not sent as JSON; send the header content-type: application/json."
    elif isinstance(error, HTTPException):
        status, reason = error.status_code, str(error.detail)
        if status == 400:  # the host's, of bodies that are no text
            reason = "The body is not JSON in UTF-8."
        elif status in (404, 405):
            asked = f"{request.method} {request.url.path}"
            reason = f"There is no {asked}; this model answers {_answered(request)}."
    elif isinstance(error, DiDiError):
        status, reason = 500, str(error)
    else:
        status, reason = 500, "The batch failed; the service's log says why."
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": reason, "type": kind, "code": status}}
    return JSONResponse(body, status, headers)


def _answered(request: Request) -> str:
    """What may be asked of the application, methods and paths."""
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    return ", ".join(f"{' '.join(route.methods)} {route.path}" for route in routes)


class BodyLimit:
    """Refuses bodies of more bytes than allowed, also where their length is not told.

    Args:
        app: that is asked otherwise.
        most: bytes.
    """

    def __init__(self, app: Any, most: int):
        self.app, self.most = app, most

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Scope]], send: Callable
    ) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        stated = int(told) if told.isdigit() else 0
        parts: list[Scope] = []
        size, more = 0, True
        while more and size <= DRAINED * self.most:
            message = await receive()
            more, size = message.get("more_body", False), size + len(message.get("body", b""))  # fmt: skip
            if max(size, stated) <= self.most:
                parts.append(message)
        if max(size, stated) > self.most:
            reason = f"The body is of more than {self.most} bytes."
            answer = _told(None, Refused(413, reason))
            return await answer(scope, receive, send)

        async def replay() -> Scope:
            return parts.pop(0) if parts else await receive()

        await self.app(scope, replay, send)
