"""Fine-tunes a pretrained model on conversations (train.init_from names the run or checkpoint).

    python -m train.sft configs/quickstart/sft.yaml [a.b=value ...]
    torchrun --nproc-per-node 2 -m train.sft configs/quickstart/sft.yaml

The same command again resumes a run that was stopped. Exit code 0: finished; 143 or 130: stopped by a signal after saving.
"""

from __future__ import annotations

from train import cli
from train.config import load_config


def main() -> int:
    parser = cli.parser(
        "Fine-tunes a pretrained model on conversations (train.init_from names the run or checkpoint).",
        "python -m train.sft configs/quickstart/sft.yaml",
    )
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="replaces a value of the config")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    if config.data.format != "chat":
        raise ValueError(
            f"{arguments.config}: data.format: {config.data.format!r} is for python -m train.pretrain; this command takes 'chat'"
        )
    if config.train.init_from is None:
        raise ValueError(
            f"{arguments.config}: train.init_from is missing; name the pretrained run or checkpoint to start from"
        )
    from train.loop import train  # torch and its friends load after the config is known to be right

    return train(config)


if __name__ == "__main__":
    cli.run(main)
