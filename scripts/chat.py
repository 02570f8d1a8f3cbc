"""Talk with a run in the terminal, or ask it one thing.

    python -m scripts.chat runs/quickstart-sft
    python -m scripts.chat runs/quickstart-sft --prompt "What is 47 + 38?"      prints only the answer

Answers stream as they are made. When the conversation outgrows the context, its oldest turns are forgotten, and it is said.
A run that was only pretrained has learned no turns: it continues each text it is given. What is said to the person goes
to standard error, so that standard output holds answers alone.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

from data.chat import encode_prompt
from data.tokenizer import Tokenizer
from model.generate import stream
from train import cli
from train.checkpoint import Run, open_run

HELP = """/reset            forget the conversation
/set NAME VALUE   change an option: {options}
/help             this
/quit             leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Options:
    """How answers are drawn; `seed` None draws another one for each answer."""

    temperature: float = 0.3  # 0: always the likeliest token
    top_p: float = 0.9
    top_k: int = 0  # 0: all
    repetition_penalty: float = 1.0
    max_tokens: int = 256  # of one answer
    seed: int | None = None

    def set(self, name: str, text: str) -> None:
        """Sets an option from what a person typed. ValueError names option, value and what is allowed."""
        key = name.lstrip("-").replace("-", "_")
        if key not in _ALLOWED:
            near = difflib.get_close_matches(key, _ALLOWED, n=1)
            raise ValueError(f"{name}: no such option; {f'did you mean {near[0]!r}?' if near else 'see /help'}")
        convert, allowed, words = _ALLOWED[key]
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise ValueError(f"{name}: {text!r} must be {words}")
        setattr(self, key, value)


_ALLOWED: dict[str, tuple[Callable, Callable[[float], bool], str]] = {
    "temperature": (float, lambda v: 0 <= v < float("inf"), "a number, 0 or more"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "top_k": (int, lambda v: v >= 0, "a whole number, 0 (all) or more"),
    "repetition_penalty": (float, lambda v: 0 < v < float("inf"), "a number above 0"),
    "max_tokens": (int, lambda v: v >= 1, "a whole number, 1 or more"),
    "seed": (int, lambda v: 0 <= v < 2**63, "a whole number, 0 or more"),
}
assert list(_ALLOWED) == [field.name for field in fields(Options)]


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text of `tokens` piece by piece; a character is held back until its last byte is there."""
    held: list[int] = []
    printed = 0  # characters of `held` already given
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        unfinished = text.endswith("\ufffd")  # an unfinished character decodes to exactly one U+FFFD, at the end
        ready = text[printed : len(text) - unfinished]
        if unfinished:
            printed += len(ready)
        else:
            held, printed = [], 0
        if ready:
            yield ready
    rest = tokenizer.decode(held)[printed:] if held else ""
    if rest:
        yield rest


class Session:
    """A conversation with one run: what was said so far, and how to go on."""

    def __init__(self, run: Run, options: Options, system: str | None = None):
        self.run, self.options = run, options
        self.is_chat = run.config.data.format == "chat"
        if system and not self.is_chat:
            raise ValueError(f"--system: {run.run_dir} was only pretrained and knows no turns; leave --system out")
        self.context = run.model.config.max_position_embeddings  # tokens
        self.system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation, but for the system turn."""
        self.messages: list[dict[str, str]] = []
        self.notes: list[str] = []  # what the person should know about the last answer
        self.stopped = False  # the last answer was stopped with Ctrl-C

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Answers `text`, giving each piece to `write`; Ctrl-C ends the answer, and what was said of it is remembered.

        Raises ValueError when `text` does not fit the context even alone.
        """
        self.notes, self.stopped = [], False
        prompt = self._chat_prompt(text) if self.is_chat else self._text_prompt(text)
        tokenizer, options = self.run.tokenizer, self.options
        limit = min(options.max_tokens, self.context - len(prompt))
        tokens = stream(
            self.run.model,
            prompt,
            max_new_tokens=limit,
            stop_ids=(tokenizer.im_end_id, tokenizer.eos_id),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            seed=secrets.randbits(31) if options.seed is None else options.seed,
        )
        made: list[int] = []
        pieces: list[str] = []
        try:
            with self.run.autocast():
                for piece in decode_stream(tokenizer, _noting(tokens, made)):
                    pieces.append(piece)
                    write(piece)
        except KeyboardInterrupt:
            self.stopped = True
            self.notes.append("stopped")
        answer = "".join(pieces)
        if self.is_chat and answer.strip():
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        elif not self.stopped and not answer.strip():
            self.notes.append("no answer: the first token was the end")
        if len(made) >= limit and not self.stopped:
            full = limit < options.max_tokens
            self.notes.append(
                f"cut off: {f'the context of {self.context} tokens is full' if full else f'{limit} tokens (max-tokens)'}"
            )
        return answer

    def _chat_prompt(self, text: str) -> list[int]:
        """Ids of the conversation and `text`, without the oldest turns where they leave no room for an answer."""
        room = min(self.options.max_tokens, self.context // 4)  # tokens kept free for the answer
        new = [{"role": "user", "content": text}]
        kept = list(self.messages)
        ids = encode_prompt(self.run.tokenizer, [*self.system, *kept, *new])
        while kept and len(ids) + room > self.context:
            kept = kept[2:]
            ids = encode_prompt(self.run.tokenizer, [*self.system, *kept, *new])
        if len(ids) >= self.context:
            raise ValueError(f"this message takes {len(ids)} tokens and the context holds {self.context}; shorten it")
        forgotten = len(self.messages) - len(kept)
        if forgotten:
            self.notes.append(
                f"the oldest {forgotten} turns no longer fit the context of {self.context} tokens: forgotten"
            )
        self.messages = kept
        return ids

    def _text_prompt(self, text: str) -> list[int]:
        ids = self.run.tokenizer.encode(text)
        most = self.context - 1 - min(self.options.max_tokens, self.context // 4)
        if len(ids) > most:
            self.notes.append(f"only the last {most} of {len(ids)} tokens fit the context of {self.context}")
        return [self.run.tokenizer.bos_id, *ids[-most:]]


def _noting(tokens: Iterable[int], made: list[int]) -> Iterator[int]:
    for token in tokens:
        made.append(token)
        yield token


def main() -> int:
    arguments = _arguments()
    for standard in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(standard, io.TextIOWrapper):  # whatever the locale says: answers are any text
            standard.reconfigure(encoding="utf-8", errors="replace")
    options = Options()
    for name in _ALLOWED:
        if getattr(arguments, name) is not None:
            options.set("--" + name.replace("_", "-"), getattr(arguments, name))
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ValueError(f"--prompt: {arguments.prompt!r} holds no text; give a question")
    session = Session(open_run(arguments.run, device=arguments.device), options, arguments.system)
    if not session.is_chat:
        _say(
            "this run was only pretrained: it continues the text it is given (for answers, fine-tune it with train.sft)"
        )
    if arguments.prompt is not None:
        _answer_and_notes(session, arguments.prompt)
        return 130 if session.stopped else 0
    return _talk(session)


def _talk(session: Session) -> int:
    """Reads lines until the end of the input or /quit. A person is prompted; a pipe is not."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history in input())
        run = session.run
        _say(f"{run.run_dir}, step {run.step}, on {run.device}; /help lists the commands")
    code = 0
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                _say("")
            return code
        except KeyboardInterrupt:
            if not interactive:
                raise
            _say("\n(/quit leaves)")
            continue
        try:
            if line == "/quit":
                return code
            if line.startswith("/"):
                _say(_command(session, line))
            elif line:
                _answer_and_notes(session, line)
        except ValueError as error:
            _say(f"error: {error}")
            code = code if interactive else cli.USER_ERROR


def _command(session: Session, line: str) -> str:
    """Does what a line that starts with / asks for; returns what to tell the person."""
    name, *words = line.split()
    if name == "/reset":
        session.reset()
        return "(conversation forgotten)"
    if name == "/set":
        if len(words) != 2:
            raise ValueError(f"{line}: write /set NAME VALUE, such as /set temperature 0.5")
        session.options.set(*words)
        return f"({_shown(session.options)})"
    if name == "/help":
        return HELP.format(options=_shown(session.options))
    raise ValueError(f"{name}: no such command; /help lists them")


def _shown(options: Options) -> str:
    return ", ".join(f"{name.replace('_', '-')} {getattr(options, name)}" for name in _ALLOWED)


def _answer_and_notes(session: Session, text: str) -> None:
    session.answer(text, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    for note in session.notes:
        _say(f"({note})")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        "Talk with a run: a folder under runs/, or one checkpoint in it.",
        'python -m scripts.chat runs/quickstart-sft --prompt "What is 47 + 38?"',
    )
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this alone and print only the answer")
    parser.add_argument("--system", metavar="TEXT", help="a system turn before the conversation")
    for name, (_, _, words) in _ALLOWED.items():
        default = getattr(Options, name)
        shown = "another for every answer" if default is None else default
        parser.add_argument("--" + name.replace("_", "-"), metavar="X", help=f"{words} (default: {shown})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
