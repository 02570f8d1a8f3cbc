"""The border between a person and the code: a user's mistake ends in one sentence, never a traceback."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

USER_ERROR = 2  # exit code of a mistake the user can mend (argparse's own)
UNFINISHED = (
    75  # exit code of a run that cannot go on now, but will when the command is repeated (EX_TEMPFAIL of sysexits.h)
)

READER_GONE = 141  # 128 + SIGPIPE: the output was piped into something that closed it


class Unfinished(Exception):
    """Ends a command with UNFINISHED and its text in one line; whatever was saved before stays."""


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, which makes an empty list of a second `--` where one word belongs."""
        namespace, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if not action.option_strings and action.nargs is None and getattr(namespace, action.dest, None) == []:
                self.error(f"argument {action.metavar or action.dest}: '--' is none")
        return namespace, rest


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """An ArgumentParser whose --help ends with an example."""
    return _Parser(
        description=description, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def need(module: str, wanted_by: str) -> ModuleType:
    """Imports a package of requirements-extra.txt where it is used. ValueError, naming who wants it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and lacks something itself
        raise ValueError(
            f"{wanted_by} needs the package {error.name}, which is not installed; run: pip install -r requirements-extra.txt"
        ) from None


def run(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: 0 on success, USER_ERROR with one line on a ValueError or OSError, UNFINISHED on Unfinished.

    MINIMOE_TRACEBACK=1 in the environment shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? rather than ending the run
    if os.environ.get("MINIMOE_TRACEBACK"):
        sys.exit(main())
    try:
        code = main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(READER_GONE)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {_sentence(error)}\n")  # one write: two ranks' lines must not run into each other
        sys.exit(USER_ERROR)
    except Unfinished as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.stdout.flush()
        os._exit(UNFINISHED)  # at once: the libraries' own farewells wait for processes that are gone
    sys.exit(code)


def _sentence(error: ValueError | OSError) -> str:
    """The error in one line; a full disk, which any write can meet, with its remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += ": the disk is full; free some space and repeat the command"
    return text
