"""Whatever is typed after `python -m COMMAND`: exit code 0, or 2 with a usage and one line; never a traceback, and nothing left behind.

Commands run through their own `main` in this process, which is what `python -m` runs, and a few dozen as real processes.
"""

import contextlib
import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hypothesis import strategies as st

from train import cli

from ..train.conftest import ROOT, environment
from .fuzz import fuzz, tree_of  # noqa: F401  (a fixture)

WITH_CONFIG = (
    "train.pretrain",
    "train.sft",
    "scripts.train_tokenizer",
    "scripts.prepare_data",
    "scripts.inspect_model",
    "scripts.inspect_data",
)
WITH_RUN = (
    "scripts.chat", "scripts.show_rows", "eval.evaluate", "eval.report", "scripts.watch", "scripts.export_hf", "scripts.export_gguf",
    "scripts.import_hf", "scripts.serve", "scripts.ablate", "eval.study",
)  # fmt: skip

# Paths that are no config and no run, or have names that are hard to handle. `{}` is the sandbox, the working directory.
PATHS = st.sampled_from(
    ["", " ", ".", "..", "/", "-", "--", "~", "{}/folder", "{}/empty", "{}/binary.yaml", "{}/loop", "{}/dangling", "{}/pipe", "{}/socket",
     "{}/pretrain.yaml/",
     "{}/pretrain.yaml/below", "/dev/null", "/dev/full", "/proc/self/mem", "/proc/self/environ", "/usr/../etc/passwd", "n" * 300, "d/" * 2500,
     "a\nb", "a\x1b[2J", "café", "\U0001f600",
     "*.yaml", "[a", "%s%n{0}", "$(touch pwned)", "; touch pwned", "`touch pwned`", "| touch pwned", "file:///etc/passwd",
     "https://example.invalid/x", "\udcff", "a\0b", "\ud800",
     "{}/odd 'name' \n é.yaml", "{}/runs", "{}/runs/pre/checkpoints", "{}/runs/pre/config.yaml", "{}/runs/../runs/pre/tokenizer", "{}/no/such/run"]
)  # fmt: skip
CONFIGS = st.sampled_from(["{}/pretrain.yaml", "{}/sft.yaml", "{}/odd 'name' \n é.yaml"])
RUNS = st.sampled_from(["{}/runs/pre", "{}/runs/pre/", "{}/runs/pre/checkpoints/step-00000001"])

# Each is refused, or makes the run neither long nor large: a valid one is really started.
OVERRIDES = st.sampled_from(
    ["train.steps=0", "train.steps=-1", "train.steps=1.5", "train.steps=99999999999", "train.epochs=1", "train.steps=null",
     "train.learning_rate=1e999", "train.learning_rate=1e300",
     "train.learning_rate=nan", "train.learning_rate=", "train.schedule=wsd", "train.warmup_steps=9223372036854775807", "train.decay_fraction=2",
     "train.beta1=1", "train.adam_eps=1e300",
     "train.grad_clip=1e300", "train.spike_factor=1e300", "train.max_bad_steps=9223372036854775807", "train.keep_checkpoints=9223372036854775807",
     "train.keep_every=7", "train.log_every=99",
     "train.async_checkpoint=false", "train.async_checkpoint=maybe", "train.stall_timeout=1e300", "train.stall_timeout=-1", "train.threads=0",
     "train.threads=1000000", "train.device=cuda",
     "train.device=tpu", "train.precision=float16", "train.precision=bfloat16", "train.micro_batch_size=3",
     "train.micro_batch_size=9223372036854775807", "train.tokens_per_step=31",
     "train.tokens_per_step=9223372036854775807", "train.init_from=nowhere", "train.init_from=''", "train.init_from=/dev/null", "train.init_from=.",
     "train.compile=off",
     "model.hidden_size=7", "model.hidden_size=99999999", "model.num_hidden_layers=5000", "model.num_hidden_layers=0", "model.vocab_size=8",
     "model.vocab_size=300", "model.n_routed_experts=0",
     "model.n_routed_experts=1", "model.num_experts_per_tok=9", "model.rope_theta=1e300", "model.rms_norm_eps=1e300", "model.initializer_range=1e300",
     "model.aux_loss_alpha=1e300",
     "model.router_z_loss_coef=1e300", "model.routed_scaling_factor=1e-300", "model.mlp_only_layers=[0, 0]", "model.mlp_only_layers=[-1]",
     "model.head_dim=3", "model.hidden_act=tanh",
     "model.rope_scaling={rope_type: yarn}", "model.rope_scaling={rope_type: yarn, factor: 1e299, original_max_position_embeddings: 1e299}",
     "model.expert_backend=none",
     "model.rope_scaling={rope_type: yarn, factor: 2, original_max_position_embeddings: 1" + "0" * 400 + "}", "model.max_position_embeddings=2",
     "model.attention_bias=7",
     "data.context_length=1", "data.context_length=65", "data.format=chat", "data.format=text", "data.sources=[]", "data.sources=[{}]",
     "data.sources=[{name: a}]", "data.sources=null",
     "data.sources=[{name: a, kind: jsonl}]", "data.sources=[{name: a, kind: embedded, corpus: none}]",
     "data.sources=[{name: a, kind: text, path: /dev/zero}]", "data.held_out_fraction=1",
     "data.sources=[{name: ../../a, kind: text, path: '{}/pretrain.yaml'}]", "data.sources=[{name: a, kind: parquet, path: '{}/pretrain.yaml'}]",
     "data.sources=[{name: a, path: x}]",
     "data.sources=[{name: a, kind: text, path: '{}/folder'}]", "data.sources=[{name: a, kind: text, path: '{}/empty'}]",
     "data.sources=[{name: a, kind: jsonl, path: '{}/binary.yaml'}]",
     "data.sources=[{name: a, kind: jsonl, path: '" + "n" * 300 + "'}]", 'data.sources=[{name: a, kind: jsonl, path: "a\\0b"}]',
     "data.sources=[{name: a, kind: jsonl, path: '**/none'}]",
     "data.cache_dir=/proc/none", "data.cache_dir=/dev/null", "data.cache_dir='{}/pretrain.yaml'", 'data.cache_dir="\\0"',
     "data.cache_dir='{}/dangling/x'",
     "tokenizer.path=nowhere", "tokenizer.path='{}/pretrain.yaml'", "tokenizer.path=/proc/none", "tokenizer.path='{}/empty'",
     "tokenizer.path='{}/x.json'", 'tokenizer.path="a\\0"',
     "tokenizer.train_bytes=1", "runs_dir=/proc/none", "runs_dir=/dev/null", "runs_dir='{}/pretrain.yaml'", 'runs_dir="\\0"', "runs_dir='{}/loop'",
     "name=../x", "name=''", "name=.", "name='a b'",
     "name=" + "n" * 300, "seed=-1", "seed=99999999999", "seed=3", "eval.prompts=[1]", 'eval.prompts=["\\0"]', "eval.prompts=['']",
     "eval.prompts=['<|im_end|>']", "eval.prompts=[" + "'word word ', " * 90 + "x]",
     "eval.prompts=['" + "word " * 200 + "']", 'eval.prompts=["\\ud800"]', "eval.sample_tokens=9223372036854775807",
     "eval.batch_size=9223372036854775807", "eval.max_tokens=1", "eval.every=1",
     "eval.best_source=none", "wandb.mode=loud", "wandb.group=[a]", "no.such=1", "=", "==", "=1", "train", "train=", "train=5", "train.=1",
     ".train=1", "base=x", "a" * 5000 + "=1",
     "seed=[" * 50, "seed=&a 1", "seed=!!int 1", "seed='", "seed=\x00", "seed=\udcff", "seed=" + "9" * 6000, "eval.prompts=[" + "x" * 200_000 + "]",
     "--seed=1", "-h", "--help", "--config"]
)  # fmt: skip
ANYTHING = st.text(st.characters(exclude_categories=()), max_size=12)
NUMBERS = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1",
        "2",
        "1.5",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "1e3",
        "0x1",
        "٣",
        "1_0",
        " 1",
        "9" * 30,
        "9" * 5000,
        "x",
        "\ud800",
    ]
)

OPTIONS = {
    "scripts.chat": ["--temperature", "--top-p", "--top-k", "--repetition-penalty", "--max-tokens", "--seed"],
    "eval.evaluate": ["--limit", "--batch-size", "--fewshot"],
    "scripts.benchmark": ["--rounds", "--rows", "--threads"],
}
CHOICES = {
    "scripts.chat": [["--device", "gpu"], ["--device", "cuda"], ["--prompt", ""], ["--prompt", " \n"], ["--prompt", "\ud800\x00"], ["--prompt",
    "word " * 500],
                     ["--prompt", "<|im_end|>"], ["--system", "x"], ["--prompt"], ["--prompt", "a", "--max-tokens", "3"]],
    "eval.evaluate": [["--tasks", "none"], ["--tasks", ""], ["--tasks", "nothing,such"], ["--tasks", "sums"], ["--device", "x"], ["--device", "cuda"],
    ["--precision", "int8"],
                      ["--json", "{}/folder"], ["--json", "/dev/full"], ["--json", ""], ["--json", "/proc/x/y"], ["--json", "a\0b"], ["--json",
                      "{}/pretrain.yaml/x"],
                      ["--json", "{}/new/result.json"], ["--json", "n" * 300], ["--include-path", "{}/folder"], ["--include-path", "/dev/null"],
                      ["--include-path", "a\0b"], ["--include-path", "{}/no/such", "--tasks", "mine"], ["--add-bos"], ["--chat-template", "x"]],
    "scripts.benchmark": [["--size", "none"], ["--work", "x"], ["--device", "cuda"], ["--json", "/proc/x/y"], ["--json", "{}/pretrain.yaml/x"],
    ["--json", "a\0b"], ["--size"]],
     "scripts.show_rows": [["0"], ["0", "3"], ["3", "0"], ["-1"], ["x"], ["0", "--tokens"], ["1.5"], ["99999999999"], ["9" * 5000], ["٣"], ["0", "1",
    "2"]],
    "eval.report": [["--help"], ["x", "y"], ["--json", "x"], ["--out", "{}/folder"], ["--out", "/proc/x.html"], ["--wandb"], ["--out"]],
    "scripts.watch": [["--once"], ["--once", "--every", "0"], ["--once", "--every", "x"], ["--every"], ["--once", "y"]],
    "scripts.export_hf": [["{}/out"], ["{}/folder"], ["{}/empty"], ["/proc/x/y"], ["--dtype", "int8"], ["--license", "x y"], ["--license", "mit"],
     ["a\0b"], [""], ["n" * 300], ["{}/runs/pre"], ["--dtype", "bfloat16"]],
    "scripts.export_gguf": [["{}/out.gguf"], ["{}/out"], ["{}/folder"], ["/proc/x/y.gguf"], ["--type", "q9"], ["--type", "q8_0"], ["a\0b.gguf"],
     [""], ["n" * 300 + ".gguf"], ["{}/no/such/x.gguf"]],
    "scripts.import_hf": [["imported"], ["{}/folder"], ["../x"], ["a b"], ["/proc/x/y"], [""], ["--chat"], ["a\0b"], ["n" * 300]],
    "scripts.serve": [["--port", "70000"], ["--port", "x"], ["--port", "-1"], ["--host", ""], ["--host", "no such host"], ["--host", "256.1.1.1"],
     ["--max-batch", "0"], ["--max-queue", "-1"], ["--api-key-env", "NO_SUCH_VARIABLE"], ["--api-key-env", ""], ["--nonsense"]],
    "scripts.ablate": [["{}/study.yaml"], ["--base", "{}/pretrain.yaml"], ["--base", "{}/sft.yaml"], ["--base", "{}/no"], ["--base", "a\0b"],
     ["--base", "{}/study.yaml"], ["--seeds", "1"], ["--seeds", "4"], ["--seeds", "x"], ["--seeds"], ["--variants", "dense"], ["--variants", "no"],
     ["--at-once", "0"], ["--at-once", "x"], ["--clock"], ["--no-clock"], ["train.steps=9"], ["train.steps=0"], ["seed=4"], ["name=x"]],
    "eval.study": [["{}/folder"], ["{}/runs/pre"], ["{}/study.yaml"], ["--nonsense"], ["x", "y"]],
}  # fmt: skip


@st.composite
def config_commands(draw: st.DrawFn) -> tuple[str, list[str]]:
    """(module, arguments) of a command that takes a config: mostly a right file with wrong or odd overrides, or the other way."""
    module = draw(st.sampled_from(WITH_CONFIG))
    if draw(st.integers(0, 3)):
        return module, [draw(CONFIGS), *draw(st.lists(OVERRIDES, min_size=1, max_size=2))]
    words = draw(st.lists(st.one_of(PATHS, PATHS, CONFIGS, OVERRIDES, ANYTHING), min_size=1, max_size=3))
    return module, words


@st.composite
def run_commands(draw: st.DrawFn) -> tuple[str, list[str]]:
    """(module, arguments) of a command that takes a run, or of the benchmark: options right and wrong."""
    module = draw(st.sampled_from([*WITH_RUN, "scripts.chat", "eval.evaluate", "scripts.benchmark"]))
    option = st.sampled_from(CHOICES[module])
    if module in OPTIONS:
        option |= st.tuples(st.sampled_from(OPTIONS[module]), NUMBERS | ANYTHING).map(list)
    words = [word for words in draw(st.lists(option, max_size=2)) for word in words]
    words += draw(st.sampled_from([[]] * 8 + [["--help"], ["--"], ["-"], ["--nonsense"]]))
    if module == "scripts.serve":  # one that starts would serve until it is stopped
        words += ["--port", draw(st.sampled_from(["0x", "99999", "-5", ""]))]
    if module == "scripts.watch":  # likewise
        words += ["--once"]
    if module == "scripts.benchmark":  # a right command line would measure for hours
        return module, [*words, "--rounds", draw(st.sampled_from(["0", "-1", "x", ""]))]
    if module == "scripts.ablate":  # a right study would be trained
        return module, [draw(st.one_of(st.just("{}/study.yaml"), PATHS, ANYTHING)), *words, "--plan"]
    run = draw(st.one_of(RUNS, RUNS, PATHS, ANYTHING))
    if module in ("scripts.export_hf", "scripts.export_gguf", "scripts.import_hf") and draw(st.booleans()):
        return module, [run, "{}/new.gguf", *words]
    return module, [run, *words] if draw(st.integers(0, 4)) else [*words, run]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def call(module: str, arguments: list[str], typed: str = "") -> Ended:
    """What `python -m module arguments` does, in this process; `typed` is its standard input."""
    main = importlib.import_module(module).main
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = [module, *arguments], io.StringIO(typed)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(main)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        pytest.fail(f"python -m {module} {arguments!r:.500} ended in a traceback:\n{traceback.format_exc()[-3000:]}")
    finally:
        sys.argv, sys.stdin = before
    assert isinstance(code, int), code
    return Ended(code, out.getvalue(), err.getvalue())


def check_ended(module: str, arguments: list[str], ended: Ended) -> None:
    """Exit code 0 or 2; after 2 a usage and one line on standard error that a person can read."""
    what = f"python -m {module} {arguments!r:.500}"
    assert ended.code in (0, cli.USER_ERROR), f"{what}: exit code {ended.code}\n{ended.err[-2000:]}"
    assert "Traceback" not in ended.err + ended.out, f"{what}\n{ended.err[-3000:]}"
    if ended.code == 0:
        return
    said = ended.err.rstrip("\n").split("\n")
    if said[0].startswith("usage: "):
        said = said[next(i for i, line in enumerate(said) if ": error: " in line) :]
    else:
        said = [line for line in said if not line.startswith(("preparing ", "reading lm-", "\r"))]  # progress
        assert said[0].startswith("error: "), f"{what}\n{ended.err[-2000:]}"
    assert len(said) == 1 or ": error: " in said[0], f"{what}: more than one line\n{ended.err[-2000:]}"


@pytest.fixture(scope="module")
def sandbox(workplace, tmp_path_factory) -> Path:
    """A folder with the tiny configs, a run of one step, and all sorts of things that are neither."""
    folder = tmp_path_factory.mktemp("sandbox")
    for name in ("pretrain", "sft"):
        text = (workplace / f"{name}.yaml").read_text(encoding="utf-8").replace(str(workplace), str(folder))
        config = yaml.safe_load(text)
        config.setdefault("train", {}).update(steps=1, checkpoint_every=1)
        config["eval"] = {"every": 0, "max_tokens": 64, "prompts": [], "sample_tokens": 2}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name in ("text.jsonl", "chat.jsonl"):
        (folder / name).write_bytes(b"".join((workplace / name).read_bytes().splitlines(keepends=True)[:40]))
    study = {"question": "Why?", "base": "pretrain.yaml", "seeds": [1, 2], "compare_with": ["dense"], "tolerance": 1.0}
    study["variants"] = [{"name": "dense", "set": {"model.n_routed_experts": 0}}, {"name": "experts"}]
    (folder / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    shutil.copytree(workplace / "tokenizer", folder / "tokenizer")
    shutil.copy(folder / "pretrain.yaml", folder / "odd 'name' \n é.yaml")
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "binary.yaml").write_bytes(bytes(range(256)) * 100)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    before = {number: signal.getsignal(number) for number in LISTENED}
    for name in ("pretrain", "sft"):  # so that a command which fails has no data to prepare, and the runs are there
        assert call(f"train.{name}", [str(folder / f"{name}.yaml")]).code == 0
    yield folder
    for number, handler in before.items():
        signal.signal(number, handler)


LISTENED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def in_sandbox(sandbox: Path, words: list[str]) -> list[str]:
    return [word.replace("{}", str(sandbox)) for word in words]


@pytest.fixture
def check(sandbox, monkeypatch):
    """check(case): the command ends as it must, and one that fails leaves the sandbox as it was."""
    monkeypatch.chdir(sandbox)
    runs = 0

    def one(case: tuple[str, list[str]]) -> None:
        nonlocal runs
        module, arguments = case[0], in_sandbox(sandbox, case[1])
        if module.startswith("train."):
            runs += 1  # a run of its own, so that it really starts
            arguments.insert(1, f"name=fuzz-{runs}")
        before = tree_of(sandbox)
        ended = call(module, arguments)
        check_ended(module, arguments, ended)
        after = tree_of(sandbox)
        assert not any("pwned" in name for name in after)
        if ended.code == 0:
            return
        changed = [name for name in after.keys() | before.keys() if after.get(name) != before.get(name)]
        changed = [name for name in changed if not name.startswith(str(sandbox / "cache"))]  # whole shards are no loss
        assert not changed, f"python -m {module} {arguments!r:.300} failed and left {changed[:5]}\n{ended.err[-500:]}"

    return one


def test_fuzz_commands_that_take_a_config(fuzz, check):  # noqa: F811
    first = [
        ("train.pretrain", ["{}/pretrain.yaml", override])
        for override in (
            "runs_dir=/proc/none",
            "runs_dir=/dev/null",
            "data.cache_dir=/dev/null",
            "tokenizer.path=/dev/null",
        )
    ]
    fuzz("config_commands", config_commands(), check, first)


def test_fuzz_commands_that_take_a_run(fuzz, check):  # noqa: F811
    fuzz("run_commands", run_commands(), check)


COMMAND_WORDS = st.sampled_from(
    [
        "/set",
        "/help",
        "/reset",
        "/quit",
        "/",
        "//",
        "/SET",
        "temperature",
        "top-p",
        "--seed",
        "max_tokens",
        "no",
        "\x1f",
        "\u2028",
    ]
)


def test_fuzz_lines_typed_to_chat(fuzz, sandbox):  # noqa: F811
    """A mistake in a conversation is a line, and the conversation goes on; what follows is still read."""

    def check(lines: list[str]) -> None:
        arguments = [str(sandbox / "runs/sft"), "--max-tokens", "2", "--seed", "1"]
        ended = call("scripts.chat", arguments, typed="\n".join(["/help", *lines, "/set temperature 0", "/quit"]))
        assert ended.code in (0, cli.USER_ERROR) and "Traceback" not in ended.err, ended.err[-3000:]
        if not any(line.strip() == "/quit" for line in "\n".join(lines).split("\n")):
            assert "(temperature 0.0" in ended.err, f"{lines!r} ended the conversation\n{ended.err[-2000:]}"
        assert all(len(line) < 1000 for line in ended.err.split("\n"))

    words = st.lists(COMMAND_WORDS | NUMBERS | ANYTHING, max_size=3).map(" ".join)
    fuzz("chat_lines", st.lists(words | ANYTHING | st.just("word " * 300) | st.just("<|im_end|>"), max_size=4), check)


# As real processes

REAL = [
    ("train.pretrain", []),
    ("train.pretrain", ["{}/pretrain.yaml", "train.steps=0"]),
    ("train.pretrain", ["{}/odd 'name' \n é.yaml", "name=real", "train.learning_rate=fast"]),
    ("train.pretrain", ["{}/pretrain.yaml", "name=real", "tokenizer.path=nowhere"]),
    ("train.pretrain", ["/dev/zero"]),
    ("train.pretrain", ["{}/pipe"]),
    ("train.pretrain", ["{}/loop"]),
    ("train.pretrain", [""]),
    ("train.pretrain", ["\udcff.yaml"]),
    ("train.sft", ["{}/pretrain.yaml"]),
    ("train.sft", ["{}/sft.yaml", "name=real", "train.init_from={}/folder"]),
    ("train.sft", ["-"]),
    ("scripts.train_tokenizer", ["{}/folder"]),
    ("scripts.train_tokenizer", ["{}/pretrain.yaml", "tokenizer.path=/proc/none", "model.vocab_size=300"]),
    ("scripts.prepare_data", ["{}/pretrain.yaml", "data.sources=[{name: a, kind: text, path: /dev/zero}]"]),
    ("scripts.prepare_data", ["{}/pretrain.yaml", "data.cache_dir=/proc/none"]),
    ("scripts.inspect_model", ["n" * 5000]),
    ("scripts.inspect_model", ["{}/pretrain.yaml", "a" * 100_000]),
    ("scripts.inspect_model", ["{}/binary.yaml"]),
    ("scripts.chat", ["{}/no/such"]),
    ("scripts.chat", ["{}/runs/pre", "--temperature", "nan"]),
    ("scripts.chat", ["{}/runs/pre", "--prompt", ""]),
    ("scripts.show_rows", ["{}/runs/pre", "-1"]),
    ("scripts.show_rows", ["{}/empty", "0"]),
    ("eval.evaluate", ["{}/runs/none", "--json", "{}/new/result.json"]),
    ("eval.evaluate", ["{}/runs/pre", "--limit", "0"]),
    ("eval.evaluate", ["--help"]),
    ("eval.report", ["{}/folder"]),
    ("scripts.watch", ["{}/folder", "--once"]),
    ("scripts.export_hf", ["{}/runs/pre", "{}/folder/x/../../empty"]),
    ("scripts.export_gguf", ["{}/runs/pre", "{}/folder"]),
    ("scripts.import_hf", ["{}/folder", "new"]),
    ("scripts.import_hf", ["{}/folder", "--", "--"]),
    ("scripts.serve", ["{}/runs/pre", "--port", "99999"]),
    ("scripts.inspect_data", ["{}/pretrain.yaml", "--show", "-1"]),
    ("eval.report", ["{}/runs/pre", "--nonsense"]),
    ("scripts.benchmark", ["--rounds", "0"]),
]
QUICK = [REAL[1], REAL[19]]


def check_real(sandbox: Path, module: str, words: list[str]) -> None:
    before = tree_of(sandbox)
    process = subprocess.run(
        [os.fsencode(word) for word in (sys.executable, "-m", module, *in_sandbox(sandbox, words))],
        cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=300,
    )  # fmt: skip
    ended = Ended(process.returncode, process.stdout, process.stderr)
    check_ended(module, words, ended)
    assert ended.code == (0 if "--help" in words else cli.USER_ERROR)
    assert tree_of(sandbox) == before, f"python -m {module} {words!r:.300} left something behind"


@pytest.mark.parametrize("case", QUICK, ids=[module for module, _ in QUICK])
def test_real_processes(sandbox, case):
    check_real(sandbox, *case)


@pytest.mark.slow
def test_more_real_processes(sandbox):
    """Two at a time: they leave nothing behind, so none sees another."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda case: check_real(sandbox, *case), [case for case in REAL if case not in QUICK]))
