"""The real process: with OpenAI's own client, several at once, clients that leave, and the end by Ctrl-C."""

import json
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI, RateLimitError

from data.chat import encode_prompt
from model.generate import generate
from train.checkpoint import open_run

QUESTION = [{"role": "user", "content": "2 + 3 = ?"}]


def client_of(server, key="none", **options) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60, **options)


def load_of(server) -> tuple[int, int]:
    with urllib.request.urlopen(f"{server.url}/health", timeout=20) as answer:
        state = json.load(answer)
    return state["running"], state["waiting"]


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.05)


@pytest.mark.slow
def test_openais_client_talks_to_a_trained_run(trained, started):
    run = open_run(trained.chat, device="cpu")
    stops = (run.tokenizer.im_end_id, run.tokenizer.eos_id)

    def ours(question: str, **options) -> str:
        prompt = encode_prompt(run.tokenizer, [{"role": "user", "content": question}])
        return run.tokenizer.decode(generate(run.model, [prompt], max_new_tokens=40, stop_ids=stops, **options)[0])

    with started(trained.chat) as server:
        client = client_of(server)
        name = client.models.list().data[0].id
        assert name == "chat" and client.models.retrieve(name).owned_by == "minimoe"
        answer = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_completion_tokens=40)
        assert answer.choices[0].message.content == ours("2 + 3 = ?", temperature=0)
        assert "2 + 3 =" in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"

        options = {"temperature": 0.8, "seed": 4, "top_p": 0.95}
        questions = [f"{a} + {b} = ?" for a in range(4) for b in range(4)]

        def ask(question: str) -> str:
            asked = [{"role": "user", "content": question}]
            pieces = client.chat.completions.create(
                model=name, messages=asked, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}, **options
            )  # fmt: skip
            *chunks, last = pieces
            assert last.usage.completion_tokens > 0 and not last.choices
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(16) as people:
            together = list(people.map(ask, questions))
        assert together == [ours(question, **options) for question in questions], "company changes no answer"
        assert len(set(together)) > 8

        extra = client.chat.completions.create(
            model=name, messages=QUESTION, max_tokens=5, extra_body={"experts": True, "top_k": 3}
        )
        assert extra.model_extra["minimoe"]["choices"][0]["tokens"][0]["experts"]
        text = client.completions.create(model=name, prompt="2 + ", max_tokens=5, n=2, logprobs=2)
        assert len(text.choices) == 2 and len(text.choices[0].logprobs.tokens) == 5
        with pytest.raises(NotFoundError, match="there is no 'gpt-5'"):
            client.chat.completions.create(model="gpt-5", messages=QUESTION)
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(model=name, messages=QUESTION, temperature=3)
        assert caught.value.param == "temperature"
        with pytest.raises(BadRequestError, match="maximum context length is 128") as caught:
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "a " * 500}])
        assert caught.value.code == "context_length_exceeded"


@pytest.fixture
def endless(random_run):
    """A run that goes on talking for seconds: a long context and greedy answers that hardly ever end."""
    return random_run(format="text", max_position_embeddings=4096, hidden_size=64, n_routed_experts=8)


ENDLESS = {"prompt": "The class", "max_tokens": 4000, "temperature": 0, "logprobs": 0}


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_place_and_a_key_is_needed(endless, started):
    options = ("--max-batch", "2", "--max-queue", "1", "--api-key-env", "KEY_OF_TEST", "--model-name", "house/model")
    with started(endless, *options, environment={"KEY_OF_TEST": "s3cret"}) as server:
        assert server.url.startswith("http://127.0.0.1:"), "this machine alone, unless told otherwise"
        assert not any("warning" in line or "s3cret" in line for line in server.words)
        with pytest.raises(AuthenticationError):
            client_of(server, "wrong").models.list()
        client = client_of(server, "s3cret")
        assert client.models.retrieve("house/model").id == "house/model"
        connection = HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/v1/models", headers={"Host": "evil.example", "Authorization": "Bearer s3cret"})
        assert connection.getresponse().status == 403
        connection.close()

        stream = client.completions.create(model="house/model", stream=True, **ENDLESS)
        next(iter(stream))

        impatient = socket.create_connection(("127.0.0.1", server.port))  # waits for a whole answer
        body = json.dumps(ENDLESS).encode()
        head = (
            "POST /v1/completions HTTP/1.1",
            "Host: localhost",
            "Authorization: Bearer s3cret",
            "Content-Type: application/json",
        )
        impatient.sendall("\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode() + body)
        wait_for(lambda: load_of(server) == (2, 0))

        waiting = threading.Thread(
            target=lambda: client.completions.create(model="house/model", prompt="a", max_tokens=3)
        )
        waiting.start()
        wait_for(lambda: load_of(server) == (2, 1))
        with pytest.raises(RateLimitError) as caught:
            client.completions.create(model="house/model", prompt="a", max_tokens=3)
        assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) > 0

        stream.close()
        impatient.close()
        halfway = socket.create_connection(("127.0.0.1", server.port))  # leaves in the middle of what it asks
        halfway.sendall("\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode() + body[:9])
        halfway.close()
        waiting.join(timeout=20)
        assert not waiting.is_alive(), "who waited got a place"
        wait_for(lambda: load_of(server) == (0, 0))
        server.process.terminate()
        assert server.process.wait(timeout=20) == 0
        assert "Traceback" not in server.process.stderr.read(), "clients may leave as they like"


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_and_whoever_waits_is_told(endless, started):
    with started(endless, "--max-batch", "2") as server:
        told = []

        def listen(stream: bool) -> None:
            try:
                answer = client_of(server).completions.create(model="random", stream=stream, **ENDLESS)
                for _ in answer if stream else ():
                    pass
                told.append("whole")
            except Exception as error:
                told.append(getattr(error, "status_code", None) or str(error))

        people = [threading.Thread(target=listen, args=(stream,)) for stream in (True, False, True)]
        for person in people:
            person.start()
        wait_for(lambda: load_of(server) == (2, 1))
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        server.process.send_signal(signal.SIGINT)  # an impatient person's second one changes nothing
        assert server.process.wait(timeout=15) == 0 and time.monotonic() - start < 5
        for person in people:
            person.join(timeout=10)
        assert sorted(map(str, told)) == ["503", "the server is shutting down", "the server is shutting down"]
        words = server.process.stderr.read()
        assert words.splitlines()[-1] == "ended" and "Traceback" not in words, words
