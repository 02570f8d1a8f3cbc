"""What may be asked over HTTP and what comes back: answers that are the model's, errors that name the field."""

import asyncio
import json
import threading
import time
from itertools import pairwise

import pytest
import torch

from data.chat import encode_prompt
from model.batching import Batch, Row, Sampling
from model.generate import generate
from scripts.serving import schema
from scripts.serving.answers import Answers, Choice, Shape
from scripts.serving.errors import ApiError
from scripts.serving.guard import LARGEST_BODY
from scripts.serving.schema import ChatRequest, CompletionRequest, parse
from scripts.serving.text import Decoder, StopStrings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Who calls?"}]


def ids_of(run, messages=QUESTION) -> list[int]:
    return encode_prompt(run.tokenizer, messages)


def expected(run, prompt: list[int], n: int, **options) -> list[int]:
    stops = (run.tokenizer.im_end_id, run.tokenizer.eos_id)
    return generate(run.model, [prompt], max_new_tokens=n, stop_ids=stops, **options)[0]


def chunks(response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refused(response, status: int, param: str | None, code: str | None = None) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert error["message"] and "\n" not in error["message"]
    return error["message"]


def test_an_answer_is_the_models(serve):
    client, run, _ = serve()
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    said = expected(run, ids_of(run), 20, **options)
    body = {"model": "random", "messages": QUESTION, "max_completion_tokens": 20, **options}
    answer = client.post(CHAT, json=body).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": run.tokenizer.decode(said), "refusal": None}
    assert choice["finish_reason"] == "length" and answer["object"] == "chat.completion"
    n = len(ids_of(run))
    assert answer["usage"] == {"prompt_tokens": n, "completion_tokens": 20, "total_tokens": n + 20}

    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who calls?"}]},
    ]
    answer = client.post(CHAT, json={**body, "messages": parts}).json()
    prompt = ids_of(run, [{"role": "system", "content": "Be brief."}, *QUESTION])
    assert answer["choices"][0]["message"]["content"] == run.tokenizer.decode(expected(run, prompt, 20, **options))


def test_a_completion_continues_texts_and_ids(serve):
    client, run, _ = serve(format="text")
    bos, encode = run.tokenizer.bos_id, run.tokenizer.encode
    for prompt, all_ids in (
        ("The class", [[bos, *encode("The class")]]),
        ("", [[bos]]),
        (["The class", "A list"], [[bos, *encode("The class")], [bos, *encode("A list")]]),
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7, 8, 9], [5]], [[7, 8, 9], [5]]),
    ):
        body = {"prompt": prompt, "max_tokens": 12, "seed": 1, "n": 2}
        answer = client.post(TEXT, json=body).json()
        wanted = [run.tokenizer.decode(expected(run, ids, 12, seed=seed)) for ids in all_ids for seed in (1, 2)]
        texts = [choice["text"] for choice in answer["choices"]]
        assert [text.strip() for text in texts] == [text.strip() for text in wanted], prompt
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(wanted)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, all_ids)), "choices share their prompt"
    assert client.get("/v1/models").json()["data"][0]["minimoe"]["chat"] is False
    assert "/v1/completions" in refused(client.post(CHAT, json={"messages": QUESTION}), 400, "model", "no_chat_model")


def test_a_stream_is_the_answer_in_pieces(serve):
    client, run, _ = serve()
    for extra in ({}, {"experts": True}, {"stop": ["e", "zz"]}, {"n": 3}):
        body = {"messages": QUESTION, "max_tokens": 30, "seed": 5, **extra}
        whole = client.post(CHAT, json=body).json()
        streamed = chunks(client.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}))
        assert {chunk["object"] for chunk in streamed} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in streamed}) == 1
        assert streamed[-1]["usage"] == whole["usage"] and streamed[-1]["choices"] == []
        assert all(chunk["usage"] is None for chunk in streamed[:-1])
        for choice in whole["choices"]:
            mine = [c for chunk in streamed for c in chunk["choices"] if c["index"] == choice["index"]]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(c["delta"].get("content", "") for c in mine)
            assert text == choice["message"]["content"]
            assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if extra.get("experts"):
            told = [
                token for chunk in streamed if "minimoe" in chunk for token in chunk["minimoe"]["choices"][0]["tokens"]
            ]
            assert told == whole["minimoe"]["choices"][0]["tokens"] and len(told) == 30
    plain = chunks(client.post(CHAT, json={"messages": QUESTION, "max_tokens": 5, "stream": True}))
    assert "usage" not in plain[-1] and plain[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_ends_the_answer_across_tokens(serve, monkeypatch):
    client, run, engine = serve()
    free = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 60, "seed": 2}).json()["choices"][0]["message"][
        "content"
    ]
    said = expected(run, ids_of(run), 60, seed=2)
    ends = [len(run.tokenizer.decode(said[:i])) for i in range(1, len(said))]
    end = next(b for a, b in pairwise(ends) if b > a + 1 and free[b - 2 : b + 1].isascii())
    stop = free[end - 1 : end + 1]  # the last character of one token and the first of the next
    for stops in (stop, ["never said", stop]):
        answer = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 60, "seed": 2, "stop": stops}).json()
        choice = answer["choices"][0]
        assert choice["message"]["content"] == free[: free.index(stop)] and choice["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] < 60
    left, abandon = [], engine.abandon
    monkeypatch.setattr(engine, "abandon", lambda rows: left.append(len(rows)) or abandon(rows))
    client.post(CHAT, json={"messages": QUESTION, "max_tokens": 60, "seed": 2, "stop": stop, "n": 2})
    assert left[0] == 1, "it leaves the batch there and then, whatever the others do"


def test_experts_are_told_beside_the_answer(serve):
    client, run, _ = serve(n_routed_experts=6, first_k_dense_replace=1)
    answer = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 10, "temperature": 0, "experts": True}).json()
    said = expected(run, ids_of(run), 10, temperature=0)
    with torch.no_grad():
        _, routings = run.model._hidden_states(torch.tensor([[*ids_of(run), *said]]), None, None, None, None)
    read = torch.stack([routing.topk_idx[0, -len(said) :] for _, routing in routings], dim=1).tolist()
    told = answer["minimoe"]["choices"][0]["tokens"]
    assert answer["minimoe"]["layers"] == [1, 2]
    assert [token["id"] for token in told] == said and [token["experts"] for token in told] == read
    assert "".join(token["text"] for token in told) == answer["choices"][0]["message"]["content"]
    plain = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 10, "temperature": 0}).json()
    assert "minimoe" not in plain and plain["choices"] == answer["choices"]


def test_a_dense_model_has_no_experts(serve):
    client, _, _ = serve(n_routed_experts=0)
    assert "dense" in refused(client.post(CHAT, json={"messages": QUESTION, "experts": True}), 400, "experts")
    assert client.post(CHAT, json={"messages": QUESTION, "max_tokens": 3}).status_code == 200


def test_logprobs_of_both_endpoints(serve):
    client, run, _ = serve()
    body = {"messages": QUESTION, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = client.post(CHAT, json=body).json()["choices"][0]
    said = expected(run, ids_of(run), 8, temperature=0)
    with torch.no_grad():
        logits = run.model(torch.tensor([[*ids_of(run), *said]])).logits[0, len(ids_of(run)) - 1 : -1]
    for token, entry, logprobs in zip(said, choice["logprobs"]["content"], logits.log_softmax(-1), strict=True):
        assert entry["token"] == run.tokenizer.decode([token], skip_special_tokens=False)
        assert entry["logprob"] == pytest.approx(float(logprobs[token]), abs=1e-4)
        assert len(entry["top_logprobs"]) == 3 and entry["top_logprobs"][0]["token"] == entry["token"], (
            "greedy: the likeliest"
        )
        assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]

    answer = client.post(TEXT, json={"prompt": "The class", "max_tokens": 20, "logprobs": 2, "seed": 1}).json()[
        "choices"
    ][0]
    told = answer["logprobs"]
    assert (
        len(told["tokens"])
        == len(told["token_logprobs"])
        == len(told["top_logprobs"])
        == len(told["text_offset"])
        == 20
    )
    for name, (start, end) in zip(told["tokens"], pairwise([*told["text_offset"], len(answer["text"])])):
        assert "\ufffd" in name or "<|" in name or answer["text"][start:end].endswith(name)
    streamed = chunks(
        client.post(TEXT, json={"prompt": "The class", "max_tokens": 20, "logprobs": 2, "seed": 1, "stream": True})
    )
    offsets = [at for chunk in streamed for at in (chunk["choices"][0]["logprobs"] or {}).get("text_offset", [])]
    assert offsets == told["text_offset"]
    none = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 2}).json()["choices"][0]
    assert none["logprobs"] is None


def test_what_asks_for_nothing_is_taken(serve):
    client, _, _ = serve()
    body = {
        "messages": QUESTION, "max_tokens": 2, "tools": [], "tool_choice": "none", "logit_bias": {}, "response_format": {"type": "text"},
        "user": "someone", "metadata": {"a": "b"}, "stop": None, "temperature": None, "n": None, "store": False, "stream": False,
        "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "anything_at_all": None,
    }  # fmt: skip
    assert client.post(CHAT, json=body).status_code == 200
    assert (
        client.post(
            TEXT, json={"prompt": "a", "max_tokens": 2, "echo": False, "best_of": 1, "suffix": None}
        ).status_code
        == 200
    )


BAD_CHAT = {
    "temperature": [-0.1, 2.1, "hot", True], "top_p": [0, 1.5], "n": [0, 1.5, 1000], "max_tokens": [0, -5, "5"], "seed": [2**63, 0.5],
    "stop": ["", ["a"] * 5, [""], 7, "x" * 300], "stream": ["yes", 1], "top_k": [-1], "repetition_penalty": [0, 1e-30], "model": [5],
    "frequency_penalty": [3], "presence_penalty": [-3], "top_logprobs": [21, 5], "messages": [[], "hello", None], "experts": ["all"],
    "tools": [[{"type": "function"}]], "response_format": [{"type": "json_object"}], "logit_bias": [{"5": 1}], "best_of": [2],
    "stream_options": [{"include_usage": True}, 5], "tempurature": [1], "store": [True], "service_tier": ["flex"],
}  # fmt: skip


def test_every_bad_field_is_named(serve):
    client, _, _ = serve()
    for name, values in BAD_CHAT.items():
        for value in values:
            response = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 1, name: value})
            message = refused(response, 400, "stop[0]" if value == [""] else name)
            assert message.startswith(name), f"{name}={value!r}: {message}"
    for messages, param in (
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "messages"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages"),
        ([{"role": "assistant", "content": "b"}], "messages"),
    ):
        refused(client.post(CHAT, json={"messages": messages}), 400, param)
    for name, value in {
        "prompt": 5,
        "echo": True,
        "suffix": "x",
        "logprobs": 6,
        "max_completion_tokens": 5,
        "messages": [],
    }.items():
        refused(client.post(TEXT, json={"prompt": "a", "max_tokens": 1, name: value}), 400, name)
    for prompt in ([], [[]], ["a", []], [-1], [1.5], [512], [["a"]]):
        assert client.post(TEXT, json={"prompt": prompt}).json()["error"]["param"].startswith("prompt")
    for body in (b"", b"{", b"[]", b"5", b'"\xff"', b'{"messages": NaN}', b"[" * 20000, b'{"prompt": "\\ud800"}'):
        response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"], body[:20]
    assert client.get("/health").json() == {"status": "ok", "model": "random", "running": 0, "waiting": 0}


def test_of_a_million_mistakes_the_first_is_told(monkeypatch):
    """Gathered one by one they took 10 s, in which nobody else was answered, and 1 GiB."""
    gathered, named = [], schema._named
    monkeypatch.setattr(schema, "_named", lambda error: gathered.append(error.error_count()) or named(error))
    for what, kind in (
        ('"prompt": [%s]', CompletionRequest),
        ('"prompt": [[%s]]', CompletionRequest),
        ('"messages": [%s]', ChatRequest),
        ('"messages": [{"role": "user", "content": [%s]}]', ChatRequest),
        ('"messages": [], "stop": [%s]', ChatRequest),
    ):
        body = "{%s}" % (what % ", ".join(["1.5"] * 1000))
        with pytest.raises(ApiError):
            parse(body.encode(), kind)
        assert gathered.pop() < 10, what


def test_extreme_options_draw_a_token(serve):
    client, run, _ = serve()
    body = {"messages": QUESTION, "max_tokens": 6}
    best = client.post(CHAT, json={**body, "temperature": 0}).json()["choices"]
    for extreme in ({"temperature": 1e-300}, {"temperature": 1e-40}, {"top_p": 1e-300}, {"temperature": 1e-5}):
        assert client.post(CHAT, json={**body, **extreme}).json()["choices"] == best, extreme
    for extreme in (
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100},
        {"frequency_penalty": -2, "temperature": 2},
    ):
        assert client.post(CHAT, json={**body, **extreme}).status_code == 200, extreme


def test_a_stream_that_is_left_at_its_first_chunk_frees_its_place(serve):
    """Nothing of the answer was waited for yet: the role comes first."""
    _, run, engine = serve()

    async def leave() -> Row:
        row = Row(ids_of(run), Sampling(100))
        answers = Answers(engine, run.tokenizer, [Choice(0, row, Decoder(run.tokenizer), StopStrings(()))])
        answers.submit()
        stream = Shape("random", 0, answers, [], chat=True).stream(False)
        assert b"assistant" in await anext(stream)
        await stream.aclose()
        return row

    row = asyncio.run(leave())
    assert row not in engine._listeners


def test_what_does_not_fit_the_context_is_said_in_openais_words(serve):
    client, run, _ = serve()
    long = [{"role": "user", "content": "word " * 300}]
    message = refused(client.post(CHAT, json={"messages": long}), 400, "messages", "context_length_exceeded")
    assert "maximum context length is 128 tokens" in message and f"{len(ids_of(run, long))} tokens" in message
    refused(client.post(TEXT, json={"prompt": [5] * 128}), 400, "prompt", "context_length_exceeded")
    last = client.post(TEXT, json={"prompt": [5] * 127, "max_tokens": 50, "temperature": 0}).json()
    assert last["choices"][0]["finish_reason"] == "length" and last["usage"]["completion_tokens"] == 1


def test_a_full_queue_is_429_and_an_end_503(serve, monkeypatch):
    client, _, engine = serve(max_batch=1, max_queue=1)
    hold, step = threading.Event(), Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: hold.wait(30) and step(batch))
    for _ in range(2):  # one is answered, one waits
        engine.submit([Row([5], Sampling(3))], lambda event: None)
        while engine.load()[0] < 1:
            time.sleep(0.01)
    response = client.post(CHAT, json={"messages": QUESTION})
    refused(response, 429, None, "queue_full")
    assert int(response.headers["retry-after"]) > 0
    hold.set()
    engine.stop()
    engine.join()
    refused(client.post(CHAT, json={"messages": QUESTION}), 503, None, "shutting_down")
    assert client.get("/health").status_code == 503


def test_an_accident_is_500_and_no_secret(serve, monkeypatch, capfd):
    client, _, _ = serve()
    monkeypatch.setattr(Batch, "join", lambda batch, row: 1 / 0)
    message = refused(client.post(CHAT, json={"messages": QUESTION}), 500, None)
    assert "Traceback" not in message and "/" not in message
    streamed = client.post(CHAT, json={"messages": QUESTION, "stream": True}).text.strip().split("\n\n")
    assert "error" in json.loads(streamed[-1].removeprefix("data: "))


def test_models_and_paths(serve):
    client, run, _ = serve()
    listed = client.get("/v1/models").json()
    facts = listed["data"][0]
    assert listed["object"] == "list" and facts["id"] == "random" and facts["object"] == "model"
    assert facts["minimoe"]["layers"] == [0, 1, 2] and facts["minimoe"]["context"] == 128
    assert client.get("/v1/models/random").json() == facts
    refused(client.get("/v1/models/another/one"), 404, "model", "model_not_found")
    refused(client.post(CHAT, json={"model": "gpt-5", "messages": QUESTION}), 404, "model", "model_not_found")
    refused(client.get("/v1/embeddings"), 404, None)
    refused(client.get(CHAT), 405, None)
    refused(client.get("/docs"), 404, None)


def test_a_key_is_asked_for_where_there_is_one(serve):
    client, _, _ = serve(api_key="s3cret")
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic s3cret"},
        {"Authorization": "s3cret"},
    ):
        message = refused(client.post(CHAT, json={"messages": QUESTION}, headers=headers), 401, None, "invalid_api_key")
        assert "s3cret" not in message
        refused(client.get("/v1/models", headers=headers), 401, None)
    right = {"Authorization": "Bearer s3cret"}
    assert client.post(CHAT, json={"messages": QUESTION, "max_tokens": 1}, headers=right).status_code == 200
    assert client.get("/").status_code == client.get("/health").status_code == 200


def test_a_page_of_another_origin_gets_nowhere(serve):
    client, _, _ = serve(hosts={"localhost", "127.0.0.1", "::1"})
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/health", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "[::2]"):
        refused(client.get("/v1/models", headers={"Host": host}), 403, None, "wrong_host")
    local = {"Host": "localhost"}
    form = {"Content-Type": "text/plain", **local}
    refused(client.post(CHAT, content=json.dumps({"messages": QUESTION}), headers=form), 415, None)
    allowed = client.options(
        CHAT, headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST", **local}
    )
    assert allowed.status_code == 405 and not [name for name in allowed.headers if name.startswith("access-control")]
    answer = client.get("/v1/models", headers={"Origin": "http://evil.example", **local})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_body_has_a_limit_whatever_it_claims(serve):
    client, _, _ = serve()
    headers = {"Content-Type": "application/json"}
    large = b" " * (LARGEST_BODY + 1)
    refused(client.post(CHAT, content=large, headers=headers), 413, None, "body_too_large")

    def pieces():
        for _ in range(20):
            yield b" " * (LARGEST_BODY // 10)

    answer = client.post(CHAT, content=pieces(), headers=headers)
    refused(answer, 413, None, "body_too_large")
    assert answer.headers["connection"] == "close", "and the rest stays unread"
    refused(client.post(CHAT, content=b"{}", headers={**headers, "Content-Length": "-1"}), 413, None)


def test_the_page_holds_everything_and_may_load_nothing(serve):
    client, _, _ = serve()
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", ""), "no address but the icon's namespace"
    assert "innerHTML" not in answer.text and "{{" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
