"""Conversations -> tokens and loss mask, in ChatML, built segment by segment.

    <|bos|><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n

Special tokens are put in by id and everything a person wrote is encoded as text, so text that looks like a special
token stays text. Training, chat and server all use this encoder; CHAT_TEMPLATE is the same thing for other tools, and
gives the same ids wherever the text holds no special token's name. Only assistant turns are learned: their content
and the `<|im_end|>` that ends them.
"""

from __future__ import annotations

import typing

from data.words import listed, short

if typing.TYPE_CHECKING:
    from data.tokenizer import Tokenizer

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] | trim) + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ROLES = ("system", "user", "assistant")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # ShareGPT's and others'


def to_messages(record: dict, where: str) -> list[Message]:
    """The conversation in one record of a data set, checked.

    Accepts `messages` or `conversations` (lists of role/content or from/value), or `instruction`, `input`, `output`.
    Raises ValueError beginning with `where` (file and line) when there is no conversation or it has no order to it.
    """
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            turns = record[key]
            if not isinstance(turns, list):
                raise ValueError(f"{where}: {key} is {type(turns).__name__}; it must be a list of turns")
            messages = [_to_message(turn, f"{where}: {key}[{i}]") for i, turn in enumerate(turns)]
            break
    else:
        if record.get("instruction") is None or record.get("output") is None:
            raise ValueError(
                f"{where}: no conversation in the columns {listed(record)}; "
                "give messages, conversations, or instruction (and input) and output"
            )
        parts = [record["instruction"], record.get("input") or ""]
        for name, value in zip(("instruction", "input", "output"), (*parts, record["output"])):
            if not isinstance(value, str):
                raise ValueError(f"{where}: {name} is {type(value).__name__}; it must be text")
        question = "\n\n".join(part.strip() for part in parts if part.strip())
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    check_messages(messages, where)
    return messages


def check_messages(messages: list[Message], where: str, for_training: bool = True) -> None:
    """Raises ValueError unless roles run [system,] user, assistant, user, ... and end rightly.

    A conversation to learn from ends with the assistant's turn, one to be answered with the user's.
    """
    roles = [message["role"] for message in messages]
    if for_training and "assistant" not in roles:
        raise ValueError(
            f"{where}: the conversation has no assistant turn ({_listed(roles)}): nothing to learn from it"
        )
    start = 1 if roles[:1] == ["system"] else 0
    for i, role in enumerate(roles[start:], start):
        expected = ("user", "assistant")[(i - start) % 2]
        if role != expected:
            raise ValueError(
                f"{where}: roles out of order: turn {i + 1} is {role!r} where {expected!r} belongs "
                f"({_listed(roles)}); after an optional system turn, user and assistant take turns"
            )
    last = "assistant" if for_training else "user"
    if not roles or roles[-1] != last:
        raise ValueError(f"{where}: the last turn is {roles[-1] if roles else None!r}; it must be {last!r}")


def encode_conversation(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """(ids, mask) of equal length; mask 1 where the token is learned (assistant content and its `<|im_end|>`)."""
    return encode_conversations(tokenizer, [messages])[0]


def encode_conversations(tokenizer: Tokenizer, conversations: list[list[Message]]) -> list[tuple[list[int], list[int]]]:
    """`encode_conversation` of each, on all cores."""
    contents = iter(tokenizer.encode_batch([turn["content"].strip() for turns in conversations for turn in turns]))
    headers = {role: tokenizer.encode(f"{role}\n") for role in ROLES}
    newline = tokenizer.encode("\n")
    encoded = []
    for turns in conversations:
        ids, mask = [tokenizer.bos_id], [0]
        for turn in turns:
            header, content = headers[turn["role"]], next(contents)
            learned = int(turn["role"] == "assistant")
            ids += [tokenizer.im_start_id, *header, *content, tokenizer.im_end_id, *newline]
            mask += [0] * (1 + len(header)) + [learned] * (len(content) + 1) + [0] * len(newline)
        encoded.append((ids, mask))
    return encoded


def encode_prompt(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """The conversation so far and `<|im_start|>assistant\\n`: what the model continues."""
    ids, _ = encode_conversation(tokenizer, messages)
    return [*ids, tokenizer.im_start_id, *tokenizer.encode("assistant\n")]


def _to_message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where}: a turn is {type(turn).__name__}; it must be a mapping with role and content")
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if not isinstance(content, str):
        raise ValueError(f"{where}: content is {type(content).__name__}; it must be text")
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{where}: role {short(role)} is none of system, user, assistant")
    return {"role": role, "content": content}


def _listed(roles: list[str]) -> str:
    more = f" and {len(roles) - 8} more" if len(roles) > 8 else ""
    return ", ".join(roles[:8]) + more or "no turns"
