"""The pages keep their word: commands parse, links and paths exist, and every command runs, in its order, on small stand-ins.

What runs is what stands there, with fewer layers, tokens and steps (`smaller`). What no test can run is in NOT_RUN, with
the reason, one by one; a line that no page has any more is a mistake there.
"""

import argparse
import contextlib
import json
import os
import pydoc_data.topics
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.pages import DOCS, READMES, RECORDS, ROOT, Page, Step, call, python_part, write_file
from train.config import load_config
from train.runs import OWN

ENGLISH, CHINESE = (Page(path) for path in READMES)
PAGES = [ENGLISH, CHINESE, *map(Page, DOCS)]
COMMANDS = sorted({(page.name, command) for page in PAGES for command in page.commands})
TO_RUN = [page for page in PAGES if page.commands and page.name != "README.zh-CN.md"]  # its commands are README.md's
MADE_BY_RUNNING = ("runs/", "cache/", "my/", ".venv/", "exports/")  # not in a checkout
PATIENCE = 240  # seconds for one command

SEVERAL_MACHINES = "wants two machines; tests/reliability/test_two_machines.py runs its like between network namespaces"
NOT_RUN = {
    "bash scripts/quickstart.sh": "installs packages, then ten minutes; tests/scripts/test_shell.py runs it on a stand-in for Python",
    "python -m scripts.collect_python": "reads all Python there is; tests/data/test_python_sources.py has it read the standard library",
    "python -m scripts.ablate configs/ablations/experts.yaml": "hours; tests/scripts/ablation runs small studies, tests/test_configs.py these ones' runs",
    "python -m eval.study runs/ablations/experts": "wants the study; tests/eval/test_study.py has one",
    "bash scripts/test.sh": "is what runs this test",
    "bash scripts/test.sh --all": "is what runs this test",
    "bash scripts/test.sh tests/gpu --all": "is a part of what runs this test",
    "bash scripts/test.sh tests/reliability --all": "is a part of what runs this test",
    "torchrun --nproc-per-node 8 -m train.pretrain configs/fineweb_edu/pretrain.yaml": "wants 8 GPUs and the hub",
    "python -m scripts.benchmark --rounds 7 --minimind FOLDER --json result.json": "half an hour, and wants a checkout of MiniMind",
    "python -m scripts.benchmark --device cuda --profile --json result.json": "wants a GPU",
    "python -m scripts.benchmark --work save --rounds 5": "minutes of timing; tests/scripts/test_benchmark.py runs its parts",
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": SEVERAL_MACHINES,
    "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0": SEVERAL_MACHINES,
    "torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=3 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "
    "--rdzv-backend=c10d --rdzv-endpoint=node1:29400 --rdzv-id=night -m train.pretrain configs/fineweb_edu/pretrain.yaml": SEVERAL_MACHINES,
    "until torchrun ...; do sleep 10; done": SEVERAL_MACHINES,
    "python -m pytest tests/model/test_families.py": "is a part of what runs this test",
    "torchrun --nproc-per-node 2 --max-restarts 3 -m train.pretrain configs/quickstart/pretrain.yaml name=two-again train.device=cpu "
    "train.threads=1": "tests/reliability/test_torchrun.py runs its like, and kills a process",
    "vllm serve exported/quickstart": "wants a GPU and vLLM",
    "llama-cli -m exported/quickstart.gguf": "llama.cpp is not installed here; tests/scripts/formats/test_gguf.py has it from Python",
    "llama-server -m exported/quickstart.gguf": "llama.cpp is not installed here",
    "cd exported && ollama create quickstart -f quickstart.Modelfile && ollama run quickstart": "Ollama is not installed here",
    "python -m eval.evaluate runs/quickstart-pretrain --tasks arc_easy,piqa,hellaswag --limit 200": "reads the hub; tests/eval/test_harness.py "
    "has local tasks of the same kinds",
    "tensorboard --logdir runs": "serves until it is stopped; tests/train/test_trackers.py reads the files back",
    "wandb sync runs/watched-too/wandb/offline-run-*": "wants an account; tests/train/test_trackers.py has a server of its own",
    "python -m eval.report runs/watched-too --wandb": "wants an account",
}  # fmt: skip

# What makes a page's training fit a test; `smaller` adds what depends on the config.
SMALL_MODEL = """model.hidden_size=32 model.intermediate_size=64 model.moe_intermediate_size=16 model.num_hidden_layers=2
    model.num_attention_heads=4 model.num_key_value_heads=2 model.head_dim=8 model.max_position_embeddings=512
    model.mlp_only_layers=[]""".split()
SMALL_RUN = """data.context_length=128 data.held_out_fraction=0.1 train.tokens_per_step=1024 train.micro_batch_size=4 train.epochs=null
    train.steps=3 train.warmup_steps=1 train.threads=1 train.device=cpu eval.sample_tokens=8 eval.max_tokens=500""".split()
TAKES_OVERRIDES = (
    "scripts.train_tokenizer",
    "scripts.prepare_data",
    "scripts.inspect_data",
    "train.pretrain",
    "train.sft",
)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Training takes SIGINT and SIGTERM for itself; pytest gets them back."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def page_id(page: Page) -> str:
    return page.name


# What can be read without running anything.


class Parsed(Exception):
    pass


@pytest.mark.parametrize("page, command", COMMANDS)
def test_command_is_accepted(page, command, monkeypatch, tmp_path):
    """The real parser takes the arguments, a named config loads with its overrides; nothing is run."""
    if command.startswith("bash "):
        script, *arguments = shlex.split(command)[1:]
        assert script.startswith("scripts/") and (ROOT / script).is_file()
        text = (ROOT / script).read_text()
        known = [
            argument in text or (ROOT / argument).is_dir() for argument in arguments
        ]  # test.sh takes folders of tests
        assert all(known), f"{script} says nothing of {arguments}"
    elif parts := python_part(command):
        check_arguments(Page(ROOT / page), *parts, monkeypatch, tmp_path)


def check_arguments(page: Page, module: str, arguments: list[str], monkeypatch, folder: Path) -> None:
    seen = {}

    def noting(real):
        def parse(self, *args, **kwargs):
            seen["arguments"] = real(self, *args, **kwargs)
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, noting(getattr(argparse.ArgumentParser, name)))
    with pytest.raises(Parsed):
        call(module, arguments, monkeypatch)
    parsed = seen["arguments"]
    if hasattr(parsed, "config"):
        page.write_files(folder)
        (folder / "configs").symlink_to(ROOT / "configs")  # which a file of the page may have as its base
        where = folder if parsed.config.startswith("my/") else ROOT
        if (where / parsed.config).is_file() and "base: ../runs/" in (where / parsed.config).read_text():
            return  # a run that the page makes first
        config = load_config(where / parsed.config, getattr(parsed, "overrides", []))
        if module.startswith("train."):
            assert config.data.format == ("chat" if module == "train.sft" else "text")
    if hasattr(parsed, "run"):
        runs = parsed.run if isinstance(parsed.run, list) else [parsed.run]
        new = module == "scripts.import_hf"  # its RUN is the name of one that it makes
        assert new or all(str(run).startswith("runs/") for run in runs), "a page's runs are in runs/"


@pytest.mark.parametrize("module", sorted({part[0] for _, command in COMMANDS if (part := python_part(command))}))
def test_help_shows_an_example(module, monkeypatch, capsys):
    assert call(module, ["--help"], monkeypatch) == 0
    assert f"python -m {module} " in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    """Files beside the page, and headings within the page they are in."""
    for target in re.findall(r"\]\(([^)]+)\)", page.prose):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        there = page.path.parent / name if name else page.path
        assert there.exists(), f"{page.name}: {target} leads nowhere"
        if heading:
            assert heading in headings(Page(there)), f"{page.name}: {target}: no such heading"


def headings(page: Page) -> list[str]:
    """As GitHub names them in links."""
    titles = re.findall(r"^#+ (.*)$", page.prose, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_paths_exist(page):
    if page.path.name in RECORDS:
        return  # they name what was there then
    paths = [text for text in page.inline if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+\.(md|txt|toml|sh|py)", text)]
    paths = [path for path in paths if "/" in path and path.split("/")[0] in TOP] + [p for p in paths if "/" not in p]
    made = [path for path in paths if path.startswith(MADE_BY_RUNNING) or path in OWN]
    missing = [path for path in paths if path not in made and not (ROOT / path).exists()]
    assert not missing, f"{page.name} names what is not there"


TOP = {path.name for path in ROOT.iterdir() if path.is_dir()}  # other paths are a run's, a hub's or a machine's


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_nothing_is_left_to_fill_in(page):
    assert not re.findall(r"\{\{.*?\}\}|@@\w+@@|TODO|FIXME|XXX", page.prose), "numbers that nobody has measured yet"


@pytest.mark.parametrize(
    "page, command, output",
    [(page, *shown) for page in PAGES for shown in re.findall(r"^\$ (.*)\n(error: .*)", page.text, re.MULTILINE)],
)
def test_shown_error_is_the_error(page, command, output, monkeypatch, tmp_path):
    page.write_files(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        call(*python_part(command), monkeypatch)
    assert f"error: {caught.value}" == output


def test_every_page_is_found_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w.-]+\.md)", ENGLISH.text))
    for page in map(Page, DOCS):
        if page.path.name in linked:
            linked |= set(re.findall(r"\]\(([\w.-]+\.md)", page.text))
    assert not {path.name for path in DOCS} - linked, "no link leads to these"


def test_what_is_not_run_stands_somewhere():
    stale = NOT_RUN.keys() - {command for _, command in COMMANDS}
    assert not stale, "NOT_RUN excuses what no page says"


# The Chinese README is the English one.


def shape(page: Page) -> list[str]:
    """Headings, blocks, tables and their rows, list items, in order; without a word of either language."""
    kinds = {"#": "heading", "`": "block", "|": "row", "-": "item", "!": "picture"}
    without_content = BLOCK_CONTENT.sub(r"```\1\n```", page.text)
    found = []
    for line in without_content.splitlines():
        mark = re.match(r"(#+) |(```\w+)|(\|)|(- )|(!)", line)
        if mark:
            found.append(
                f"{kinds[line[0]]} {mark[1] or mark[2] or ''}".strip() + (f" of {line.count('|')}" if mark[3] else "")
            )
    return found


BLOCK_CONTENT = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_chinese_readme_has_the_same_structure():
    assert shape(CHINESE) == shape(ENGLISH)


def test_chinese_readme_has_the_same_blocks():
    """Equal but for comments, which are translated."""
    for (language, ours), (_, theirs) in zip(CHINESE.blocks, ENGLISH.blocks, strict=True):
        if language == "text":  # drawings of folders, and what a model said: the words are explanations
            assert len(ours.splitlines()) == len(theirs.splitlines())
            assert re.findall(r"[\w.-]+\.(?:json|jsonl|md|txt|yaml|safetensors|html)\b", ours) == re.findall(
                r"[\w.-]+\.(?:json|jsonl|md|txt|yaml|safetensors|html)\b", theirs
            )
        else:
            assert re.sub(r" *# .*", "", ours) == re.sub(r" *# .*", "", theirs)


def test_chinese_readme_has_the_same_numbers_links_and_names():
    def per_table(page: Page) -> list[list[str]]:
        return [sorted(numbers(line)) for line in page.prose.splitlines() if line.startswith("|")]

    assert per_table(CHINESE) == per_table(ENGLISH), "numbers of the tables, row by row"
    assert sorted(numbers(CHINESE.prose)) == sorted(numbers(ENGLISH.prose)), "numbers of the prose"
    links = [sorted(re.findall(r"\]\(([^)]+)\)", page.prose)) for page in (CHINESE, ENGLISH)]
    assert set(links[0]) - {"README.md"} == set(links[1]) - {"README.zh-CN.md"}
    assert sorted(set(CHINESE.inline)) == sorted(set(ENGLISH.inline)), "names of keys, files and commands"


def numbers(text: str) -> list[str]:
    """Numbers in digits, without those of names (links, code)."""
    text = re.sub(r"`[^`\n]+`|\]\([^)]+\)|\w*[A-Za-z]\w*-\d\w*|[A-Za-z]+\d\w*", " ", text)
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)


@pytest.mark.parametrize(
    "page, other", [(ENGLISH, "README.zh-CN.md"), (CHINESE, "README.md")], ids=["english", "chinese"]
)
def test_each_readme_leads_to_the_other(page, other):
    assert f"]({other})" in "\n".join(page.text.splitlines()[:8])


# Every command, on small stand-ins.


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A checkout in small: configs/, local text for every source, and the quickstart's two runs, really trained and evaluated."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "configs").symlink_to(ROOT / "configs")
    topics = [text for text in pydoc_data.topics.topics.values() if 200 < len(text) < 6000]
    records = {
        "text": [{"text": text} for text in topics],
        "chat": [
            {"messages": [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": f"{a + b}."}]}
            for a in range(20)
            for b in range(20)
        ],
    }
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            "python -m scripts.train_tokenizer configs/quickstart/tokenizer.yaml",
            "python -m train.pretrain configs/quickstart/pretrain.yaml",
            "python -m train.sft configs/quickstart/sft.yaml",
            "python -m eval.evaluate runs/quickstart-pretrain",
            "python -m eval.evaluate runs/quickstart-sft --tasks sums",
        ):
            module, arguments = python_part(command)
            assert call(module, smaller(module, arguments), patch) == 0
    return folder


def smaller(module: str, arguments: list[str]) -> list[str]:
    """The same command on a small model, on local text where the page reads the hub or a whole Bible, without questions to a person."""
    if arguments[0].endswith(".yaml") and module in TAKES_OVERRIDES:
        config = load_config(arguments[0], [argument for argument in arguments[1:] if "=" in argument])
        own = arguments[0].startswith("my/")
        overrides = list(SMALL_RUN)
        if not config.tokenizer.path.startswith("runs/"):  # there the shape is a run's, and cannot be another
            dense = min(config.model.first_k_dense_replace, 1)
            vocabulary = 280 if own else 512  # the reader's few sentences have no more
            overrides += [*SMALL_MODEL, f"model.first_k_dense_replace={dense}", f"model.vocab_size={vocabulary}"]
        if not own:
            file = f"{config.data.format}.jsonl"
            local = [{"name": source.name, "kind": "jsonl", "path": file} for source in config.data.sources]
            overrides.append(f"data.sources={json.dumps(local)}")
        first_option = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
        return [*arguments[:first_option], *overrides, *arguments[first_option:]]
    more = {
        "eval.evaluate": ["--device", "cpu", "--limit", "2"],
        "scripts.chat": ["--device", "cpu", "--max-tokens", "8", "--prompt", "What is the colour of snow?"],
    }.get(module, [])
    names = {argument.partition("=")[0] for argument in arguments}
    pairs = zip(more[::2], more[1::2])
    return [*arguments, *(word for pair in pairs if pair[0] not in names for word in pair)]


class Reader:
    """Does what a page says, in one folder: our commands in this process, the others in a shell, a server beside them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.server: subprocess.Popen | None = None
        self.port = free_port()
        bin_folder = Path(sys.executable).parent
        self.environment = {
            **os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
        }  # fmt: skip
        patch.chdir(folder)

    def do(self, step: Step) -> None:
        if step.kind == "file":
            write_file(step, self.folder)
        elif step.kind == "python":
            self.shell(["python", "-c", self.local(step.content)], step.content)
        elif step.content not in NOT_RUN:
            self.type(step.content)

    def type(self, command: str) -> None:
        parts = python_part(command)
        if parts is None:
            return self.shell(["bash", "-c", self.local(command)], command)
        module, arguments = parts
        if module == "scripts.serve":
            return self.start_server(arguments)
        if command.startswith(f"python -m {module}"):
            assert call(module, smaller(module, arguments), self.patch) == 0, command
            return None
        program, *before = shlex.split(command)[
            : -len(arguments) or None
        ]  # torchrun, or a reader's own command around ours
        launcher = [sys.executable, "-m", "torch.distributed.run"] if program == "torchrun" else [sys.executable]
        return self.shell([*launcher, *before, *smaller(module, arguments)], command)

    def local(self, text: str) -> str:
        """The server of this test has a port of its own."""
        return text.replace(":8000", f":{self.port}")

    def shell(self, words: list[str], command: str) -> None:
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

    def start_server(self, arguments: list[str]) -> None:
        self.close()
        words = [sys.executable, "-m", "scripts.serve", *arguments, "--port", str(self.port)]
        with open(self.folder / "server.txt", "w") as log:
            self.server = subprocess.Popen(words, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        for _ in range(10 * 60):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5),
            ):
                return
            assert self.server.poll() is None, (self.folder / "server.txt").read_text()
            time.sleep(0.1)
        raise AssertionError("the server never answered")

    def close(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            server.terminate()
            try:
                server.wait(30)
            finally:
                server.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("page", TO_RUN, ids=page_id)
def test_every_command_of_the_page_runs(page, stand_ins, tmp_path, monkeypatch):
    """In the page's order, files written where it writes them. The first that fails ends it, as it would a reader."""
    folder = tmp_path / "checkout"
    shutil.copytree(stand_ins, folder, symlinks=True)
    reader = Reader(folder, monkeypatch)
    try:
        for step in page.steps:
            reader.do(step)
    finally:
        reader.close()


def test_shown_conversations_are_read():
    """Each JSON line that shows a shape of conversation is one: docs/own_data.md."""
    from data.chat import to_messages

    page = Page(ROOT / "docs/own_data.md")
    lines = [line for language, text in page.blocks if language == "json" for line in text.splitlines()]
    conversations = [record for line in lines if "text" not in (record := json.loads(line))]
    assert len(conversations) > 5
    for record in conversations:
        if record == {"messages": record.get("messages")} and len(record["messages"]) == 1:
            continue  # the one that is refused, and shown to be
        assert [message["role"] for message in to_messages(record, page.name)][-2:] == ["user", "assistant"]


def test_yaml_of_the_pages_is_read_as_meant():
    """A fragment in a page is YAML, and none of its values is quietly something else (1e-3 is text to PyYAML)."""
    for page in PAGES:
        for language, text in page.blocks:
            if language == "yaml":
                assert isinstance(yaml.safe_load(text), dict), f"{page.name}: {text[:80]}"
