"""The HTTP application: OpenAI's routes, what operators read, and the page."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foregate import __version__
from foregate.config import ServeConfig
from foregate.serve.batcher import Batcher, Overloaded
from foregate.serve.errors import ApiError, handle_errors
from foregate.serve.guard import Guard, Rules
from foregate.serve.prompts import Encoder
from foregate.serve.residency import Residency
from foregate.serve.sampling import Sampling
from foregate.serve.schemas import MAX_COMPLETION_TOKENS, ChatRequest, CompletionRequest, GenerationRequest
from foregate.serve.sequence import Order
from foregate.serve.shapes import Answer, ChatAnswer, CompletionAnswer
from foregate.serve.streaming import ClientLeft, EventStream, Replies, unless_client_leaves
from foregate.serve.template import PLAIN_STOPS

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"description": "An error in OpenAI's shape"}}


@dataclass
class Service:
    """One model being served."""

    name: str
    model: PreTrainedModel
    encoder: Encoder
    batcher: Batcher
    residency: Residency

    @classmethod
    def start(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        context: int = ServeConfig.context,
        max_running: int = ServeConfig.max_running,
        max_waiting: int = ServeConfig.max_waiting,
        prompt_chunk: int = ServeConfig.prompt_chunk,
    ) -> "Service":
        """Start serving a model loaded by `foregate.load`. The model then belongs to the batcher's thread."""
        text_config = model.config.get_text_config()
        context = min(context, getattr(text_config, "max_position_embeddings", None) or context)
        encoder = Encoder(tokenizer, text_config.vocab_size, context)
        batcher = Batcher(model, tokenizer, max_running=max_running, max_waiting=max_waiting, prompt_chunk=prompt_chunk)
        batcher.metrics.watch(model.foregate, batcher.load)
        return cls(name, model, encoder, batcher, Residency(model))

    def close(self) -> None:
        """End the batcher and the engine's threads."""
        self.batcher.close()
        self.model.foregate.close()

    def check_name(self, name: str | None) -> None:
        """Raise ApiError when a request names another model."""
        if name not in (None, self.name):
            raise ApiError(
                404,
                f"no model {name!r} here: this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def sampling(self, body: GenerationRequest, choice: int) -> Sampling:
        """How a request's choice of this number is sampled: each with a seed of its own."""
        seed = None if body.seed is None else (body.seed + choice) % 2**63
        return Sampling.of_request(self.model.generation_config, body.temperature, body.top_p, seed)

    @contextlib.asynccontextmanager
    async def places(self, count: int) -> AsyncIterator[Callable[[list[Order]], Replies]]:
        """Reserved places for `count` orders, and what to submit them with. Raises ApiError when there is no room."""
        if count > self.batcher.places:
            raise ApiError(400, f"{count} replies at once, and this server has {self.batcher.places} places", param="n")
        try:
            self.batcher.reserve(count)
        except Overloaded:
            raise ApiError(
                429,
                "every place in the queue is taken: try again in a moment",
                code="overloaded",
                headers={"Retry-After": str(ServeConfig.retry_after_seconds)},
            ) from None
        unused = count

        def submit(orders: list[Order]) -> Replies:
            nonlocal unused
            unused = 0
            return Replies(self.batcher, orders)

        try:
            yield submit
        finally:
            self.batcher.release(unused)


def create_app(service: Service, rules: Rules) -> FastAPI:
    """The application. It closes the service when the server shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Foregate", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, rules=rules, metrics=service.batcher.metrics)
    handle_errors(app)
    _add_openai_routes(app, service)
    _add_operator_routes(app, service)
    _add_page(app)
    return app


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "foregate"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def one_model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return model

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_name(body.model)
        count = body.n or 1
        async with service.places(count) as submit:
            prompt = await asyncio.to_thread(service.encoder.chat, body)
            stops = body.stops if service.encoder.has_template else (*body.stops, *PLAIN_STOPS)
            wanted = body.max_completion_tokens or body.max_tokens
            orders = [
                Order(
                    prompt=tuple(prompt),
                    max_tokens=service.encoder.room(prompt, wanted),
                    sampling=service.sampling(body, choice),
                    stops=stops,
                    logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                )
                for choice in range(count)
            ]
            answer = ChatAnswer(service.name, count, len(prompt), bool(body.logprobs))
            return await _respond(request, body, answer, submit(orders))

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_name(body.model)
        each, count = body.n or 1, len(body.prompts) * (body.n or 1)
        wanted = MAX_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        async with service.places(count) as submit:
            prompts = await asyncio.to_thread(service.encoder.prompts, body)
            orders = [
                Order(
                    prompt=tuple(prompt),
                    max_tokens=service.encoder.room(prompt, wanted),
                    sampling=service.sampling(body, choice),
                    stops=body.stops,
                    logprobs=body.logprobs,
                    prompt_logprobs=bool(body.echo and body.logprobs is not None),
                )
                for prompt in prompts
                for choice in range(each)
            ]
            echoes = [_echo(service, body, order) for order in orders]
            total = sum(map(len, prompts))
            answer = CompletionAnswer(service.name, count, total, body.logprobs is not None, echoes)
            return await _respond(request, body, answer, submit(orders))


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    batcher, engine = service.batcher, service.model.foregate

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **batcher.load()}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(batcher.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/experts")
    async def experts() -> dict[str, Any]:
        return {
            "object": "experts",
            "model": service.name,
            "slots": engine.budget.slots,
            "layers": service.residency.snapshot(),
            "totals": asdict(engine.recorder.totals()),
            "tokens_per_second": batcher.metrics.tokens_per_second,
            **batcher.load(),
        }


def _add_page(app: FastAPI) -> None:
    class PageFiles(StaticFiles):
        def file_response(self, *args: Any, **kwargs: Any) -> Response:
            response = super().file_response(*args, **kwargs)
            response.headers.update(PAGE_HEADERS)
            return response

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    app.mount("/page", PageFiles(directory=PAGE), name="page")


async def _respond(request: Request, body: GenerationRequest, answer: Answer, replies: Replies) -> Response:
    if body.stream:
        return EventStream(answer.chunks(replies, body.wants_usage_chunk), replies.cancel)
    try:
        return JSONResponse(await unless_client_leaves(request.receive, answer.whole(replies)))
    except ClientLeft:
        return Response(status_code=499)  # nobody reads it; the number is what logs know
    finally:
        replies.cancel()


def _echo(service: Service, body: CompletionRequest, order: Order) -> str:
    return service.encoder.tokenizer.decode(order.prompt, skip_special_tokens=True) if body.echo else ""
