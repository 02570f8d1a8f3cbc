"""From a batch's events to OpenAI's answers, whole or chunk by chunk."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from data.tokenizer import Tokenizer
from model.batching import Event, Row, Token
from scripts.serving.engine import SHUTTING_DOWN, Closed, Engine, QueueFull
from scripts.serving.errors import ApiError
from scripts.serving.text import Decoder, Piece, StopStrings

RETRY_AFTER = 2  # seconds, told to whom the queue is full for


@dataclass
class Choice:
    """One of a request's answers while it is written."""

    index: int
    row: Row
    decoder: Decoder
    stops: StopStrings
    finish: str | None = None  # stop or length
    n_tokens: int = 0
    n_characters: int = 0  # given so far
    pieces: list[Piece] = field(default_factory=list)  # for an answer in one piece

    def take(self, event: Event) -> list[Piece]:
        """What may be given on after this event; sets `finish`."""
        pieces = []
        if event.token is not None:
            self.n_tokens += 1
            pieces = self.stops.push(Piece(event.token, self.decoder.push(event.token.id)))
        if event.finish is not None and not self.stops.stopped:
            pieces += self.stops.push(Piece(None, self.decoder.rest()))
            pieces += self.stops.rest()
            self.finish = event.finish
        if self.stops.stopped:
            self.finish = "stop"
        return pieces


class Answers:
    """The choices of one request, and what the engine says of them."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, choices: Sequence[Choice]) -> None:
        self.engine, self.tokenizer, self.choices = engine, tokenizer, choices
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def submit(self) -> None:
        """Raises ApiError 429 or 503."""
        loop = asyncio.get_running_loop()
        try:
            self.engine.submit(
                [choice.row for choice in self.choices],
                lambda event: loop.call_soon_threadsafe(self._events.put_nowait, event),
            )
        except QueueFull as error:
            headers = {"Retry-After": str(RETRY_AFTER)}
            raise ApiError(429, str(error), code="queue_full", headers=headers) from None
        except Closed as error:
            raise ApiError(503, str(error), code="shutting_down") from None

    async def pieces(self) -> AsyncIterator[tuple[Choice, list[Piece]]]:
        """Pieces as they come, until every choice has its `finish`. Raises ApiError where the engine failed.

        Left early, or at an error, it takes the rows that still run out of the batch.
        """
        by_row = {choice.row: choice for choice in self.choices}
        try:
            while any(choice.finish is None for choice in self.choices):
                event = await self._events.get()
                choice = by_row[event.row]
                if choice.finish is not None:
                    continue  # a step that was under way when the stop string was found
                if event.finish == "error":
                    closing = event.error == SHUTTING_DOWN
                    raise ApiError(503 if closing else 500, event.error, code="shutting_down" if closing else None)
                pieces = choice.take(event)
                if choice.finish is not None:
                    self.engine.abandon([choice.row])
                if pieces or choice.finish:
                    yield choice, pieces
        finally:
            self.leave()

    def leave(self) -> None:
        """Nobody waits any more: the rows that still run or wait are taken out."""
        self.engine.abandon([choice.row for choice in self.choices])

    async def finished(self) -> None:
        """Waits for all of it; the choices then hold it."""
        async for choice, pieces in self.pieces():
            choice.pieces += pieces


class Shape:
    """How an answer looks: ids, names, and what was asked to be reported with it."""

    def __init__(self, model: str, step: int, answers: Answers, layers: Sequence[int], chat: bool) -> None:
        self.answers, self.layers, self.chat = answers, layers, chat
        sampling = answers.choices[0].row.sampling
        self.reports_logprobs, self.reports_experts = sampling.logprobs is not None, sampling.experts
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"step-{step}",
        }

    def usage(self) -> dict:
        """OpenAI's usage object: tokens of the prompt and of the answer."""
        prompts = {
            id(choice.row.prompt): len(choice.row.prompt) for choice in self.answers.choices
        }  # n choices share one
        read, said = sum(prompts.values()), sum(choice.n_tokens for choice in self.answers.choices)
        return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}

    def whole(self) -> dict:
        """The body of an answer that is not streamed."""
        choices = []
        for choice in self.answers.choices:
            text = "".join(piece.text for piece in choice.pieces)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append(self._choice(choice, choice.pieces, said))
        return {
            **self.head,
            "choices": choices,
            "usage": self.usage(),
            **self._experts([(choice, choice.pieces) for choice in self.answers.choices]),
        }

    async def stream(self, with_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events, the last of them [DONE]; an error on the way is one of them."""
        head = {**self.head, **({"object": "chat.completion.chunk"} if self.chat else {})}
        no_usage = {"usage": None} if with_usage else {}
        try:
            if self.chat:
                for choice in self.answers.choices:
                    first = {"delta": {"role": "assistant", "content": ""}}
                    yield _event({**head, "choices": [self._choice(choice, [], first, closing=False)], **no_usage})
            async for choice, pieces in self.answers.pieces():
                text = "".join(piece.text for piece in pieces)
                if pieces:
                    said = {"delta": {"content": text}} if self.chat else {"text": text}
                    content = self._choice(choice, pieces, said, closing=False)
                    yield _event({**head, "choices": [content], **no_usage, **self._experts([(choice, pieces)])})
                if choice.finish is not None:
                    last = self._choice(choice, [], {"delta": {}} if self.chat else {"text": ""})
                    yield _event({**head, "choices": [last], **no_usage})
            if with_usage:
                yield _event({**head, "choices": [], "usage": self.usage()})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        finally:  # a client may leave before `pieces` has begun
            self.answers.leave()

    def _choice(self, choice: Choice, pieces: Sequence[Piece], said: dict, closing: bool = True) -> dict:
        logprobs = self._logprobs(choice, pieces) if self.reports_logprobs and (pieces or closing) else None
        choice.n_characters += sum(len(piece.text) for piece in pieces)
        finish = choice.finish if closing else None
        return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, choice: Choice, pieces: Sequence[Piece]) -> dict:
        if self.chat:
            tokens = [piece.token for piece in pieces if piece.token is not None]
            return {
                "content": [
                    {**self._logprob(t.id, t.logprob), "top_logprobs": [self._logprob(*best) for best in t.likeliest]}
                    for t in tokens
                ],
                "refusal": None,
            }
        tokens, offsets, at = [], [], choice.n_characters
        for piece in pieces:
            if piece.token is not None:
                tokens.append(piece.token)
                offsets.append(at)
            at += len(piece.text)
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._name(best): logprob for best, logprob in token.likeliest} for token in tokens],
            "text_offset": offsets,
        }

    def _logprob(self, token_id: int, logprob: float) -> dict:
        name = self._name(token_id)
        whole = "\ufffd" not in name  # else a part of a character, whose bytes the tokenizer does not tell
        return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if whole else None}

    def _name(self, token_id: int) -> str:
        return self.answers.tokenizer.decode([token_id], skip_special_tokens=False)

    def _experts(self, said: Sequence[tuple[Choice, Sequence[Piece]]]) -> dict:
        """OpenAI's answer has no place for experts: they stand beside it, under `minimoe`."""
        if not self.reports_experts:
            return {}
        choices = [
            {"index": choice.index, "tokens": [_told(piece.token, piece.text) for piece in pieces if piece.token]}
            for choice, pieces in said
        ]
        return {"minimoe": {"layers": list(self.layers), "choices": choices}}


def _told(token: Token, text: str) -> dict:
    return {"id": token.id, "text": text, "experts": token.experts}


def _event(content: dict) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
