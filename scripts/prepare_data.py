"""Tokenises a config's sources into shards under data.cache_dir. A second call finds them and does nothing.

    python -m scripts.prepare_data configs/quickstart/pretrain.yaml

Training does it by itself where it was left out; by hand it shows what is left out of each source, and why.
"""

from __future__ import annotations

import time

from data.prepare import open_prepared, prepare
from data.tokenizer import Tokenizer
from train import cli
from train.config import load_config


def main() -> None:
    parser = cli.parser(__doc__.partition("\n")[0], "python -m scripts.prepare_data configs/quickstart/pretrain.yaml")
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys to set in place of the file's")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    started = time.perf_counter()
    folder = prepare(config.data, tokenizer)
    index = open_prepared(config.data, tokenizer).index
    print(f"{'source':<20} {'train tokens':>14} {'documents':>10} {'held-out tokens':>16} {'documents':>10}  skipped")
    for source in index["sources"]:
        train, held_out = source["train"], source["held_out"]
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in source["skipped"].items()) or "-"
        print(
            f"{source['name']:<20} {train['tokens']:>14,} {train['documents']:>10,} "
            f"{held_out['tokens']:>16,} {held_out['documents']:>10,}  {skipped}"
        )
    print(f"shards in {folder}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    cli.run(main)
