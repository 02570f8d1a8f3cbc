"""scripts/inspect_data.py tells a person, before anything runs, what is in the data and what will be learned of it."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.chat import encode_conversation
from data.tokenizer import Tokenizer
from scripts import inspect_data
from train import cli

ROOT = Path(__file__).resolve().parents[2]
TOPICS = [
    f"Topic {i}: {word} {'and more of it ' * (i % 9)}\x1b[2J 日本." for i, word in enumerate(["apples", "pears"] * 30)
]
CHATS = [
    [
        {"role": "user", "content": f"{i} + 1 <|im_end|>?"},
        {"role": "assistant", "content": f"It is {i + 1}.{' So' * i * 3}"},
    ]
    for i in range(30)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with text.yaml, chat.yaml, their data and tokenizer; and the tokenizer."""
    folder = tmp_path_factory.mktemp("inspect_data")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TOPICS, "", TOPICS[0]]))
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    tokenizer = Tokenizer.train([*TOPICS, *(turn["content"] for chat in CHATS for turn in chat)], 300)
    tokenizer.save(folder / "tokenizer")
    for format in ("text", "chat"):
        (folder / f"{format}.yaml").write_text(
            f"name: {format}\nmodel: {{vocab_size: 300, max_position_embeddings: 64, hidden_size: 32}}\n"
            f"tokenizer: {{path: {folder}/tokenizer}}\ntrain: {{epochs: 3, tokens_per_step: 128, micro_batch_size: 1}}\n"
            f"data:\n  format: {format}\n  cache_dir: {folder}/cache\n  held_out_fraction: 0.1\n"
            f"  sources: [{{name: mine, kind: jsonl, path: {folder}/{format}.jsonl, weight: 2}}]\n"
        )
    return folder, tokenizer


@pytest.fixture
def inspect(monkeypatch, capsys):
    """Runs the command; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_data", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.run(inspect_data.main)
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return call


def test_a_text_config_on_one_page(made, inspect):
    folder, _ = made
    before = sorted(folder.rglob("*"))
    code, out, err = inspect(folder / "text.yaml", "--json", folder / "out.json")
    assert code == 0, err
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "out.json"]), "nothing but FILE is written"
    found = json.loads((folder / "out.json").read_text())
    assert inspect(folder / "text.yaml", "--json", folder / "out.json")[0] == 0, "its own result is replaced"
    one = found["sources"]["mine"]
    (folder / "out.json").unlink()
    assert "62 read, 61 of use, 1 left out: 1 empty text" in out
    assert f"{one['train_tokens']:,} tokens; {one['rows']:,} rows" in out and one["rows_per_epoch"] == 2 * one["rows"]
    assert "duplicates  1 exact (1.6%)" in out
    steps, epochs = re.search(r"the run: ([\d,]+) steps x 128 tokens = [\d,]+ tokens, ([\d.]+) epochs", out).groups()
    assert float(epochs) == pytest.approx(3, abs=0.1) and int(steps) == -(-3 * found["rows_per_epoch"] // 2)
    assert f"{found['epochs'] * 2:.2f} times" in out, "a weight of 2 repeats the source"
    assert out.index("  1.6%  of the records of mine left out: empty text") > out.index("where most is lost")
    assert "\x1b" not in out, "a pipe gets no colours, and no terminal obeys the text"
    assert "[<|bos|>]" in out and "[<|eos|>]" not in out.partition("as it is learned")[0]
    histogram = sum(n for _, _, n in one["lengths"]["histogram"])
    assert histogram == one["documents"] == sum(int(n) for n in re.findall(r"- \d+ +#* +(\d+) ", out))


def test_a_chat_config_shows_what_is_learned_and_what_is_too_long(made, inspect):
    folder, _ = made
    code, out, err = inspect(folder / "chat.yaml", "--show", 2)
    assert code == 0, err
    assert re.search(
        r"too long    [1-9]\d* conversations .* fit no row and are dropped; raise data.context_length", out
    )
    assert out.count("as it is learned ---") == 2
    for i in range(2):
        asked = f"user\n{i} + 1 <|im_end|>?[<|im_end|>]\n[<|im_start|>]assistant\n"
        assert f"{asked}>>>It is {i + 1}.{' So' * i * 3}[<|im_end|>]<<<" in out
    code, out, _ = inspect(folder / "chat.yaml", "--show", 30, "data.held_out_fraction=0.5")
    dropped = int(re.search(r"too long    (\d+) conversations", out)[1])
    assert 0 < dropped == out.count("tokens more: it fits no row, is dropped, and nothing of it is learned")
    trained_on = int(re.search(r"training    (\d+) conversations", out)[1])
    assert 0 < trained_on == out.count("as it is learned ---") < 30, "what is held out is not learned"
    code, out, _ = inspect(folder / "chat.yaml", "--show", 0, "--documents", 5)
    assert code == 0 and "as it is learned" not in out and "the first 5 records of each source alone" in out
    swapped = inspect("--show", 0, folder / "chat.yaml", "--documents", 5, "model.num_attention_heads=4")
    assert swapped[:2] == (0, out), "options and keys in any order"
    assert "5 read, 5 of use" in out and "the run:" not in out, "the epochs of a part say nothing about the run"


@pytest.mark.parametrize("colour", [False, True])
def test_the_view_loses_nothing_and_colours_what_is_learned(made, colour):
    _, tokenizer = made
    for chat in CHATS[:4]:
        ids, mask = encode_conversation(tokenizer, chat)
        view = inspect_data.spelled((ids, mask), tokenizer, 512, colour)
        if colour:
            learned = "".join(re.findall(r"\033\[32m(.*?)\033\[0m", view, re.DOTALL))
            assert learned == chat[1]["content"]
            view = re.sub(r"\033\[[\d;]*m", "", view)
        else:
            assert re.findall(r">>>(.*?)\[<\|im_end\|>\]<<<", view, re.DOTALL) == [chat[1]["content"]]
            view = view.replace(">>>", "").replace("<<<", "").replace("[<|", "<|").replace("|>]", "|>")
        assert view == tokenizer.decode(ids, skip_special_tokens=False)
    ids = [tokenizer.bos_id, *tokenizer.encode(TOPICS[3]), tokenizer.eos_id]
    view = inspect_data.spelled((ids, None), tokenizer, 512, colour)
    view = re.sub(r"\033\[[\d;]*m", "", view).replace("[", "").replace("]", "").replace("|", "")
    assert view.removeprefix("<bos>").removesuffix("<eos>") == TOPICS[3].replace("\x1b[", "\\x1b"), (
        "characters of several tokens stay whole"
    )
    assert inspect_data.spelled((ids, None), tokenizer, 10, colour).endswith(f"... and {len(ids) - 10} tokens more")


def test_mistakes_are_one_sentence_before_anything_is_read(made, inspect, tmp_path):
    folder, _ = made
    broken = folder / "broken.yaml"
    broken.write_text((folder / "text.yaml").read_text().replace("text.jsonl", "nowhere.jsonl"))
    for arguments, problem in [
        (
            (folder / "text.yaml", f"tokenizer.path={tmp_path}"),
            "train it with: python -m scripts.train_tokenizer CONFIG",
        ),
        ((folder / "text.yaml", "train.tokens_per_step=100"), "train.tokens_per_step: 100 is no multiple"),
        ((broken,), "nowhere.jsonl' does not exist"),
        ((folder / "text.yaml", "--documents", "0"), "'0' is no number of documents"),
        ((folder / "text.yaml", "--show", "-1"), "no number of documents|expected one argument"),
        ((folder / "text.yaml", "--json", folder / "text.jsonl" / "x"), "text.jsonl"),
        ((folder / "text.yaml", "--json", folder), "is a folder; give the name of a file"),
        (
            (folder / "text.yaml", "--json", folder / "text.yaml"),
            "text.yaml is there already and no result of this command",
        ),
        ((folder / "text.yaml", "--json", folder / "text.jsonl"), "text.jsonl is there already and no result"),
    ]:
        code, out, err = inspect(*arguments)
        assert code == 2 and not out and "Traceback" not in err, (arguments, out, err)
        assert re.search(problem, err.splitlines()[-1]), f"{arguments}: {err}"
    assert "example:\n  python -m scripts.inspect_data" in inspect("--help")[1]
    code, out, _ = inspect(folder / "text.yaml", "--json", "/dev/null")
    assert code == 0 and not Path("/dev/null").is_file(), "a device is written to, not replaced"


@pytest.mark.slow
@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_on_a_terminal_unless_told_otherwise(made, no_color):
    folder, _ = made
    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "scripts.inspect_data", str(folder / "chat.yaml")]
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    out = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        out += part
    assert process.wait(timeout=120) == 0
    assert (b"\x1b[32mIt is 1." in out) == (not no_color) and (b">>>It is 1." in out) == bool(no_color)
