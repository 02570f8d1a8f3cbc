"""What inspect_data counts is what training then uses; duplicates are found; memory stays bounded and the counts near."""

import random

import numpy as np
import pytest

from data import duplicates, statistics
from data.chat import encode_conversation
from data.duplicates import Duplicates
from data.prepare import open_prepared, prepare
from data.statistics import Lengths, examine

WORDS = [
    f"{a}{b}" for a in ("ba", "ko", "mi", "tu", "ser", "lan") for b in ("la", "ne", "rix", "dol", "van", "quo", "pel")
]


def made_up(seed: int, n: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(n))


def by_name(found):
    return {source.name: source for source in found.sources}


def assert_as_prepared(config, tokenizer, context_length):
    """The statistics against the shards and rows that training reads."""
    found = examine(config, context_length, tokenizer, progress=False)
    prepare(config, tokenizer, progress=False)
    prepared = open_prepared(config, tokenizer)
    rows = prepared.train_rows(context_length, config.document_mask, seed=3)
    assert found.rows_per_epoch == rows.rows_per_epoch
    batches = rows.batch(0, rows.rows_per_epoch)
    for index in prepared.index["sources"]:
        counted = by_name(found)[index["name"]]
        assert dict(counted.skipped) == index["skipped"]
        for split in ("train", "held_out"):
            assert getattr(counted, f"{split}_tokens") == index[split]["tokens"]
            assert getattr(counted, f"{split}_documents") == index[split]["documents"]
        dropped = sum(rows.skipped.get(index["name"], {}).values())
        assert counted.long_documents == dropped or config.format == "text"
    return found, batches


def test_documents_are_counted_as_training_uses_them(jsonl, config, tokenizer):
    texts = [made_up(i, 5 + 40 * (i % 7)) for i in range(120)] + ["", "née 日本語 \u2028 👩‍👩‍👧"]
    first, second = (
        jsonl([{"text": text} for text in texts]),
        jsonl([{"text": made_up(i, 30)} for i in range(500, 560)], "b.jsonl"),
    )
    settings = config(
        {"path": first, "weight": 2.5}, {"path": second, "weight": 0.3}, held_out_fraction=0.2, held_out_max_tokens=900
    )
    found, _ = assert_as_prepared(settings, tokenizer, 64)
    one = by_name(found)["s0"]
    kept = [text for text in texts if text]
    assert one.records == 122 and one.documents == 121 - one.skipped["held out, beyond held_out_max_tokens"]
    assert one.tokens - one.text_tokens == 2 * one.documents, "BOS and EOS of each"
    assert one.learned_tokens == one.train_tokens - one.train_documents, "every token but BOS"
    lengths = [len(tokenizer.encode(text)) + 2 for text in kept]
    assert one.lengths.longest == max(lengths)
    whole = examine(config({"path": first}), 64, tokenizer, progress=False).sources[0]
    assert whole.characters == sum(map(len, kept)) and whole.bytes == sum(len(text.encode()) for text in kept)
    assert whole.long_documents == sum(length > 64 for length in lengths)
    assert whole.long_tokens == sum(length for length in lengths if length > 64)


def test_conversations_are_counted_as_training_uses_them(jsonl, config, tokenizer, chats):
    empty = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": " "}]}
    settings = config({"path": jsonl([*chats(90), empty])}, format="chat", held_out_fraction=0.1)
    lengths = sorted(len(encode_conversation(tokenizer, chat["messages"])[0]) for chat in chats(90))
    found, batches = assert_as_prepared(settings, tokenizer, lengths[60])
    one = found.sources[0]
    assert one.long_documents > 0 and lengths.count(lengths[60]) > 1, "some too long, some that fit exactly"
    assert one.learned_tokens == int((batches["labels"] != -100).sum())
    assert one.padding == pytest.approx(1 - float(batches["attention_mask"].float().mean()))
    assert one.bytes == sum(len(turn["content"]) for chat in chats(90) for turn in chat["messages"]) + sum(
        len(chat["messages"]) - 1 for chat in chats(90)
    ), "contents, and a line break between them"
    assert one.bytes / one.text_tokens > one.bytes / one.tokens


def test_many_conversations_are_packed_by_sample(jsonl, config, tokenizer, chats, monkeypatch):
    settings = config({"path": jsonl(chats(400))}, format="chat")
    exact = examine(settings, 64, tokenizer, progress=False).sources[0]
    monkeypatch.setattr(statistics, "MOST_PACKED", 100)
    near = examine(settings, 64, tokenizer, progress=False).sources[0]
    assert near.rows != exact.rows and abs(near.rows / exact.rows - 1) < 0.05
    assert near.train_tokens == exact.train_tokens and near.learned_tokens == exact.learned_tokens


def test_no_more_is_read_than_was_asked_for(jsonl, config, tokenizer):
    path = jsonl([*({"text": made_up(i, 9)} for i in range(6)), "{broken"])
    found = examine(config({"path": path}), 32, tokenizer, documents=6, progress=False)
    assert found.sources[0].records == 6
    with pytest.raises(ValueError, match="data.jsonl:7: not readable as JSON"):
        examine(config({"path": path}), 32, tokenizer, documents=7, progress=False)


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_within_a_64th(seed):
    values = np.random.default_rng(seed).lognormal(5, 2, 5000).astype(int) + 1
    lengths = Lengths()
    for value in values.tolist():
        lengths.add(value)
    for q in (0.01, 0.25, 0.5, 0.9, 0.99, 1.0):
        exact = int(np.quantile(values, q, method="inverted_cdf"))
        assert exact * 63 / 64 <= lengths.quantile(q) <= exact, q
        assert exact >= 128 or lengths.quantile(q) == exact
    assert sum(n for _, _, n in lengths.octaves()) == 5000
    for low, high, n in lengths.octaves():
        assert n == int(((values >= low) & (values <= high)).sum())
    assert len(lengths._bins) < 128 + 64 * 20, "bins, not values"
    assert Lengths().quantile(0.5) == 0 and Lengths().octaves() == []


def changed(ids: list[int], share: float, seed: int) -> list[int]:
    """`ids` with a run in the middle replaced, so that about `share` of the runs of five stay."""
    ids, n = list(ids), round((1 - share) / (1 + share) * len(ids))
    start = len(ids) // 2
    ids[start : start + n] = np.random.default_rng(seed).integers(0, 600, n).tolist()
    return ids


def test_copies_and_near_copies_are_told_from_other_texts():
    random_ids = np.random.default_rng(0)
    originals = [random_ids.integers(0, 600, 200).tolist() for _ in range(300)]
    found = Duplicates()
    assert all(found.add(str(i), ids, False) == (0, 0) for i, ids in enumerate(originals)), "unlike texts"
    assert all(found.add(str(i), ids, False) == (1, 0) for i, ids in enumerate(originals)), "the same again"

    def near(share):
        return sum(found.add(f"{share} {i}", changed(ids, share, i), False)[1] for i, ids in enumerate(originals[:100]))

    assert near(0.97) >= 95 and near(0.5) <= 5, "most of the first and few of the second"


def test_short_texts_are_never_near():
    found = Duplicates()
    for i in range(50):
        assert found.add(f"sum {i}", [5, 6, 7, 8, 9, i, 10, 11, 12], False) == (0, 0)


def test_the_overlap_of_held_out_and_training_is_counted_once_whichever_comes_first():
    ids = np.random.default_rng(1).integers(0, 600, (4, 100)).tolist()
    found = Duplicates()
    for text, held_out in [
        ("a", True),
        ("a", True),
        ("a", False),
        ("a", False),
        ("b", False),
        ("b", True),
        ("c", True),
        ("d", False),
    ]:
        found.add(text, ids["abcd".index(text)], held_out)
    assert found.overlap == 3, "two of a, one of b"
    near = Duplicates()
    near.add("one", ids[0], True)
    near.add("two", changed(ids[0], 0.97, 0), False)
    near.add("three", changed(ids[0], 0.97, 1), False)
    near.add("four", ids[1], False)
    near.add("five", changed(ids[1], 0.97, 0), True)
    assert near.near_overlap == 2 and near.overlap == 0


def test_where_held_out_is_chosen_by_another_column_copies_on_both_sides_are_seen(jsonl, config, tokenizer):
    records = [{"text": made_up(i % 40, 12), "id": i} for i in range(160)]
    source = {"path": jsonl(records), "split_key": "id"}
    found = examine(config(source, held_out_fraction=0.3), 32, tokenizer, progress=False)
    one = found.sources[0]
    assert one.duplicates == 120 and 0.9 * one.held_out_documents <= found.overlap <= one.held_out_documents
    by_text = examine(config({"path": source["path"]}, held_out_fraction=0.3), 32, tokenizer, progress=False)
    assert by_text.overlap == 0 and by_text.sources[0].held_out_documents > 0, "by its text a copy is where the text is"


def test_copies_beyond_the_bound_are_counted_by_sample(monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_KEYS", 500)
    monkeypatch.setattr(duplicates, "MOST_COMPARED", 10)
    found = Duplicates()
    copies = sum(found.add(f"text {i % 6000}", [i] * 30, i >= 11_000)[0] for i in range(12_000))
    assert len(found._seen) <= 500 and found.compared == 10
    assert abs(copies / 6000 - 1) < 0.3, f"{copies} of 6,000"
    assert abs(found.overlap / 1000 - 1) < 0.6, f"{found.overlap} of 1,000"


def test_the_same_conversation_in_other_mouths_is_no_copy(jsonl, config, tokenizer):
    turns = [("user", "hello"), ("assistant", "hello"), ("user", "bye"), ("assistant", "bye")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    other = {"messages": [{"role": "system", "content": "hello"}, *chat["messages"][2:]]}
    found = examine(config({"path": jsonl([chat, chat, other])}, format="chat"), 64, tokenizer, progress=False)
    assert found.sources[0].duplicates == 1
