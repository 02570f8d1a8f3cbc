"""Trains the byte-level BPE that a config names, on the training documents of its sources.

    python -m scripts.train_tokenizer configs/quickstart/pretrain.yaml

Writes tokenizer.path (tokenizer.json and what transformers needs); a second call finds it and does nothing.
"""

from __future__ import annotations

import time
from pathlib import Path

from data.sources import training_texts
from data.tokenizer import Tokenizer
from train import cli
from train.config import RunConfig, load_config


def train_tokenizer(config: RunConfig, progress: bool = True) -> Tokenizer:
    """The tokenizer at `tokenizer.path`, trained first if there is none. ValueError as Tokenizer's."""
    path = Path(config.tokenizer.path)
    if path.suffix == ".json" or (path / "tokenizer.json").exists():
        return Tokenizer.load(path)
    texts = training_texts(config.data, config.tokenizer.train_bytes)
    tokenizer = Tokenizer.train(texts, config.model.vocab_size, show_progress=progress)
    tokenizer.save(path)
    return tokenizer


def main() -> None:
    parser = cli.parser(
        __doc__.partition("\n")[0], "python -m scripts.train_tokenizer configs/quickstart/pretrain.yaml"
    )
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys to set in place of the file's")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    known = (Path(config.tokenizer.path) / "tokenizer.json").exists()
    started = time.perf_counter()
    tokenizer = train_tokenizer(config)
    done = "found" if known else f"trained in {time.perf_counter() - started:.1f} s"
    print(f"tokenizer: {config.tokenizer.path}: {tokenizer.vocab_size} tokens, {done}")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"{config.tokenizer.path}; raise it, or give another tokenizer.path"
        )


if __name__ == "__main__":
    cli.run(main)
