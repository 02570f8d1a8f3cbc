"""The HTTP side: OpenAI's endpoints over one run, and the chat page."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from data.chat import check_messages, encode_prompt
from model.batching import Row, Sampling
from scripts.serving.answers import Answers, Choice, Shape
from scripts.serving.engine import Engine
from scripts.serving.errors import ApiError, bad_request
from scripts.serving.guard import Guard
from scripts.serving.page import page
from scripts.serving.schema import ChatRequest, CompletionRequest, parse
from scripts.serving.schema import Request as Asked
from scripts.serving.text import Decoder, StopStrings
from train.checkpoint import Run

MOST_CHOICES = 64  # n times prompts, in one request
CLIENT_LEFT = 499  # nginx's number for it; nobody is there to read it


class Server:
    """One run and its engine, asked over HTTP."""

    def __init__(self, run: Run, engine: Engine, name: str) -> None:
        self.run, self.engine, self.name = run, engine, name
        self.is_chat = run.config.data.format == "chat"
        self.context = run.model.config.max_position_embeddings
        self.layers = [layer for layer, _ in run.model.moe_layers()]
        self.created = int((run.checkpoint / "model.safetensors").stat().st_mtime)

    def description(self) -> dict:
        """The model as /v1/models lists it, with what is ours under `minimoe`."""
        config = self.run.model.config
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "minimoe",
            "minimoe": {
                "chat": self.is_chat,
                "step": self.run.step,
                "context": self.context,
                "parameters": sum(p.numel() for p in self.run.model.parameters()),
                "layers": self.layers,
                "experts": config.n_routed_experts if self.layers else 0,
                "experts_per_token": config.num_experts_per_tok if self.layers else 0,
            },
        }

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"model: there is no {name[:80]!r} here; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = parse(await request.body(), ChatRequest)
        self.check_name(asked.model)
        if not self.is_chat:
            message = f"{self.name} was only pretrained and knows no turns: ask it at /v1/completions"
            raise ApiError(400, message, param="model", code="no_chat_model")
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text()}
            for message in asked.messages
        ]
        try:
            check_messages(turns, "messages", for_training=False)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        prompt = await asyncio.to_thread(encode_prompt, self.run.tokenizer, turns)
        return await self._answer(request, asked, [prompt], "messages", asked.reported_logprobs())

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = parse(await request.body(), CompletionRequest)
        self.check_name(asked.model)
        prompts = await asyncio.to_thread(self._prompts, asked.prompt)
        return await self._answer(request, asked, prompts, "prompt", asked.reported_logprobs())

    def _prompts(self, prompt: str | list) -> list[list[int]]:
        """Ids of each prompt: text behind a <|bos|>, ids as they are."""
        prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not prompts or not all(isinstance(p, str) or p for p in prompts):
            raise bad_request("prompt", "is empty: give a text, token ids, or a list of either")
        tokenizer, vocabulary = self.run.tokenizer, self.run.model.config.vocab_size
        ids = [[tokenizer.bos_id, *tokenizer.encode(p)] if isinstance(p, str) else p for p in prompts]
        largest = max(max(p) for p in ids)
        if largest >= vocabulary:
            raise bad_request("prompt", f"token id {largest} is beyond the vocabulary of {vocabulary}")
        return ids

    async def _answer(
        self, request: Request, asked: Asked, prompts: Sequence[list[int]], where: str, logprobs: int | None
    ) -> Response:
        answers = Answers(self.engine, self.run.tokenizer, self._choices(asked, prompts, where, logprobs))
        answers.submit()
        shape = Shape(self.name, self.run.step, answers, self.layers, chat=where == "messages")
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(shape.stream(with_usage), media_type="text/event-stream")
        writing, leaving = asyncio.ensure_future(answers.finished()), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                return Response(status_code=CLIENT_LEFT)
            writing.result()
            return JSONResponse(shape.whole())
        finally:
            writing.cancel()
            leaving.cancel()

    def _choices(self, asked: Asked, prompts: Sequence[list[int]], where: str, logprobs: int | None) -> list[Choice]:
        n = asked.n or 1
        most = min(MOST_CHOICES, self.engine.max_batch + self.engine.max_queue)
        if n * len(prompts) > most:
            raise bad_request("n", f"{n} choices for {len(prompts)} prompts; one request may ask for {most} answers")
        if asked.experts and not self.layers:
            raise bad_request("experts", f"{self.name} is a dense model and has none")
        for prompt in prompts:
            if len(prompt) >= self.context:
                message = (
                    f"This model's maximum context length is {self.context} tokens. However, your {where} resulted in "
                    f"{len(prompt)} tokens, and an answer needs one at least. Please reduce the length of the {where}."
                )
                raise ApiError(400, message, param=where, code="context_length_exceeded")
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        tokenizer = self.run.tokenizer
        choices = []
        for index in range(n * len(prompts)):
            prompt = prompts[index // n]
            sampling = Sampling(
                max_new_tokens=asked.limit() or self.context,
                stop_ids=(tokenizer.im_end_id, tokenizer.eos_id),
                temperature=_or(asked.temperature, 1.0),
                top_k=_or(asked.top_k, 0),
                top_p=_or(asked.top_p, 1.0),
                repetition_penalty=_or(asked.repetition_penalty, 1.0),
                seed=(seed + index % n) % 2**63,
                frequency_penalty=_or(asked.frequency_penalty, 0.0),
                presence_penalty=_or(asked.presence_penalty, 0.0),
                logprobs=logprobs,
                experts=bool(asked.experts),
            )
            before = () if where == "messages" else prompt[-1:]
            choices.append(Choice(index, Row(prompt, sampling), Decoder(tokenizer, before), StopStrings(asked.stops())))
        return choices


def build_app(run: Run, engine: Engine, name: str, *, hosts: Collection[str] | None, api_key: str) -> Guard:
    """The ASGI application; `hosts` and `api_key` as in guard.py. Starts and ends the engine with itself."""
    server = Server(run, engine, name)
    html, policy = page()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()
        engine.join()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> JSONResponse:
        running, waiting = engine.load()
        state = {
            "status": "shutting down" if engine.closed else "ok",
            "model": name,
            "running": running,
            "waiting": waiting,
        }
        return JSONResponse(state, 503 if engine.closed else 200)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [server.description()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict:
        server.check_name(model)
        return server.description()

    app.post("/v1/chat/completions", response_model=None)(server.chat)
    app.post("/v1/completions", response_model=None)(server.complete)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {str(error.detail).lower()}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:  # uvicorn writes the traceback to its log
        return JSONResponse(ApiError(500, "the server made a mistake; its log says more").body, 500)

    return Guard(app, hosts, api_key)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _or(value, default):
    """OpenAI's null is the default; 0 is 0."""
    return default if value is None else value
