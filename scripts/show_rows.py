"""Shows the text of rows that a run trained on: those a bad step names, or any others.

    python -m scripts.show_rows runs/quickstart-pretrain 1200 1215
    python -m scripts.show_rows runs/quickstart-sft 7 --tokens        every token by itself, with its id

Rows are numbered from 0 in the order in which they are read, over all epochs. Special tokens are shown by name and padding
is left out; of a conversation, what is learned stands between >>> and <<<. Characters that a terminal would obey are escaped.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from data.dataset import IGNORED, TrainRows
from data.prepare import open_prepared
from data.tokenizer import Tokenizer
from data.words import harmless
from train import cli
from train.config import RunConfig, load_config

LAST_POSITION = 2**40  # no run gets there
ROWS_AT_A_TIME = 64


def main() -> None:
    parser = cli.parser(__doc__.partition("\n")[0], "python -m scripts.show_rows runs/quickstart-pretrain 1200 1215")
    parser.add_argument("run", metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("first", metavar="FIRST", type=_position, help="number of the first row, from 0")
    parser.add_argument("last", metavar="LAST", type=_position, nargs="?", help="number of the last one (FIRST)")
    parser.add_argument("--tokens", action="store_true", help="one line a token: id, learned or not, text")
    arguments = parser.parse_args()
    last = arguments.first if arguments.last is None else arguments.last
    if last < arguments.first:
        raise ValueError(f"LAST: {last} is before FIRST, {arguments.first}; give the smaller number first")
    config, tokenizer = _open(Path(arguments.run))
    masked = config.data.document_mask or config.data.format == "chat"
    rows = open_prepared(config.data, tokenizer).train_rows(config.context_length, masked, config.seed)
    for start in range(arguments.first, last + 1, ROWS_AT_A_TIME):
        for row in _rows(rows, start, min(start + ROWS_AT_A_TIME, last + 1)):
            print(_described(row, rows, tokenizer, arguments.tokens, config.data.format == "chat"))


def _position(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 13 or int(text) > LAST_POSITION:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of a row (0 to {LAST_POSITION})")
    return int(text)


def _open(run: Path) -> tuple[RunConfig, Tokenizer]:
    """The config a run was started with, and its own tokenizer."""
    folder = run.parent.parent if run.parent.name == "checkpoints" else run
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: no run (it has no config.yaml); give a run folder, or a checkpoint in it")
    return load_config(folder / "config.yaml"), Tokenizer.load(folder / "tokenizer")


def _rows(rows: TrainRows, first: int, end: int) -> Iterator[tuple[int, list[int], list[bool]]]:
    """(position, ids, whether each is learned) without the padding."""
    batch = rows.batch(first, end - first)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"], dtype=torch.bool))
    for i, position in enumerate(range(first, end)):
        ids, labels = batch["input_ids"][i, real[i]], batch["labels"][i, real[i]]
        yield position, ids.tolist(), labels.ne(IGNORED).tolist()


def _described(
    row: tuple[int, list[int], list[bool]], rows: TrainRows, tokenizer: Tokenizer, by_token: bool, chat: bool
) -> str:
    position, ids, learned = row
    epoch, place = divmod(position, rows.rows_per_epoch)
    name, number = rows.origin(position)
    head = (
        f"--- row {position}: epoch {epoch + 1}, {place + 1} of {rows.rows_per_epoch:,}; row {number} of source {name!r}; "
        f"{len(ids)} tokens"
    )
    if by_token:
        lines = [
            f"{token:>8}  {'learned' if is_learned else '-':<7}  {_spelled(tokenizer, [token])!r}"
            for token, is_learned in zip(ids, learned)
        ]
        return "\n".join([head, *lines])
    text = ""
    for is_learned, part in itertools.groupby(zip(ids, learned), key=lambda pair: pair[1] and chat):
        spelled = harmless(_spelled(tokenizer, [token for token, _ in part]))
        text += f">>>{spelled}<<<" if is_learned else spelled
    return f"{head}\n{text}"


def _spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


if __name__ == "__main__":
    cli.run(main)
