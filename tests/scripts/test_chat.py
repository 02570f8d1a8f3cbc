import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.chat import encode_prompt
from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from scripts import chat
from scripts.chat import Options, Session, decode_stream
from train import checkpoint, cli
from train.checkpoint import open_run
from train.config import from_dict

ROOT = Path(__file__).parents[2]
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


@pytest.fixture(scope="module")
def run_folder(tokenizer, tmp_path_factory):
    """run_folder(format) -> the folder of an untrained run, written as training writes it."""
    made = {}

    def make(format):
        if format in made:
            return made[format]
        tree = {
            "name": f"tiny-{format}",
            "runs_dir": str(tmp_path_factory.mktemp("runs")),
            "model": {
                "vocab_size": 300,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 128,
                "moe_intermediate_size": 16,
            },
            "data": {"format": format},
        }
        config = from_dict(tree, "test")
        torch.manual_seed(0)
        model = MoEForCausalLM(config.model)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.arange(20).view(1, 20), torch.arange(20).view(1, 20)).loss.backward()
        optimizer.step()
        tokenizer.save(config.run_dir / "tokenizer")
        checkpoint.save(config.run_dir, 1, model, optimizer, {}, config)
        made[format] = config.run_dir
        return config.run_dir

    return make


@pytest.fixture
def run(run_folder):
    return open_run(run_folder("chat"), device="cpu")


@pytest.fixture
def script(monkeypatch, tokenizer):
    """Replaces the model by given answers; returns the list of (prompt ids, options) it was asked with."""
    asked = []

    def play(*answers):
        waiting = list(answers)

        def stream(model, prompt, **options):
            asked.append((list(prompt), options))
            answer = waiting.pop(0)
            yield from tokenizer.encode(answer)[: options["max_new_tokens"]]
            if answer.endswith("^C"):
                raise KeyboardInterrupt

        monkeypatch.setattr(chat, "stream", stream)
        return asked

    return play


def said(role, content):
    return {"role": role, "content": content}


# Streaming


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_streamed_text_is_the_text_and_no_piece_holds_half_a_character(tokenizer, text):
    pieces = list(decode_stream(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_characters_appear_as_soon_as_they_are_whole(tokenizer):
    tokens = tokenizer.encode("né 天!")
    assert len(tokens) > 5, "this test needs characters of several tokens"
    assert list(decode_stream(tokenizer, tokens)) == ["n", "é", " ", "天", "!"]


def test_bytes_that_are_no_text_are_shown_not_swallowed(tokenizer):
    half, whole = tokenizer.encode("é")[:1], tokenizer.encode("n")
    assert "".join(decode_stream(tokenizer, half * 3 + whole)) == "\ufffd\ufffd\ufffdn"
    assert "".join(decode_stream(tokenizer, whole + half)) == "n\ufffd"


# A conversation


def test_each_question_comes_with_the_whole_conversation(run, script, tokenizer):
    asked = script("Yes.", "No.", "Hello.")
    session = Session(run, Options(), system="Be short.")
    assert session.answer("One?", lambda piece: None) == "Yes."
    session.answer("Two?", lambda piece: None)
    history = [said("system", "Be short."), said("user", "One?"), said("assistant", "Yes."), said("user", "Two?")]
    assert asked[1][0] == encode_prompt(tokenizer, history)
    session.reset()
    session.answer("Hi", lambda piece: None)
    assert asked[2][0] == encode_prompt(tokenizer, [history[0], said("user", "Hi")])


def test_options_reach_the_sampler(run, script):
    asked = script("a", "b")
    Session(run, Options(0.5, 0.8, 7, 1.1, 9, seed=3)).answer("x", lambda piece: None)
    _, options = asked[0]
    stops = options.pop("stop_ids")
    assert {run.tokenizer.im_end_id, run.tokenizer.eos_id} == set(stops)
    assert options == {
        "temperature": 0.5,
        "top_p": 0.8,
        "top_k": 7,
        "repetition_penalty": 1.1,
        "max_new_tokens": 9,
        "seed": 3,
    }


def test_the_oldest_turns_are_forgotten_when_the_context_is_full_and_it_is_said(run, script, tokenizer):
    asked = script(*["yes, and more"] * 4)
    session = Session(run, Options(max_tokens=30))
    notes = []
    for i in range(4):
        session.answer(f"the earth {i}", lambda piece: None)
        notes += session.notes
    assert all(len(prompt) + 30 <= 128 for prompt, _ in asked)
    assert any("oldest 2 turns no longer fit the context of 128 tokens" in note for note in notes), notes
    assert tokenizer.decode(asked[3][0]).count("the earth") < 4 and "the earth 3" in tokenizer.decode(asked[3][0])
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * (len(session.messages) // 2)


def test_a_message_longer_than_the_context_is_refused_and_the_conversation_kept(run, script):
    script("Yes.", "No.")
    session = Session(run, Options())
    session.answer("One?", lambda piece: None)
    with pytest.raises(ValueError, match="this message takes .* the context holds 128; shorten it"):
        session.answer("xyz" * 200, lambda piece: None)
    assert len(session.messages) == 2


def test_ctrl_c_stops_the_answer_and_what_was_said_is_remembered(run, script):
    script("the earth^C", "Yes.")
    session = Session(run, Options())
    shown = []
    session.answer("One?", shown.append)
    assert session.stopped and session.notes == ["stopped"]
    assert session.messages[-1] == said("assistant", "the earth^C") and "".join(shown) == "the earth^C"
    session.answer("Two?", shown.append)
    assert not session.stopped


def test_an_answer_cut_off_is_said_to_be(run, script):
    script("And the earth was without form, and void.")
    session = Session(run, Options(max_tokens=3))
    session.answer("One?", lambda piece: None)
    assert session.notes == ["cut off: 3 tokens (max-tokens)"]


def test_a_pretrained_run_continues_text(run_folder, script, tokenizer):
    asked = script(" God", " the")
    session = Session(open_run(run_folder("text"), device="cpu"), Options())
    session.answer("In the beginning", lambda piece: None)
    session.answer("And", lambda piece: None)
    assert [prompt for prompt, _ in asked] == [
        [tokenizer.bos_id, *tokenizer.encode("In the beginning")],
        [tokenizer.bos_id, *tokenizer.encode("And")],
    ]
    with pytest.raises(ValueError, match="--system: .* was only pretrained"):
        Session(session.run, Options(), system="Be short.")


# The program


@pytest.fixture
def talk(run, monkeypatch, capsys):
    def with_lines(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = chat._talk(Session(run, Options()))
        out, err = capsys.readouterr()
        return code, out, err

    return with_lines


def test_lines_from_a_pipe_are_answered_and_only_answers_are_printed(talk, script):
    script("Yes.", "No.")
    code, out, err = talk("One?", "", "/reset", "Two?")
    assert (code, out) == (0, "Yes.\nNo.\n")
    assert "forgotten" in err


def test_commands(talk, script):
    asked = script("Yes.")
    code, out, err = talk("/set temperature 0", "/set top-k 5", "/help", "One?", "/quit", "never asked")
    assert (code, out) == (0, "Yes.\n")
    assert asked[0][1]["temperature"] == 0 and asked[0][1]["top_k"] == 5
    for word in ("/reset", "/set", "/help", "/quit", "temperature 0", "top-k 5"):
        assert word in err


def test_mistakes_in_commands_are_explained_and_the_talk_goes_on(talk, script):
    script("Yes.")
    code, out, err = talk("/sett", "/set temprature 1", "/set top-p 2", "/set seed", "One?")
    assert out == "Yes.\n" and code == cli.USER_ERROR
    assert "/sett: no such command" in err
    assert "did you mean 'temperature'" in err
    assert "top-p: '2' must be a number above 0, at most 1" in err
    assert "write /set NAME VALUE" in err


@pytest.mark.parametrize(
    "name, value",
    [("temperature", "-1"), ("temperature", "nan"), ("top-p", "0"), ("top-k", "1.5"), ("max-tokens", "0"), ("seed", "x"),
     ("repetition-penalty", "0"), ("repetition-penalty", "inf")],
)  # fmt: skip
def test_options_out_of_range_name_option_value_and_remedy(name, value):
    with pytest.raises(ValueError, match=f"{name}: '{value}' must be a"):
        Options().set(name, value)


def command(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", "scripts.chat", *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "1"},
    )


def test_the_real_command_answers_once_and_the_same_with_the_same_seed(run_folder):
    arguments = (run_folder("chat"), "--prompt", "Größe – 天?", "--max-tokens", 8, "--seed", 5, "--temperature", 1)
    first, second = command(*arguments), command(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout and first.stdout.endswith("\n")
    assert "Traceback" not in first.stderr


def test_the_real_command_reads_a_pipe_and_continues_text_for_a_pretrained_run(run_folder):
    done = command(run_folder("text"), "--max-tokens", 4, stdin="In the\nAnd the\n")
    assert done.returncode == 0, done.stderr
    assert "only pretrained" in done.stderr and done.stdout.count("\n") >= 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nowhere/at-all",), "nowhere/at-all"),
        (("RUN", "--top-p", "7", "--prompt", "x"), "--top-p: '7' must be a number above 0, at most 1"),
        (("RUN", "--prompt", " "), "--prompt: ' ' holds no text"),
    ],
)
def test_mistakes_end_in_one_line(run_folder, arguments, words):
    done = command(*(run_folder("chat") if a == "RUN" else a for a in arguments))
    assert done.returncode == cli.USER_ERROR
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
