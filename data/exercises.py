"""Conversations with a known answer, made here: what the quickstart's chat learns and what `eval/tasks.py` asks.

    for conversation in exercises("sums"): ...        # or "exercises": every task, mixed, with small talk

Chosen for a model of one to three million active parameters and minutes of training; `number_exercises.py` and
`verse_exercises.py` say how each task is made and what it holds out, always by construction and never by chance.
Everything is a pure function of SEED: two calls, on two machines, give the same conversations.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator

from data import number_exercises, verse_exercises
from data.exchange import SEED, Exchange, Split, hash_holds_out, shuffled
from data.sources import Conversation

MIXTURE = "exercises"
SYSTEM = "You are MiniMoE, a small language model."
MAX_CONVERSATION_CHARACTERS = 420  # about 200 tokens at a vocabulary of 2,000 to 4,000

WHAT_I_CAN = "I can add small numbers, compare them, spell letters backwards, and say a Bible verse in modern English."
SMALL_TALK = {  # what is meant -> (ways to say it, answers)
    "hello": (
        ("Hello", "Hi", "Hey", "Hello there", "Good morning", "Good evening", "Hi there", "Hello MiniMoE"),
        ("Hello! What shall we do?",),
    ),
    "how": (
        ("How are you", "How are you today", "How is it going", "Are you well"),
        ("I am well, thank you. And you?",),
    ),
    "well": (("I am well", "I am fine", "I am fine, thank you", "Very well, thanks"), ("I am glad to hear it.",)),
    "who": (
        (
            "Who are you",
            "What are you",
            "What is your name",
            "Tell me about yourself",
            "Who am I talking to",
            "What's your name",
        ),
        ("I am MiniMoE, a small mixture-of-experts language model.",),
    ),
    "can": (
        ("What can you do", "How can you help me", "What do you know", "Help", "What can I ask you", "Can you help me"),
        (WHAT_I_CAN,),
    ),
    "human": (
        ("Are you a person", "Are you human", "Are you a robot", "Are you real", "Are you alive"),
        ("No, I am a small language model.",),
    ),
    "expert": (
        ("What is an expert", "What does MoE mean", "What is a mixture of experts", "What are experts"),
        ("A mixture of experts has many small networks, and each token is sent to a few of them.",),
    ),
    "learned": (
        ("What have you read", "How did you learn", "What were you trained on", "Where do you come from"),
        ("I have read three versions of the Bible, and then a few thousand exercises.",),
    ),
    "thanks": (("Thank you", "Thanks", "Thanks a lot", "Thank you very much"), ("You are welcome.",)),
    "bye": (("Goodbye", "Bye", "See you", "Good night", "See you later"), ("Goodbye!",)),
}
SMALL_TALK_REPEATS = 6  # few sentences against thousands of exercises: without repeats they are not learned


def _small_talk() -> Split:
    """Each phrase with and without capital and punctuation; held out are spellings, since the answers are few."""
    train, held_out = [], []
    for meaning, (questions, answers) in SMALL_TALK.items():
        endings = (".", "!", "") if meaning in ("hello", "well", "thanks", "bye") else ("?", "")
        for text in (form + ending for q in questions for form in (q, q.lower()) for ending in endings):
            for answer in answers:
                exchange = Exchange(f"small_talk:{meaning}:{text}", text, answer)
                if hash_holds_out(exchange.key, 10):
                    held_out.append(exchange)
                else:
                    train.extend([exchange] * SMALL_TALK_REPEATS)
    return shuffled("small_talk", train), held_out


TASKS: dict[str, Callable[[], Split]] = {
    "sums": number_exercises.sums,
    "compare": number_exercises.compare,
    "backwards": number_exercises.backwards,
    "modern": verse_exercises.modern,
    "testament": verse_exercises.testament,
    "book": verse_exercises.which_book,
    "continue": verse_exercises.continue_verse,
}
TALK: dict[str, Callable[[], Split]] = {"small_talk": _small_talk}  # trained and held out, but nothing to score
NAMES = (MIXTURE, *TASKS, *TALK)


def exercises(name: str = MIXTURE) -> Iterator[Conversation]:
    """Conversations of one task, or of all of them mixed; training ones first, then one per held-out item.

    Raises ValueError when there is no such exercise.
    """
    if name != MIXTURE and name not in TASKS and name not in TALK:
        raise ValueError(f"corpus: {name!r} is no embedded exercise; choose one of {', '.join(NAMES)}")
    chosen = [*TASKS, *TALK] if name == MIXTURE else [name]
    rng = random.Random(f"{SEED}:conversations:{name}")
    conversations = [c for task in chosen for c in _conversations(_split(task)[0], rng)]
    rng.shuffle(conversations)
    if name == MIXTURE:
        conversations = _mix(conversations, rng)
    for exchanges in conversations:
        system = SYSTEM if rng.random() < 0.05 else None
        yield Conversation(_messages(exchanges, system), " ".join(e.key for e in exchanges), held_out=False)
    for task in chosen:
        for exchange in _split(task)[1]:
            yield Conversation(_messages([exchange]), exchange.key, held_out=True)


def held_out_exchanges(task: str) -> list[Exchange]:
    """The held-out items of a task, in an order that says nothing about the answer."""
    return list(_split(task)[1])


def _messages(exchanges: Iterable[Exchange], system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer})
    return messages


def _conversations(exchanges: list[Exchange], rng: random.Random) -> list[list[Exchange]]:
    """Exchanges of one task cut into conversations of one to three; later questions are mostly put in short."""
    conversations: list[list[Exchange]] = []
    room = 0
    for exchange in exchanges:
        if room and _length(conversations[-1]) + _length([exchange]) <= MAX_CONVERSATION_CHARACTERS:
            if exchange.follow_up and rng.random() < 0.7:
                exchange = Exchange(exchange.key, exchange.follow_up, exchange.answer)
            conversations[-1].append(exchange)
            room -= 1
        else:
            conversations.append([exchange])
            room = rng.choices((0, 1, 2), (0.9, 0.07, 0.03))[0]
    return conversations


def _mix(conversations: list[list[Exchange]], rng: random.Random) -> list[list[Exchange]]:
    """Some conversations change the subject, begin with a greeting or end with thanks."""
    talk = {name: _split(name)[0] for name in TALK}
    greetings = [e for e in talk["small_talk"] if e.key.startswith("small_talk:hello")]
    thanks = [e for e in talk["small_talk"] if e.key.startswith(("small_talk:thanks", "small_talk:bye"))]
    mixed: list[list[Exchange]] = []
    for conversation in conversations:
        if rng.random() < 0.03:
            conversation = [rng.choice(greetings), *conversation]
        if rng.random() < 0.03:
            conversation = [*conversation, rng.choice(thanks)]
        joined = [*mixed[-1], *conversation] if mixed else []
        if joined and len(joined) <= 4 and _length(joined) <= MAX_CONVERSATION_CHARACTERS and rng.random() < 0.03:
            mixed[-1] = joined
        else:
            mixed.append(conversation)
    return mixed


def _length(exchanges: Iterable[Exchange]) -> int:
    return sum(len(e.question) + len(e.answer) for e in exchanges)


@functools.cache
def _split(task: str) -> Split:
    return (TASKS | TALK)[task]()
