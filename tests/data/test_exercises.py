import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from data.chat import check_messages
from data.corpora import HELD_OUT_BOOKS, bible_books
from data.exercises import NAMES, TASKS, exercises, held_out_exchanges
from data.number_exercises import worked_sum
from data.tokenizer import SPECIAL_TOKENS
from data.verse_exercises import ASKED_BOOKS, cut_verse, verses, word_f1


@pytest.fixture(scope="module")
def mixture():
    return list(exercises())


@pytest.fixture(scope="module")
def training(mixture):
    return [c for c in mixture if not c.held_out]


def turns(conversations, role):
    return [m["content"] for c in conversations for m in c.messages if m["role"] == role]


def test_there_are_enough_conversations_and_every_one_can_be_trained_on(mixture, training):
    assert len(training) >= 20_000
    assert sum(len(turns([c], "assistant")) > 1 for c in training) >= 2_000, "too few conversations of several turns"
    assert any(c.messages[0]["role"] == "system" for c in training)
    for conversation in mixture:
        check_messages(conversation.messages, conversation.split_key)
        assert conversation.held_out is not None, "left to a hash: multi-turn conversations would leak"
        for message in conversation.messages:
            assert message["content"] == message["content"].strip() != ""
            assert not any(special in message["content"] for special in SPECIAL_TOKENS)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_alone_is_a_corpus_with_its_own_held_out_items(task):
    conversations = list(exercises(task))
    asked = [c for c in conversations if c.held_out]
    assert 100 <= len(asked) <= 300
    assert len({c.split_key for c in asked}) == len(asked), "an item is asked twice"
    trained = {key for c in conversations if not c.held_out for key in c.split_key.split()}
    assert len(trained) >= 1_000
    assert not trained & {c.split_key for c in asked}
    assert [(c.messages[0]["content"], c.messages[1]["content"]) for c in asked] == [
        (e.question, e.answer) for e in held_out_exchanges(task)
    ]


def test_the_same_conversations_in_another_process(mixture):
    code = (
        "import hashlib, json; from data.exercises import exercises;"
        "print(hashlib.sha256(json.dumps([c.messages for c in exercises()]).encode()).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = hashlib.sha256(json.dumps([c.messages for c in mixture]).encode()).hexdigest()
    assert there.stdout.strip() == here, "the held-out items would differ from one machine to the next"


def test_an_unknown_exercise_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'sum' is no embedded exercise; choose one of exercises, sums"):
        next(exercises("sum"))
    assert "sums" in NAMES


# Held out means: nowhere in training, in any wording. Read from the text itself, not from the keys.


def number_pairs(texts):
    """Unordered operands of everything that looks like a sum with two operands, whatever the words."""
    found = set()
    for text in texts:
        for a, b in re.findall(r"(?<![\d+])(\d+)(?: ?\+ ?| and | plus )(\d+)(?![\d+])", text):
            found.add(frozenset((int(a), int(b))))
    return found


def test_no_held_out_pair_is_added_in_training_in_either_order(training):
    trained = number_pairs(turns(training, "user"))
    asked = number_pairs(e.question for e in held_out_exchanges("sums"))
    assert len(asked) == len(held_out_exchanges("sums")) and len(trained) > 3_000
    assert not trained & asked
    operands = {n for pair in asked for n in pair}
    assert min(operands) < 10 and max(operands) > 90, "held-out operands do not span 0 to 99"


def test_no_held_out_pair_is_compared_in_training(training):
    def compared(texts):
        return {frozenset(re.findall(r"\d+", t)) for t in texts if "larger" in t or "smaller" in t}

    assert not compared(turns(training, "user")) & compared(e.question for e in held_out_exchanges("compare"))


def test_no_held_out_word_is_spelled_in_training(training):
    spelled = set(re.findall(r"\b(?:[a-z] ){2,}[a-z]\b", "\n".join(turns(training, "user"))))
    asked = {e.question.split(": ")[-1].removeprefix("Reverse ") for e in held_out_exchanges("backwards")}
    assert len(asked) == 200 and len(spelled) > 1_000
    assert not spelled & asked


@pytest.fixture(scope="module")
def said_in_training(training):
    """text -> whether a training conversation contains it; a table of six-word runs makes the search quick."""
    everything = [" ".join(m["content"].split()) for c in training for m in c.messages]
    runs: dict[str, list[int]] = {}
    for place, text in enumerate(everything):
        words = text.split()
        for i in range(len(words)):
            runs.setdefault(" ".join(words[i : i + 6]), []).append(place)

    def said(text: str) -> bool:
        text = " ".join(text.split())
        return any(text in everything[place] for place in runs.get(" ".join(text.split()[:6]), []))

    return said


def test_no_verse_of_a_held_out_book_is_in_any_training_conversation(said_in_training):
    books = list(bible_books("web"))
    n_checked = 0
    for version in ("web", "kjv"):
        for verse_id, verse in verses(version).items():
            # Three or four words, such as "Isaac begat Jacob", may well be part of another book's longer verse.
            if books[verse_id // 1_000_000 - 1] in HELD_OUT_BOOKS and len(verse.split()) >= 6:
                assert not said_in_training(verse), f"{version} {verse_id} is in a training conversation"
                n_checked += 1
    assert n_checked > 1_500


@pytest.mark.parametrize("task", ["modern", "testament", "book", "continue"])
def test_no_held_out_verse_is_in_any_training_conversation(said_in_training, task):
    for exchange in held_out_exchanges(task):
        verse_id = int(exchange.key.split(":")[1])
        for version in ("web", "kjv"):
            assert not said_in_training(verses(version)[verse_id]), f"{exchange.key} is in training ({version})"


def test_the_search_for_verses_finds_what_is_there(said_in_training):
    exchange = next(c for c in exercises("book") if not c.held_out)
    verse = verses("web")[int(exchange.split_key.split()[0].split(":")[1])]
    assert said_in_training(verse) and not said_in_training("no verse has these words in it")


def test_held_out_verses_come_from_the_held_out_books_and_book_names_from_the_eight():
    books = list(bible_books("web"))
    for task in ("modern", "testament", "continue"):
        found = {books[int(e.key.split(":")[1]) // 1_000_000 - 1] for e in held_out_exchanges(task)}
        assert found <= set(HELD_OUT_BOOKS) and len(found) >= 5
    assert {e.answer.rstrip(".") for e in held_out_exchanges("book")} == set(ASKED_BOOKS)


# The answers are right.


def test_every_worked_sum_adds_up():
    for a in range(100):
        for b in range(100):
            *steps, last = worked_sum(a, b).split(", ")
            for step in steps:
                left, right = step.split("=")
                assert sum(map(int, left.split("+"))) == int(right), worked_sum(a, b)
            assert last == f"so {a + b}."


def test_compared_and_reversed_answers_are_right():
    for conversation in exercises("compare"):
        for question, answer in zip(turns([conversation], "user"), turns([conversation], "assistant")):
            numbers = [int(n) for n in re.findall(r"\d+", question)]
            word = "larger" if "larger" in question else "smaller"
            assert answer == f"{(max if word == 'larger' else min)(numbers)} is {word}."
    for exchange in held_out_exchanges("backwards"):
        assert exchange.question.endswith(exchange.answer[::-1])
        assert exchange.answer != exchange.answer[::-1], "a palindrome is answered by copying"


def test_a_verse_is_cut_in_two_whole_parts():
    for exchange in held_out_exchanges("continue"):
        verse = verses("web")[int(exchange.key.split(":")[1])]
        begin, rest = cut_verse(verse)
        assert f"{begin} {rest}" == " ".join(verse.split())
        assert min(len(begin.split()), len(rest.split())) >= 3
        assert exchange.question.endswith(begin) and exchange.answer == rest


def test_word_f1_counts_shared_words():
    assert word_f1("The LORD is my shepherd;", "the lord is my shepherd") == 1.0
    assert word_f1("a b", "c d") == word_f1("", "c d") == word_f1("", "") == 0.0
    assert word_f1("a a a", "a b") == pytest.approx(2 * 1 / 5)
