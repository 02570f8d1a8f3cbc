"""Writes a run as one GGUF file for llama.cpp, and a Modelfile for Ollama beside it.

    python -m scripts.export_gguf runs/quickstart-sft quickstart.gguf                  exactly the run, in float32
    python -m scripts.export_gguf runs/quickstart-sft quickstart.gguf --type q8_0      about a quarter of the size

Weights, tokenizer, special tokens and, for a run that learned to chat, the chat template are all in the file. Before it
gets its name it is read back: each tensor, key and token is compared with the run's, and its logits, computed from the file
alone as llama.cpp does, with those of the run. A file that differs is not left behind.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from data.tokenizer import IM_END, IM_START
from scripts.formats import gguf_layout
from scripts.formats.gguf_check import difference
from scripts.formats.gguf_file import BLOCK, TYPES, WANTED_BY, GGUFFile, write
from scripts.formats.gguf_tokenizer import tokenizer_metadata
from train import cli
from train.checkpoint import Run, open_run
from train.files import flush_to_disk, replace_file


def export(run: Run, out: Path, wanted: str = "f32") -> list[Path]:
    """Writes `out` and its Modelfile; returns both. ValueError where llama.cpp cannot represent the run, where something
    stands in the way, or where the file does not give back the run. `wanted`: one of TYPES."""
    cli.need("gguf", WANTED_BY)
    modelfile = out.with_suffix(".Modelfile")
    _check_places(out, modelfile)
    config, tokenizer = run.config, run.tokenizer
    chat = config.data.format == "chat"
    values = gguf_layout.metadata(config.model, config.name, f"trained with MiniMoE, step {run.step:,}", wanted)
    values |= tokenizer_metadata(run.run_dir / "tokenizer", tokenizer, config.model.vocab_size, chat)
    weights = {name: tensor.detach().cpu() for name, tensor in run.model.state_dict().items()}
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed; or a link, not to be followed
    try:
        write(partial, config.model, weights, values, wanted)
        problem = difference(partial, run.model, tokenizer, weights, values, wanted)
        if problem:
            raise ValueError(
                f"{out}: read back, the file is not the run ({problem}); nothing was left. Please report this"
            )
        flush_to_disk(partial)
        # The small one first: where the disk has no room for it, neither is left.
        replace_file(modelfile, modelfile_text(out.name, config.model.max_position_embeddings, chat))
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return [out, modelfile]


def _check_places(out: Path, modelfile: Path) -> None:
    if out.suffix != ".gguf":
        raise ValueError(f"OUT: {out.name!r} must end in .gguf, by which llama.cpp and Ollama know such files")
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", out.name):
        raise ValueError(
            f"OUT: {out.name!r} stands in the Modelfile too: use letters, digits, '.', '_', '+' and '-' alone"
        )
    if not out.parent.is_dir():
        raise ValueError(f"OUT: there is no folder {out.parent}; make it first")
    for path in (out, modelfile):
        if os.path.lexists(path):
            raise ValueError(f"OUT: {path} is already there; remove it, or give another name")


def modelfile_text(file_name: str, context: int, chat: bool) -> str:
    """`ollama create NAME -f MODELFILE` reads it. Ollama itself puts the first token, <|bos|>, before the prompt."""
    if chat:
        turn = f"{IM_START}{{{{ .Role }}}}\n{{{{ .Content }}}}{IM_END}\n"
        template = f"{{{{ range .Messages }}}}{turn}{{{{ end }}}}{IM_START}assistant\n"
    else:
        template = "{{ .Prompt }}"  # it continues text
    lines = [
        f"FROM ./{file_name}",
        f'TEMPLATE """{template}"""',
        "PARAMETER temperature 0.3",  # as scripts.chat
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 0",
        "PARAMETER repeat_penalty 1.0",
        "PARAMETER num_predict 256",
        f"PARAMETER num_ctx {context}",
    ]
    if chat:
        lines += [f"PARAMETER stop {IM_END}", f"PARAMETER stop {IM_START}"]
    return "\n".join(lines) + "\n"


HOW_TO_RUN = """\
Writes a run as one GGUF file for llama.cpp and a Modelfile for Ollama beside it; the file is read back and compared first.

with llama.cpp:
  llama-cli -m model.gguf                               chat, with a run that learned to
  llama-completion -m model.gguf -p "Once upon a time"  text to continue, with a run that was only pretrained
  llama-server -m model.gguf                            a server with a page, on port 8080
with Ollama (it asks for a file of its own):
  ollama create mymodel -f model.Modelfile && ollama run mymodel
from Python (pip install llama-cpp-python):
  llama_cpp.Llama("model.gguf").create_chat_completion([{"role": "user", "content": "Hello"}])
"""


def main() -> int:
    parser = cli.parser(HOW_TO_RUN, "python -m scripts.export_gguf runs/quickstart-sft model.gguf --type q8_0")
    parser.add_argument("run", metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="file to write; OUT.Modelfile comes beside it")
    parser.add_argument(
        "--type",
        choices=TYPES,
        default="f32",
        help="how matrices are stored; norms, biases and routers are float32 always (default: f32, the run's own numbers)",
    )
    arguments = parser.parse_args()
    cli.need("gguf", WANTED_BY)
    run = open_run(arguments.run, device="cpu", precision="float32")
    out, modelfile = export(run, arguments.out, arguments.type)
    architecture = gguf_layout.architecture_of(run.config.model)
    print(
        f"{out}: {out.stat().st_size:,} bytes, {arguments.type}, architecture {architecture}; every tensor, the tokens and the "
        "logits were compared with the run"
    )
    others = sum(
        GGUFFile(out).kind(entry.name) != arguments.type
        for entry in gguf_layout.entries(run.config.model)
        if not entry.plain
    )
    if others:
        print(f"{others} matrices with rows that are no multiple of {BLOCK} numbers are stored as f16")
    dense = gguf_layout.dense_among_experts(run.config.model)
    if dense:
        layers = ", ".join(map(str, dense))
        print(
            f"llama.cpp knows no dense layer behind a MoE layer: layer {layers} got experts of zeros, which cost space and time"
        )
    print(f"{modelfile}: for ollama create")
    return 0


if __name__ == "__main__":
    cli.run(main)
