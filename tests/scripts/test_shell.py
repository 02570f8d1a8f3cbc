"""The shell scripts: they parse, and set-up, quickstart and test.sh behave with a stand-in for Python."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])

# Does what the quickstart's commands leave behind, notes each call, and takes its time where the test asks for it.
FAKE_PYTHON = """#!/usr/bin/env bash
if [ "$2" = "import torch" ]; then exit 0; fi
if [ "$1" != -m ]; then exec {python} "$@"; fi
if [ "$2" = torch.distributed.run ]; then shift 5; fi  # --standalone --nproc-per-node 2: what it launches counts
echo "$2 $3" >>calls.txt
if [ "$2" = "$(cat slow.txt 2>/dev/null)" ]; then exec {python} slow.py "$2"; fi
case "$2" in
    train.*)
        checkpoint=runs/quickstart-${{2#train.}}/checkpoints/step-1
        mkdir -p $checkpoint
        touch -d "1 hour ago" $checkpoint/model.safetensors ;;
    eval.evaluate) touch $3/evaluation.json ;;
esac
"""
SLOW = """
import signal, sys, time
signals = 0
def save_and_leave(*_):
    global signals
    signals += 1
    if signals == 1:
        time.sleep(1)
        print(sys.argv[1], "stopped by", signals, "signal", file=open("calls.txt", "a"))
        sys.exit(0)  # the worst case: an interrupted command that claims success
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save_and_leave)
time.sleep(60)
"""
COMMANDS = [
    "scripts.train_tokenizer configs/quickstart/tokenizer.yaml",
    "scripts.prepare_data configs/quickstart/pretrain.yaml",
    "train.pretrain configs/quickstart/pretrain.yaml",
    "scripts.prepare_data configs/quickstart/sft.yaml",
    "train.sft configs/quickstart/sft.yaml",
    "eval.evaluate runs/quickstart-pretrain",
    "eval.evaluate runs/quickstart-sft",
    "eval.report runs/quickstart-sft",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_script(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_ci_calls_the_whole_suite():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert 'scripts/test.sh" --all' in (ROOT / ".ci/run").read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts with a stand-in for Python that does no work."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup.sh", "quickstart.sh", "test.sh"):
        (tmp_path / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    fake = tmp_path / "fake-python"
    fake.write_text(FAKE_PYTHON.format(python=sys.executable))
    fake.chmod(0o755)
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


def start(checkout: Path, script: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", f"scripts/{script}", *arguments],
        cwd=checkout,
        env={**os.environ, "MINIMOE_PYTHON": str(checkout / "fake-python")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def calls(checkout: Path) -> list[str]:
    path = checkout / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_call(checkout: Path, call: str) -> None:
    for _ in range(200):
        if any(line.startswith(call) for line in calls(checkout)):
            return
        time.sleep(0.05)
    raise AssertionError(f"{call} was never called: {calls(checkout)}")


def test_quickstart_runs_every_stage_and_says_where_things_are(checkout):
    process = start(checkout, "quickstart.sh")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert calls(checkout) == COMMANDS
    assert "runs/quickstart-sft/report.html" in output
    assert "-m scripts.chat runs/quickstart-sft" in output
    times = json.loads((checkout / "runs/quickstart-sft/stages.json").read_text())
    assert {"setup", "tokenizer", "prepare-pretrain", "pretrain", "prepare-sft", "sft"} <= times.keys()
    assert all(isinstance(seconds, int) for seconds in times.values())
    for stage in times:
        assert f"== {stage} took" in output


@pytest.mark.slow
def test_a_second_quickstart_does_not_evaluate_again_until_a_checkpoint_is_newer(checkout):
    start(checkout, "quickstart.sh").communicate(timeout=60)
    (checkout / "calls.txt").unlink()
    # The stand-in's training dates its checkpoint an hour back: nothing new to evaluate.
    start(checkout, "quickstart.sh").communicate(timeout=60)
    assert not [call for call in calls(checkout) if call.startswith("eval.evaluate")]
    os.utime(checkout / "runs/quickstart-sft/evaluation.json", (0, 0))
    start(checkout, "quickstart.sh").communicate(timeout=60)
    assert "eval.evaluate runs/quickstart-sft" in calls(checkout)
    assert "eval.evaluate runs/quickstart-pretrain" not in calls(checkout)


@pytest.mark.parametrize(
    "how", ["interrupt the group", "terminate the group", pytest.param("terminate the script", marks=pytest.mark.slow)]
)
def test_an_interrupted_quickstart_stops_its_command_and_keeps_the_time(checkout, how):
    (checkout / "slow.txt").write_text("train.pretrain")
    process = start(checkout, "quickstart.sh")
    wait_for_call(checkout, "train.pretrain")
    time.sleep(1.2)
    if how == "terminate the script":
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGINT if how == "interrupt the group" else signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    wanted = "train.pretrain stopped by 1 signal"
    assert calls(checkout)[-1] == wanted, "left running, cut off while it saved, or followed by the next stage"
    assert "the same command goes on from here" in output
    assert json.loads((checkout / "runs/quickstart-stages.json").read_text())["pretrain"] >= 1


def test_a_failing_stage_ends_the_quickstart_with_its_exit_code(checkout):
    fake = checkout / "fake-python"
    fake.write_text(fake.read_text().replace('case "$2" in', 'if [ "$2" = train.sft ]; then exit 7; fi\ncase "$2" in'))
    process = start(checkout, "quickstart.sh")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "stopped in stage sft" in output
    assert calls(checkout)[-1].startswith("train.sft")


def test_test_script_lints_then_hands_its_arguments_to_pytest(checkout):
    process = start(checkout, "test.sh", "--all", "tests/model", "-x")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert calls(checkout) == ["ruff --version", "ruff check", "pytest --all"]


@pytest.mark.parametrize("function, file", [("set_up", "requirements.txt"), ("set_up_beside", "requirements-old.txt")])
def test_set_up_installs_a_requirements_file_once_and_again_when_it_changed(tmp_path, function, file):
    """A ready .venv with a pip that only takes notes."""
    bin_folder = tmp_path / ".venv/bin"
    bin_folder.mkdir(parents=True)
    fake = bin_folder / "python"
    fake.write_text(
        f'#!/usr/bin/env bash\nif [ "$1" = -m ]; then echo "$*" >>calls.txt; exit; fi\nexec {sys.executable} "$@"\n'
    )
    fake.chmod(0o755)
    (tmp_path / file).write_text("one\n")

    def installs() -> int:
        environment = {key: value for key, value in os.environ.items() if key != "MINIMOE_PYTHON"}
        command = f"source {ROOT}/scripts/setup.sh; PYTHON=.venv/bin/python; {function} {file}"
        subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=environment, check=True, timeout=30)
        return sum("pip install" in line for line in calls(tmp_path))

    assert installs() == 1
    assert installs() == 1
    (tmp_path / file).write_text("two\n")
    assert installs() == 2
    beside = [call for call in calls(tmp_path) if "--target .venv/old " in call]
    assert len(beside) == (2 if function == "set_up_beside" else 0), "into a folder of its own"
