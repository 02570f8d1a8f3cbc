"""Pretrains a language model on documents.

    python -m train.pretrain configs/quickstart/pretrain.yaml [a.b=value ...]
    torchrun --nproc-per-node 2 -m train.pretrain configs/quickstart/pretrain.yaml

The same command again resumes a run that was stopped. Exit code 0: finished; 143 or 130: stopped by a signal after saving.
"""

from __future__ import annotations

from train import cli
from train.config import load_config


def main() -> int:
    parser = cli.parser(
        "Pretrains a language model on documents.",
        "python -m train.pretrain configs/quickstart/pretrain.yaml train.steps=100",
    )
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="replaces a value of the config")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    if config.data.format != "text":
        raise ValueError(
            f"{arguments.config}: data.format: {config.data.format!r} is for python -m train.sft; this command takes 'text'"
        )
    from train.loop import train  # torch and its friends load after the config is known to be right

    return train(config)


if __name__ == "__main__":
    cli.run(main)
