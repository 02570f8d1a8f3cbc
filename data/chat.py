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
_OTHER_NAMES = {  # ShareGPT's and others'
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
NO_TOOLS = "those are not learned here: take it out, or set bad_records: skip in its source"
_TOOL_ROLES = ("tool", "tools", "tool_call", "function", "function_call", "observation", "ipython")


def to_messages(record: dict, where: str) -> list[Message]:
    """The conversation in one record of a data set, checked.

    Accepts, in this order: `messages` or `conversations` (lists of turns: role/content or from/value; content is text, or
    OpenAI's list of parts of type text); `instruction`, `input`, `output`, and `history`, a list of earlier pairs;
    `prompt` and `completion`, each text or a list of turns. A column `system` is the system turn where none is there yet.
    What a turn has besides (`name`, `reasoning_content`, ...) is left out; tools and other kinds of content are refused,
    because what follows them makes no sense without, and so is what is marked as no example (weight: 0, label: false).
    Raises ValueError beginning with `where` (file and line) for those,
    and when there is no conversation or it has no order to it.
    """
    _refuse_tools(record, where)
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            messages = _to_turns(record[key], f"{where}: {key}")
            break
    else:
        if record.get("instruction") is not None and record.get("output") is not None:
            messages = _from_instruction(record, where)
        elif record.get("prompt") is not None and record.get("completion") is not None:
            if record.get("label") is False:  # of TRL's unpaired preferences
                raise ValueError(f"{where}: a completion that is not to be learned (label: false)")
            messages = _from_completion(record, where)
        else:
            raise ValueError(
                f"{where}: no conversation in the columns {listed(record)}; give messages, conversations, "
                "instruction (and input) and output, or prompt and completion"
            )
    if record.get("system") and [message["role"] for message in messages[:1]] != ["system"]:
        messages = [{"role": "system", "content": _text(record["system"], where, "system")}, *messages]
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


def _to_turns(turns: object, where: str) -> list[Message]:
    if not isinstance(turns, list):
        raise ValueError(f"{where} is {type(turns).__name__}; it must be a list of turns")
    return [_to_message(turn, f"{where}[{i}]") for i, turn in enumerate(turns)]


def _to_message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{where}: a turn is {type(turn).__name__}; it must be a mapping with role and content")
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    _refuse_tools(turn, where)
    if isinstance(role, str) and role in _TOOL_ROLES:
        raise ValueError(f"{where}: a conversation with tools (role {short(role)}); {NO_TOOLS}")
    if turn.get("weight") == 0:  # of OpenAI's format
        raise ValueError(f"{where}: a turn that is not to be learned (weight: 0); here every assistant turn is")
    content = _content(content, where)
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{where}: role {short(role)} is none of system, user, assistant")
    return {"role": role, "content": content}


def _refuse_tools(record: dict, where: str) -> None:
    """ValueError for a record or turn that offers or calls tools; columns that are there and empty are fine."""
    for key in ("tools", "functions", "tool_calls", "function_call"):
        if record.get(key) not in (None, "", "[]", "null", [], {}):
            raise ValueError(f"{where}: a conversation with tools ({key}); {NO_TOOLS}")


def _content(content: object, where: str) -> str:
    """The text of a turn; of a list of parts as OpenAI writes them their texts joined."""
    if not isinstance(content, list):
        return _text(content, where, "content")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"{where}: content has a part that is no text (type {short(kind)})")
        texts.append(_text(part.get("text"), where, "text of a part"))
    return "".join(texts)


def _text(value: object, where: str, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {what} is {type(value).__name__}; it must be text")
    return value


def _from_instruction(record: dict, where: str) -> list[Message]:
    """Alpaca's columns; `history`, as LLaMA-Factory writes it, has the pairs before."""
    earlier = record.get("history") or []
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise ValueError(f"{where}: history is no list of pairs; each is [instruction, output]")
    parts = [
        _text(value, where, name)
        for name, value in (("instruction", record["instruction"]), ("input", record.get("input") or ""))
    ]
    question = "\n\n".join(part.strip() for part in parts if part.strip())
    pairs = [(_text(q, where, "history"), _text(a, where, "history")) for q, a in earlier]
    pairs.append((question, _text(record["output"], where, "output")))
    return [_turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair)]


def _from_completion(record: dict, where: str) -> list[Message]:
    """Columns prompt and completion: texts, or lists of turns."""
    messages = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        messages += _to_turns(value, f"{where}: {key}") if isinstance(value, list) else [_turn(role, value, where, key)]
    return messages


def _turn(role: str, text: object, where: str = "", what: str = "") -> Message:
    return {"role": role, "content": _text(text, where, what)}


def _listed(roles: list[str]) -> str:
    more = f" and {len(roles) - 8} more" if len(roles) > 8 else ""
    return ", ".join(roles[:8]) + more or "no turns"
