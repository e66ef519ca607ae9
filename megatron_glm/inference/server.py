"""A small HTTP server over a `Service`.

POST /generate takes a JSON object with a `prompt` and, on request, the fields of `SearchConfig`;
it answers with a `Completion`, or where `stream` is true with server-sent events: pieces of text
as they are filled, then the completion. GET /health says whether the engine runs. Every error is
{"error": {"type": ..., "message": ...}}.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, create_model
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_glm.errors import GLMError
from megatron_glm.inference.blanks import BlankCodec, Prompt
from megatron_glm.inference.search import Search, SearchConfig
from megatron_glm.inference.service import OverloadedError, Service, StoppedError

_DISCONNECT_POLL_S = 1.0
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, and its limits: bytes of a body, tokens that a request may ask
    for, seconds that open requests have when it is stopped."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 1 << 20
    max_new_tokens: int = 1024
    grace_s: int = 5


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    multitask: bool = False
    stream: bool = False


# The fields of SearchConfig, each of which a request may leave out.
FillRequest = create_model(
    "FillRequest",
    __base__=_Fields,
    **{field.name: (field.type | None, None) for field in fields(SearchConfig)},
)


class Mailbox:
    """Brings what a `Service` says of a request into the event loop of the server."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue = asyncio.Queue()

    def progress(self, generated: tuple[int, ...]) -> None:
        self._put(generated)

    def finished(self, search: Search) -> None:
        self._put(search)

    def failed(self, error: BaseException) -> None:
        self._put(error)

    def _put(self, news: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, news)
        except RuntimeError:  # The loop is closed: nobody listens any more.
            pass

    async def read(self, request: Request) -> AsyncIterator[tuple[int, ...] | Search]:
        """The generated ids as they grow, then the search that is over.

        Raises what the service failed with, and ends early where the client is gone."""
        while True:
            try:
                news = await asyncio.wait_for(self._queue.get(), _DISCONNECT_POLL_S)
            except TimeoutError:
                if await request.is_disconnected():
                    return
                continue
            if isinstance(news, BaseException):
                raise news
            yield news
            if isinstance(news, Search):
                return


class Pieces:
    """Cuts what fills the blanks of a prompt into pieces as it grows, never within a character."""

    def __init__(self, codec: BlankCodec, prompt: Prompt):
        self._codec, self._prompt = codec, prompt
        self._shown = [""] * len(prompt.blanks)

    def new(self, generated: tuple[int, ...], is_last: bool) -> list[dict[str, Any]]:
        """What is to be shown more: {"blank": its number, "text": ...}."""
        pieces = []
        fills = self._codec.fill(self._prompt, generated)
        for number, fill in enumerate(fills):
            is_growing = number == len(fills) - 1 and not is_last
            text = fill.rstrip(_REPLACEMENT) if is_growing else fill
            shown = self._shown[number]
            if len(text) > len(shown) and text.startswith(shown):
                pieces.append({"blank": number, "text": text[len(shown) :]})
                self._shown[number] = text
        return pieces


class BodyLimit:
    """Refuses bodies of more than `max_bytes`, by their announced length or as they come in."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = HTTPException(413, f"the body has more than {self._max_bytes} bytes")
        if not announced.isdigit() or int(announced) > self._max_bytes:
            await _error_response(too_large.status_code, too_large.detail)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise too_large
            return message

        await self._app(scope, counted, send)


def make_app(service: Service, defaults: SearchConfig, server: ServerConfig) -> FastAPI:
    """The application. defaults: what a request does not say."""
    app = FastAPI(title="GLM", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=server.max_body_bytes)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(GLMError, _on_glm_error)
    app.add_exception_handler(StoppedError, _on_stopped)
    app.add_exception_handler(Exception, _on_fault)
    filler = service.filler

    def search_config(body: BaseModel) -> SearchConfig:
        asked = {field.name: getattr(body, field.name) for field in fields(SearchConfig)}
        config = replace(defaults, **{k: v for k, v in asked.items() if v is not None})
        if config.max_new_tokens > server.max_new_tokens:
            raise GLMError(
                f"max_new_tokens {config.max_new_tokens}: at most {server.max_new_tokens} here"
            )
        return config

    def result(search: Search) -> dict[str, Any]:
        return asdict(filler.completion(search))

    @app.post("/generate")
    async def generate(request: Request, body: FillRequest):
        config = search_config(body)
        prompt = filler.codec.encode(body.prompt, body.multitask)
        mailbox = Mailbox()
        number = service.submit(prompt, config, mailbox)
        if body.stream:
            pieces = Pieces(filler.codec, prompt) if config.num_beams == 1 else None
            events = stream(request, mailbox, number, pieces)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            async for news in mailbox.read(request):
                if isinstance(news, Search):
                    return result(news)
        finally:
            service.cancel(number)
        return _error_response(499, "the client is gone")

    async def stream(
        request: Request, mailbox: Mailbox, number: int, pieces: Pieces | None
    ) -> AsyncIterator[str]:
        try:
            async for news in mailbox.read(request):
                is_over = isinstance(news, Search)
                generated = news.best.generated if is_over else news
                for piece in pieces.new(generated, is_over) if pieces else ():
                    yield _event(piece)
                if is_over:
                    yield _event(result(news))
        except Exception as error:
            # The status line is sent already, so an event has to say it.
            yield _event(_error_body(500, str(error)))
        finally:
            service.cancel(number)

    @app.get("/health")
    async def health():
        running, waiting = service.load
        status = "ok" if service.is_running else "stopping"
        content = {"status": status, "running": running, "waiting": waiting}
        return JSONResponse(content, 200 if service.is_running else 503)

    return app


def bind(config: ServerConfig) -> socket.socket:
    """Takes the port, before anything slow is done; nobody can connect until `run_server`.

    GLMError where it cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise GLMError(
            f"--host {config.host} --port {config.port}: cannot be had ({error.strerror}); give "
            "an address of this machine and a free port, 0 for any"
        ) from error
    return bound


def run_server(
    service: Service,
    defaults: SearchConfig,
    config: ServerConfig,
    bound: socket.socket,
    announce=print,
) -> None:
    """Serves until a signal or a fault of the engine, which is raised. bound: see `bind`.
    announce: told where."""
    app = make_app(service, defaults, config)
    options = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=config.grace_s
    )
    server = uvicorn.Server(options)

    def end() -> None:
        server.should_exit = True

    service.stopped = end
    service.start()
    try:
        host, port = bound.getsockname()[:2]
        announce(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}")
        server.run(sockets=[bound])
    finally:
        service.stop()
    if service.error is not None:
        raise service.error


_TYPES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "invalid_request",
    422: "invalid_request",
    503: "unavailable",
}


def _error_body(status: int, message: str) -> dict[str, Any]:
    return {"error": {"type": _TYPES.get(status, "server_error"), "message": message}}


def _error_response(status: int, message: str, **headers: str) -> JSONResponse:
    return JSONResponse(_error_body(status, message), status, headers or None)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    return _error_response(error.status_code, str(error.detail))


def _on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    content_type = request.headers.get("content-type", "")
    if "json" not in content_type:
        return _error_response(415, f"content-type {content_type!r}: must be application/json")
    return _error_response(422, "; ".join(map(_reason, error.errors())))


def _reason(error: dict[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"body: not JSON at character {error['loc'][-1]}: {error['ctx']['error']}"
    return f"{'.'.join(map(str, error['loc'][1:])) or 'body'}: {error['msg']}"


def _on_glm_error(request: Request, error: GLMError) -> JSONResponse:
    if isinstance(error, OverloadedError):
        return _error_response(503, str(error), **{"Retry-After": "1"})
    return _error_response(400, str(error))


def _on_stopped(request: Request, error: StoppedError) -> JSONResponse:
    return _error_response(503, str(error))


def _on_fault(request: Request, error: Exception) -> JSONResponse:
    return _error_response(500, "internal error; the server's log has its cause")
