"""A run as a folder that transformers opens (AutoModelForCausalLM, AutoTokenizer; 4.57 and 5), without remote code.

    python -m scripts.export_hf runs/quickstart-sft exported/quickstart [--dtype bfloat16] [--license apache-2.0]

OUT gets config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json, README.md (the model card) and
SHA256SUMS. The class is the plainest that computes exactly this model (scripts/formats/hf_folder.py); a model that none computes is
refused, naming the key. Before the folder gets its name, its files are read back and run through a forward pass of their own
(scripts/formats/hf_reference.py): logits and token ids must be the run's, or nothing is left.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.integrity import SUMS, damage, read_checksums, write_checksums
from data.tokenizer import Tokenizer
from model import ModelConfig, MoEForCausalLM
from scripts.formats.hf_card import ABOUT_SHARED, check_license, model_card
from scripts.formats.hf_folder import Layout, choose_layout, config_json, to_tensors
from scripts.formats.hf_reference import Reference
from train import cli
from train.checkpoint import Run, open_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of logits in float64, where they spread by 1: 2e-14 is found. YaRN's frequencies are float32 and computed in another order of
# operations: up to 3e-6 is found over 512 tokens.
TOLERANCE, YARN_TOLERANCE = 1e-8, 2e-5
CHECKED_TOKENS = 512  # of a row that is compared, at most
HARD_TEXTS = (  # what tokenizers differ on
    "The quick brown fox jumps over the lazy dog, and nobody asked why; it had been raining since Tuesday.",
    "0 12 345 6789 3.14159 1,000,000 2026-11-22 0x1F 1e-5",
    "  two spaces,\ttabs\t\tand\n\nempty lines\r\n    indented   trailing   ",
    "It's don't I'LL we've THEY'RE o'clock 'quoted' \u201ccurly\u201d \u2014 dash \u2026",
    "na\u00efve caf\u00e9 e\u0301 \u00e9 \u00df \u0130stanbul \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u041f\u0440\u0438\u0432\u0435\u0442",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002\u4e2d\u6587\u5b57\u7b26\uff0c\u6ca1\u6709\u7a7a\u683c\uff01 \ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f469\u200d\U0001f52c \U0001f1e8\U0001f1ed \U0001f44d\U0001f3fd \u2764\ufe0f \ufffd\u00a0\u200b\u3000",
    "def f(x: int) -> int:\n\treturn x**2 + 1  # {[(<>)]} \\ / | ~ ` ^ @ $ % & _ = ;\n",
)
MARK = "minimoe"  # the key of config.json that says whose folder this is


def export(run: Run, out: Path, dtype: str = "float32", license: str | None = None) -> Path:
    """Writes OUT whole or not at all, and returns it. ValueError for a model that no class computes, for an OUT that holds something
    else, and where the files' own logits or ids are not the run's."""
    out = Path(out)
    check_license(license)
    check_place(out)
    config = run.model.config
    layout = choose_layout(config)
    state = {name: tensor.detach().float().cpu() for name, tensor in run.model.state_dict().items()}
    check_run(run, state)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tensors = {name: _in_dtype(name, tensor, dtype) for name, tensor in to_tensors(config, layout, state).items()}
        _save(tensors, partial / "model.safetensors")
        _write_settings(run, layout, dtype, partial)
        check_tensors(partial, tensors)
        del tensors  # twice the model's memory is needed next
        check_logits(partial, config, as_written(config, layout, state, dtype), sample_rows(run))
        check_ids(partial, run.tokenizer)
        (partial / "README.md").write_text(model_card(run, layout, dtype, license), encoding="utf-8")
        write_checksums(partial, sorted(path.name for path in partial.iterdir() if path.name != SUMS))
        _put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def check_run(run: Run, state: dict[str, Tensor]) -> None:
    """ValueError for a run that can be no model: weights that are no numbers, more tokens than embeddings."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{run.checkpoint}: {name} holds what is not a number; export another checkpoint of this run"
            )
    if run.tokenizer.vocab_size > run.model.config.vocab_size:
        raise ValueError(
            f"{run.run_dir / 'tokenizer'}: has {run.tokenizer.vocab_size} tokens, but model.vocab_size is {run.model.config.vocab_size}; "
            "put back the tokenizer that this run was trained with"
        )


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(
            f"{path.parent}: cannot write the weights ({error}); free some disk space and repeat the command"
        ) from None
    path.chmod(0o666 & path.parent.stat().st_mode)  # save_file leaves it to its owner alone, whatever the umask


def _in_dtype(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A copy, contiguous; the selection bias stays float32, as in the class."""
    kept = name.endswith("e_score_correction_bias")
    return tensor.to(torch.float32 if kept else DTYPES[dtype], copy=True).contiguous()


def _write_settings(run: Run, layout: Layout, dtype: str, folder: Path) -> None:
    """Everything but the weights and the card."""
    tokenizer, config = run.tokenizer, run.model.config
    tree = config_json(config, layout, dtype, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    tree[MARK] = {"run": run.config.name, "step": run.step}
    is_chat = run.config.data.format == "chat"
    stops = [tokenizer.im_end_id, tokenizer.eos_id] if is_chat else [tokenizer.eos_id]
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(dict.fromkeys(stops)),
        "pad_token_id": tokenizer.pad_id,
    }
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"model_max_length": config.max_position_embeddings, "padding_side": "left"}
    settings["model_input_names"] = [
        "input_ids",
        "attention_mask",
    ]  # 4.57 would add token_type_ids, which no decoder takes
    for name, content in (
        ("config.json", tree),
        ("generation_config.json", generation),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the folder checks itself


def as_written(config: ModelConfig, layout: Layout, state: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The run's weights as the file holds them: rounded to its dtype, then float64. A factor that went into down_proj is rounded with it."""
    folded = config.routed_scaling_factor if layout.model_type != "glm4_moe" else 1.0
    written = {}
    for name, tensor in state.items():
        factor = folded if name.endswith("experts.down_proj") else 1.0
        kept = torch.float32 if name.endswith("expert_bias") else DTYPES[dtype]
        written[name] = (tensor * factor).to(kept).double() / factor
    return written


def sample_rows(run: Run) -> list[list[int]]:
    """Rows of tokens to compare: real text, what tokenizers stumble over, and the length of the context."""
    limit = min(run.model.config.max_position_embeddings, CHECKED_TOKENS)
    text = "\n".join(HARD_TEXTS)
    ids = [run.tokenizer.bos_id, *run.tokenizer.encode(text)]
    while len(ids) < limit:
        ids += ids
    vocabulary = run.model.config.vocab_size
    spread = [(7919 * i + 13) % vocabulary for i in range(min(limit, 128))]  # tokens from all over the vocabulary
    return [ids[:limit], spread]


def check_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """ValueError unless the file holds these tensors, bit for bit."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for name in sorted(names | tensors.keys()):
            if name not in names or name not in tensors or not torch.equal(file.get_tensor(name), tensors[name]):
                raise ValueError(
                    f"model.safetensors: {name} is not what was written; nothing is left; repeat the command"
                )


@torch.no_grad()
def check_logits(folder: Path, config: ModelConfig, state: dict[str, Tensor], rows: list[list[int]]) -> float:
    """The largest difference between the files' logits and those of `state` (float64), where they spread by 1. ValueError if it
    is more than TOLERANCE, with YaRN more than YARN_TOLERANCE."""
    model = MoEForCausalLM(config).double().eval()
    model.load_state_dict(state, assign=True)
    reference, worst = Reference(folder), 0.0
    allowed = TOLERANCE if config.rope_scaling is None else YARN_TOLERANCE
    for row in rows:
        ids = torch.tensor(row)
        ours, theirs = model(ids.unsqueeze(0)).logits[0], reference.logits(ids)
        difference = float((ours - theirs).abs().max()) / max(float(ours.std()), 1.0)
        if not difference <= allowed:  # NaN is refused too
            raise ValueError(
                f"the exported files give other logits than the run (difference {difference:.2g}, where {allowed:g} is allowed), "
                "so nothing is left; please report this run's config.yaml"
            )
        worst = max(worst, difference)
    return worst


def check_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """ValueError unless tokenizer.json, as other tools run it, gives the run's ids."""
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in HARD_TEXTS:
        theirs, ours = plain.encode(text, add_special_tokens=False).ids, tokenizer.encode(text)
        if theirs != ours:
            raise ValueError(f"tokenizer.json gives other ids than the run for {text[:40]!r}, so nothing is left")


# ------------------------------------------------------------------------------------------------ the folder's place


def check_place(out: Path) -> None:
    """ValueError unless OUT is missing, an empty folder, or an earlier export with nothing else in it."""
    if out.name in ("", ".."):
        raise ValueError(f"{out}: give OUT a name of its own")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out}: is a link or a file, not a folder; give another OUT")
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise ValueError(f"{out}: is a folder with other things in it; give another OUT, or empty it")


def _is_ours(out: Path) -> bool:
    """Whether every file there is one that an export wrote, as it wrote it."""
    try:
        names = read_checksums(out)
        mark = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return False
    known = {path.name for path in out.iterdir()} == {*names, SUMS}
    return known and isinstance(mark, dict) and MARK in mark and damage(out, names) is None


def _put_in_place(partial: Path, out: Path) -> None:
    """Renames; an earlier export of ours goes, once the new one is whole."""
    check_place(out)
    old = out.with_name(f".{out.name}.old")
    if not out.is_dir():
        partial.rename(out)
    else:
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    parser = cli.parser(
        "Writes a run as a folder that transformers (4.57 and 5), and what reads its folders, opens without remote code.",
        "python -m scripts.export_hf runs/quickstart-sft exported/quickstart --license apache-2.0",
    )
    parser.add_argument("run", help="run folder, or one checkpoint in it")
    parser.add_argument(
        "out", type=Path, help="folder to write; an earlier export there is replaced, anything else is not"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the weights (default float32, exact)"
    )
    parser.add_argument("--license", help="for the model card: an identifier such as apache-2.0, mit or cc-by-4.0")
    arguments = parser.parse_args()
    check_place(arguments.out)
    run = open_run(arguments.run, device="cpu", precision="float32")
    layout = choose_layout(run.model.config)
    out = export(run, arguments.out, arguments.dtype, arguments.license)
    size = (out / "model.safetensors").stat().st_size / 2**20
    print(
        f"{out}: {layout.architecture}, {size:,.1f} MiB in {arguments.dtype}; logits and token ids checked against {arguments.run}"
    )
    if layout.shared in ABOUT_SHARED:
        print(ABOUT_SHARED[layout.shared])
    return 0


if __name__ == "__main__":
    cli.run(main)
