"""A folder of transformers as a run, so that a small public model can be chatted with, evaluated and fine-tuned here.

    python -m scripts.import_hf FOLDER my-model [--chat]          makes runs/my-model; with a slash in it, RUN is a path

FOLDER is what transformers 4 or 5 saves, or what a hub repository holds: config.json, *.safetensors, tokenizer.json. The classes are Llama,
Qwen3, Mixtral, Qwen2Moe, Qwen3Moe and Glm4Moe; what our model does not compute is refused, naming the key. The run has one checkpoint, at
step 0: train.init_from, scripts.chat, eval.evaluate, scripts.export_hf take it like any other. A tokenizer without ChatML's tokens or
without a token for a document's start gets them, and the embedding rows for them (the mean of the others), which is said.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from data.chat import CHAT_TEMPLATE
from data.tokenizer import Tokenizer
from data.words import short, short_name
from model import MoEForCausalLM
from model.flops import total_count
from scripts.formats.hf_files import read_json
from scripts.formats.hf_reading import read_folder
from scripts.formats.hf_state import Foreign
from scripts.formats.hf_tokenizer import Adopted, adopt_tokenizer
from train import checkpoint, cli
from train.config import RunConfig, from_dict, to_yaml
from train.files import replace_file
from train.guard import GuardState
from train.progress import Progress, TrainingState

LONGEST_ROWS = 1024  # tokens of a training row, unless a config says otherwise


def import_folder(folder: Path, run_dir: Path, is_chat: bool) -> tuple[RunConfig, list[str]]:
    """Writes the run folder whole or not at all; its config, and what a person should know. ValueError where it cannot be."""
    if run_dir.is_symlink() or (run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))):
        raise ValueError(f"{short_name(run_dir)}: is already there; give the run another name, or remove it")
    config = run_config(run_dir, is_chat)  # a name that cannot be one is refused before anything large is read
    adopted = adopt_tokenizer(folder)
    tokenizer = adopted.tokenizer
    foreign = read_folder(folder)
    notes = [*foreign.notes, *fit_embedding(foreign, adopted), *_habits(folder, tokenizer, is_chat)]
    config = run_config(run_dir, is_chat, foreign)
    check_state(foreign)
    notes.insert(0, f"{foreign.architecture} with {total_count(foreign.config).total:,} parameters")
    partial = run_dir.with_name(f".{run_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)  # nothing is written through a link that lies there
        tokenizer.save(partial / "tokenizer")
        replace_file(partial / "config.yaml", to_yaml(config))
        replace_file(partial / "log.txt", "".join(f"imported: {note}\n" for note in notes))
        checkpoint.write(partial, checkpoint.Snapshot(0, foreign.state, {}, first_state(tokenizer), to_yaml(config)))
        if run_dir.is_dir():
            run_dir.rmdir()  # it is empty
        partial.rename(run_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config, notes


def run_config(run_dir: Path, is_chat: bool, foreign: Foreign | None = None) -> RunConfig:
    """What the run folder says of itself: the model, its tokenizer, no data."""
    tree = {
        "name": run_dir.name,
        "runs_dir": str(run_dir.parent),
        "tokenizer": {"path": str(run_dir / "tokenizer")},
        "data": {"format": "chat" if is_chat else "text"},
    }
    if foreign is not None:
        tree["model"] = asdict(foreign.config)
        tree["data"]["context_length"] = min(foreign.config.max_position_embeddings, LONGEST_ROWS)
    return from_dict(tree, "RUN")


def first_state(tokenizer: Tokenizer) -> dict:
    """state.json of a run that has not begun."""
    return asdict(TrainingState(0, 1, Progress(), GuardState(), {}, tokenizer.fingerprint))


def fit_embedding(foreign: Foreign, adopted: Adopted) -> list[str]:
    """Gives added tokens rows in the embedding and the head: the mean of the rows there were. What to tell the person."""
    config, state = foreign.config, foreign.state
    tokenizer, added, promoted = adopted
    rows = config.vocab_size
    own = [i for i in range(tokenizer.vocab_size) if i not in added.values()]
    if own and own[-1] >= rows:
        raise ValueError(
            f"tokenizer.json: it has ids up to {own[-1]}, but config.json says vocab_size: {rows}; this is another model's tokenizer"
        )
    notes = []
    if promoted:
        names = ", ".join(f"{name} ({i})" for name, i in promoted.items())
        notes.append(f"plain tokens made special: {names}; their embeddings stay as they were learned")
    if not added:
        return notes
    size = max(rows, tokenizer.vocab_size)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in state:
            mean = state[name].mean(0, keepdim=True)
            state[name] = torch.cat((state[name], mean.expand(size - rows, -1)))
            state[name][list(added.values())] = mean
    foreign.config = replace(config, vocab_size=size)
    grown = f", vocab_size {rows} -> {size}" if size > rows else ""
    names = ", ".join(f"{name} ({i})" for name, i in added.items())
    notes.append(
        f"special tokens added: {names}{grown}; their embeddings are the mean of the others until they are trained"
    )
    return notes


def check_state(foreign: Foreign) -> None:
    """Our own invariant: the tensors are exactly those of a model of this config."""
    with torch.device("meta"):
        expected = checkpoint.model_tensors(MoEForCausalLM(foreign.config))

    def shapes(tensors: dict[str, Tensor]) -> dict:
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    assert shapes(foreign.state) == shapes(expected), set(shapes(foreign.state).items()) ^ set(shapes(expected).items())


def _habits(folder: Path, tokenizer: Tokenizer, is_chat: bool) -> list[str]:
    """Where the model was made for another way of ending texts and writing conversations than ours."""
    path, notes = folder / "tokenizer_config.json", []
    settings = read_json(path) if path.is_file() else {}
    theirs, ours = settings.get("eos_token"), tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
    theirs = theirs.get("content") if isinstance(theirs, dict) else theirs
    if theirs is not None and theirs != ours:
        notes.append(f"a text ends with {short(ours)} here; this model may have learned {short(theirs)}")
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (
            (folder / "chat_template.jinja").open(encoding="utf-8", errors="replace").read(len(CHAT_TEMPLATE) + 1)
        )
    if template is None or template == CHAT_TEMPLATE:
        return notes
    notes.append("its chat template is not kept: conversations here are plain ChatML")
    return (
        notes
        if is_chat
        else [*notes, "it has a chat template, so it may know turns: --chat imports it as a chat model"]
    )


def main() -> int:
    parser = cli.parser(
        "Makes a run of a folder that transformers saved: one checkpoint, at step 0.",
        "python -m scripts.import_hf ~/models/small-moe small-moe --chat && python -m scripts.chat runs/small-moe",
    )
    parser.add_argument("folder", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    parser.add_argument("run", help="name of the new run in runs/, or a path with a slash in it")
    parser.add_argument(
        "--chat", action="store_true", help="the model knows ChatML turns: scripts.chat asks it questions"
    )
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        raise ValueError(f"{short_name(arguments.folder)}: is no folder; give one that transformers saved")
    run_dir = Path(arguments.run) if "/" in arguments.run else Path("runs") / arguments.run
    config, notes = import_folder(arguments.folder, run_dir, arguments.chat)
    print("\n".join(f"{run_dir}: {note}" for note in notes))
    print(
        f"to fine-tune it, begin a config with `base: {run_dir}/config.yaml` (relative to that file), a name of its own,"
    )
    print(
        f"data, and train: init_from: {run_dir}; its rows have data.context_length: {config.context_length} unless you change it"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
