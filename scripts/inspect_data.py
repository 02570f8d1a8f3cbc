"""What a config's data hold, before anything is prepared or trained: sizes, lengths, duplicates, waste, and how it is learned.

    python -m scripts.inspect_data configs/quickstart/sft.yaml [--documents 20000] [--show 2] [--json FILE] [a.b=value ...]

Every source is read once and tokenised as training would; nothing is written but FILE. It needs the tokenizer
(scripts.train_tokenizer makes it), no GPU and no training. At the end stands how the first documents of each source are learned, in
colour on a terminal: special tokens, and what counts in the loss. In a pipe, or with NO_COLOR, special tokens stand in [brackets] and
what is learned of a conversation between >>> and <<<; a text's tokens are set apart by |.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from data.statistics import Example, SourceStatistics, Statistics, examine
from data.tokenizer import Tokenizer
from data.words import harmless, short_name
from model.flops import total_count
from train import cli
from train.config import RunConfig, load_config
from train.files import replace_file
from train.plan import make_plan, rows_of_step

BAR = 32  # characters of the longest bar
SHOWN_TOKENS = 512  # of an example, at most
BEGINNING = b'{\n "config": '  # of what --json writes
SPECIAL, LEARNED, OTHER, SECOND, END = "\033[1;35m", "\033[32m", "\033[2m", "\033[36m", "\033[0m"


def main() -> int:
    parser = cli.parser(
        __doc__, "python -m scripts.inspect_data configs/quickstart/sft.yaml --documents 20000 --show 2"
    )
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys to set in place of the file's")
    parser.add_argument("--documents", type=_count, metavar="N", help="read the first N of each source alone (all)")
    parser.add_argument(
        "--show", type=_count_or_none, metavar="N", default=1, help="documents of each source to show (1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    arguments = parser.parse_intermixed_args()  # keys to set may stand behind an option too
    config = load_config(arguments.config, arguments.overrides)
    if arguments.json is not None:
        _check_place(arguments.json)  # now rather than after an hour of reading
    rows_of_step(config, ranks=1)  # a mistake in the run's own arithmetic shows at once as well
    tokenizer = Tokenizer.load(config.tokenizer.path)
    statistics = examine(config.data, config.context_length, tokenizer, arguments.documents, arguments.show)
    print(described(config, statistics, tokenizer, arguments.documents))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for name, examples in statistics.examples.items():
        for number, example in enumerate(examples, 1):
            print(f"\n--- {short_name(name)}, document {number}, as it is learned ---")
            print(spelled(example, tokenizer, config.context_length, colour))
    if arguments.json is not None:
        _write(arguments.json, json.dumps(_as_dict(config, statistics, arguments.documents), indent=1) + "\n")
    return 0


def _check_place(path: Path) -> None:
    """Makes the folder. ValueError where FILE is something that this command did not write, such as the config or the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"--json: {path} is a folder; give the name of a file")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(BEGINNING)) != BEGINNING:
                raise ValueError(f"--json: {path} is there already and no result of this command; give another name")


def _write(path: Path, text: str) -> None:
    """Whole or not at all; into what is no plain file, such as a pipe, as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", errors="replace")
    else:
        replace_file(path, text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < len(text) <= 12 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of documents (1 or more)")
    return int(text)


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def described(config: RunConfig, statistics: Statistics, tokenizer: Tokenizer, documents: int | None) -> str:
    """The whole page but the examples."""
    chat = statistics.format == "chat"
    kind = "conversations, packed whole" if chat else "text, cut"
    head = (
        f"{config.name}: {kind} into rows of {statistics.context_length:,} tokens; tokenizer "
        f"{short_name(config.tokenizer.path)}, {tokenizer.vocab_size:,} tokens"
    )
    if documents is not None:
        head += f"\nthe first {documents:,} records of each source alone: what follows is true of them"
    blocks = [head, *(_source(one, statistics) for one in statistics.sources), _mixture(config, statistics, documents)]
    return "\n\n".join([*blocks, _waste(statistics)])


def _source(one: SourceStatistics, statistics: Statistics) -> str:
    chat = statistics.format == "chat"
    unit = "conversations" if chat else "documents"
    left_out = one.records - one.documents
    lines = [short_name(one.name)]

    def line(label: str, text: str) -> None:
        lines.append(f"  {label:<12}{text}")

    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(one.skipped.items(), key=lambda item: -item[1])[:8])
    line(
        "records",
        f"{one.records:,} read, {one.documents:,} of use" + (f", {left_out:,} left out: {reasons}" * bool(left_out)),
    )
    line(
        "text",
        f"{one.characters:,} characters, {one.bytes:,} bytes; {one.tokens:,} tokens, "
        f"{one.bytes / max(1, one.text_tokens):.2f} bytes a token of text",
    )
    line(
        "training",
        f"{one.train_documents:,} {unit}, {one.train_tokens:,} tokens; {one.rows:,} rows"
        + (f", {one.padding:.1%} of them padding" if chat else ""),
    )
    line(
        "held out",
        f"{one.held_out_documents:,} {unit} ({_share(one.held_out_documents, one.documents)}), {one.held_out_tokens:,} tokens",
    )
    fitting = one.train_tokens - one.long_tokens if chat else one.train_tokens
    line("learned", f"{one.learned_tokens:,} tokens, {_share(one.learned_tokens, fitting)} of the training tokens")
    long = f"{one.long_documents:,} {unit} ({_share(one.long_tokens, one.train_tokens)} of the training tokens)"
    if chat:
        remedy = "; raise data.context_length" if one.long_documents else ""
        line("too long", f"{long} fit no row and are dropped{remedy}")
    else:
        line("cut", f"{long} are longer than a row and go on in the next one")
    line(
        "duplicates",
        f"{one.duplicates:,} exact ({_share(one.duplicates, one.documents)}), "
        f"{one.near_duplicates:,} nearly ({_share(one.near_duplicates, one.documents)})",
    )
    lengths = one.lengths
    line(
        "length",
        f"in tokens: median {lengths.quantile(0.5):,}, 90 % up to {lengths.quantile(0.9):,}, "
        f"99 % up to {lengths.quantile(0.99):,}, longest {lengths.longest:,}; a row has {statistics.context_length:,}",
    )
    return "\n".join(lines + _bars(one, statistics.context_length))


def _bars(one: SourceStatistics, context_length: int) -> list[str]:
    octaves = one.lengths.octaves()
    most = max((n for _, _, n in octaves), default=1)
    lines = []
    for low, high, n in octaves:
        mark = "  <- a row" if low <= context_length <= high else ""
        bar = "#" * -(-BAR * n // most)
        lines.append(f"  {low:>10,} - {high:<9,} {bar:<{BAR}} {n:>10,} {_share(n, one.documents):>7}{mark}")
    return lines


def _mixture(config: RunConfig, statistics: Statistics, documents: int | None) -> str:
    total = max(1, statistics.rows_per_epoch)
    rows = [f"{'one epoch':<24}{'weight':>8}{'rows':>12}{'share':>8}{'in the run':>16}"]
    epochs, sentence = _epochs(config, statistics, documents)
    for one in statistics.sources:
        times = f"{epochs * one.weight:.2f} times" if epochs is not None else "-"
        share = _share(one.rows_per_epoch, total)
        rows.append(f"  {short_name(one.name):<22}{one.weight:>8g}{one.rows_per_epoch:>12,}{share:>8}{times:>16}")
    rows.append(sentence)
    held_out = sum(one.held_out_documents for one in statistics.sources)
    rows.append(
        f"of {held_out:,} held-out documents {statistics.overlap:,} are trained on as well, word for word, and "
        f"{statistics.near_overlap:,} nearly (looked for among {statistics.compared:,})"
    )
    return "\n".join(rows)


def _epochs(config: RunConfig, statistics: Statistics, documents: int | None) -> tuple[float | None, str]:
    """Passes over the weighted sources in the run, and the sum that gives them; None where not all was read."""
    rows = statistics.rows_per_epoch
    if rows == 0:
        return None, "no row: there is nothing to train on"
    if documents is not None and any(one.records == documents for one in statistics.sources):
        return None, "how often the run reads them shows when all is read (without --documents)"
    plan = make_plan(config, rows, ranks=1)
    epochs, tokens = plan.steps * plan.rows_per_step / rows, plan.steps * plan.tokens_per_step
    active = total_count(config.model).active
    return epochs, (
        f"the run: {plan.steps:,} steps x {plan.tokens_per_step:,} tokens = {tokens:,} tokens, {epochs:.2f} epochs of "
        f"{rows * statistics.context_length:,}; {tokens / active:.1f} tokens per active parameter"
    )


def _waste(statistics: Statistics) -> str:
    """What costs most, of all sources, largest share first."""
    found: list[tuple[float, str]] = []
    for one in statistics.sources:
        name = short_name(one.name)
        for reason, n in one.skipped.items():
            found.append((n / one.records, f"of the records of {name} left out: {reason}"))
        if statistics.format == "chat":
            found.append((one.long_tokens / max(1, one.train_tokens), f"of the tokens of {name} too long for a row"))
            found.append((one.padding, f"of the rows of {name} padding"))
        found.append((one.duplicates / max(1, one.documents), f"of {name} exact copies"))
        found.append((one.near_duplicates / max(1, one.documents), f"of {name} near copies"))
    lines = [f"  {share:>6.1%}  {text}" for share, text in sorted(found, reverse=True)[:6] if share >= 0.0005]
    return "\n".join(["where most is lost", *(lines or ["  nowhere: nothing left out, no copies"])])


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def spelled(example: Example, tokenizer: Tokenizer, context_length: int, colour: bool) -> str:
    """The first row of an example's text, its special tokens and what is learned of it set off."""
    ids, mask = example
    shown = min(len(ids), context_length, SHOWN_TOKENS)
    pieces = _conversation(ids[:shown], mask, tokenizer, colour) if mask else _text(ids[:shown], tokenizer, colour)
    rest = f"\n... and {len(ids) - shown:,} tokens more" if shown < len(ids) else ""
    if mask and len(ids) > context_length:
        rest += ": it fits no row, is dropped, and nothing of it is learned"
    return "".join(pieces) + rest


def _conversation(ids: list[int], mask: list[int], tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.im_start_id, tokenizer.im_end_id}
    for learned, part in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
        pieces = []
        for is_special, group in itertools.groupby((token for token, _ in part), key=special.__contains__):
            text = harmless(tokenizer.decode(list(group), skip_special_tokens=False))
            if colour:
                style = SPECIAL if is_special else LEARNED if learned else OTHER
                pieces.append(f"{style}{text}{END}")
            else:
                pieces.append(f"[{text}]" if is_special else text)
        text = "".join(pieces)
        yield f">>>{text}<<<" if learned and not colour else text


def _text(ids: list[int], tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    """Token by token; those that share a character, together."""
    special = (tokenizer.bos_id, tokenizer.eos_id)
    held: list[int] = []
    number = 0
    for i, token in enumerate(ids):
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(held) < 4 and i + 1 < len(ids) and ids[i + 1] not in special:
            continue
        text, held = harmless(text), []
        if token in special:
            yield f"{SPECIAL}{text}{END}" if colour else f"[{text}]"
            continue
        number += 1
        bar = "|" if ids[i + 1 : i + 2] and ids[i + 1] not in special else ""
        yield f"{LEARNED if number % 2 else SECOND}{text}{END}" if colour else f"{text}{bar}"


def _as_dict(config: RunConfig, statistics: Statistics, documents: int | None) -> dict:
    epochs, _ = _epochs(config, statistics, documents)
    return {
        "config": config.name,
        "format": statistics.format,
        "context_length": statistics.context_length,
        "documents_read_of_each": documents,
        "sources": {one.name: one.as_dict() for one in statistics.sources},
        "rows_per_epoch": statistics.rows_per_epoch,
        "epochs": epochs,
        "held_out_also_trained_on": statistics.overlap,
        "held_out_nearly_trained_on": statistics.near_overlap,
    }


if __name__ == "__main__":
    cli.run(main)
