"""Rows and their order: nothing lost, nothing twice, the same however it is read."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.dataset import IGNORED
from data.prepare import open_prepared, prepare

T = 16


@pytest.fixture
def opened(tokenizer, jsonl, config):
    """Prepares one source per list of records and opens them."""

    def build(*records, weights=(), **settings):
        weights = weights or [1.0] * len(records)
        sources = [{"path": jsonl(r, f"{i}.jsonl"), "weight": w} for i, (r, w) in enumerate(zip(records, weights))]
        data = config(*sources, **settings)
        prepare(data, tokenizer, progress=False)
        return open_prepared(data, tokenizer)

    return build


def documents(n, offset=0):
    """No two of their rows are alike."""
    numbers = [[str(1000 * i + 37 * j) for j in range(i % 5 + 2)] for i in range(offset, offset + n)]
    return [{"text": f"document {i}: {', '.join(of_it)}."} for i, of_it in enumerate(numbers, offset)]


def keys(batch):
    return [tuple(row) for row in batch["input_ids"].tolist()]


def epoch_of(rows, epoch):
    return keys(rows.batch(epoch * rows.rows_per_epoch, rows.rows_per_epoch))


def train_stream(prepared, i=0):
    source = prepared.index["sources"][i]
    return np.fromfile(f"{source['folder']}/train-00000.bin", np.uint16).astype(np.int64)


def test_every_token_is_a_target_exactly_once_an_epoch(opened):
    prepared = opened(documents(60))
    rows = prepared.train_rows(T, False, seed=3)
    stream = train_stream(prepared)
    batch = rows.batch(0, rows.rows_per_epoch)
    assert batch.keys() == {"input_ids", "labels"} and batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["labels"].equal(batch["input_ids"]), "without document mask every position is a target"
    in_rows = rows.rows_per_epoch * (T - 1)
    assert len(stream) - 1 - in_rows < T - 1, "more than the last partial row was dropped"
    assert Counter(batch["labels"][:, 1:].flatten().tolist()) == Counter(stream[1 : 1 + in_rows].tolist())
    expected = sorted(tuple(stream[i * (T - 1) : i * (T - 1) + T].tolist()) for i in range(rows.rows_per_epoch))
    assert sorted(keys(batch)) == expected


@pytest.mark.parametrize("split", [[12], [4, 4, 4], [1, 3, 5, 2, 1]])
def test_order_does_not_depend_on_how_it_is_read(opened, split):
    rows = opened(documents(40), documents(40, 100)).train_rows(T, True, seed=0)
    whole = rows.batch(7, 12)
    position, parts = 7, []
    for n in split:
        parts.append(rows.batch(position, n))
        position += n
    for key, values in whole.items():
        assert values.equal(torch.cat([part[key] for part in parts])), key


def test_resuming_is_a_seek(opened):
    prepared = opened(documents(40))
    straight = prepared.train_rows(T, False, seed=5)
    for position in range(0, 3 * straight.rows_per_epoch, 4):
        straight.batch(position, 4)
    far = 3 * straight.rows_per_epoch + 2
    assert keys(prepared.train_rows(T, False, seed=5).batch(far, 3)) == keys(straight.batch(far, 3))
    straight.batch(0, 4)  # and back
    assert keys(straight.batch(far, 3)) == keys(prepared.train_rows(T, False, seed=5).batch(far, 3))


def test_a_batch_may_straddle_epochs(opened):
    rows = opened(documents(30)).train_rows(T, False, seed=0)
    n = rows.rows_per_epoch
    two_epochs = epoch_of(rows, 0) + epoch_of(rows, 1)
    assert keys(rows.batch(n - 3, 6)) == two_epochs[n - 3 : n + 3]
    assert keys(rows.batch(n // 2, 2 * n)) == (two_epochs + epoch_of(rows, 2))[n // 2 : n // 2 + 2 * n]


def test_epochs_and_seeds_differ_in_order_alone(opened):
    prepared = opened(documents(50))
    rows, other = prepared.train_rows(T, False, seed=0), prepared.train_rows(T, False, seed=1)
    orders = [epoch_of(rows, 0), epoch_of(rows, 1), epoch_of(other, 0)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_weights_are_repetitions(opened):
    records = documents(60), documents(60, 100), documents(60, 200)
    single = opened(*records).train_rows(T, False, seed=0)
    once = Counter(epoch_of(single, 0))
    assert set(once.values()) == {1}, "rows of this test must be distinct"
    prepared = opened(*records, weights=(1.0, 2.0, 0.5))
    rows = prepared.train_rows(T, False, seed=0)
    belongs_to = {}
    for i in range(3):
        stream = train_stream(prepared, i).tolist()
        for start in range(0, len(stream) - T + 1, T - 1):
            belongs_to[tuple(stream[start : start + T])] = i
    sizes = Counter(belongs_to.values())
    for epoch in range(2):
        seen = Counter(epoch_of(rows, epoch))
        times = [{seen[row] for row in belongs_to if belongs_to[row] == i} for i in range(3)]
        assert times[0] == {1} and times[1] == {2} and times[2] == {0, 1}
        halves = sum(seen[row] for row in belongs_to if belongs_to[row] == 2)
        assert halves == round(sizes[2] / 2)
    assert rows.rows_per_epoch == sizes[0] + 2 * sizes[1] + round(sizes[2] / 2)
    assert rows.tokens_per_epoch == rows.rows_per_epoch * T


def test_origin_names_the_source_and_its_row(opened):
    prepared = opened(documents(60), documents(60, 100), weights=(1.0, 1.5))
    rows = prepared.train_rows(T, False, seed=0)
    seen = Counter()
    for position in range(3 * rows.rows_per_epoch):
        name, row = rows.origin(position)
        stream = train_stream(prepared, prepared.names.index(name))
        assert rows.batch(position, 1)["input_ids"][0].tolist() == stream[row * (T - 1) : row * (T - 1) + T].tolist()
        seen[name, row] += 1
    assert {name for name, _ in seen} == {"s0", "s1"} and {seen[key] for key in seen if key[0] == "s0"} == {3}


def test_damaged_numbers_are_named_even_where_checksums_are_not_read(opened, tokenizer, chats):
    """data.verify: false skips the checksums; what would crash the model or loop later is refused all the same."""
    prepared = opened(chats(30), format="chat", held_out_fraction=0.3)
    folder = Path(prepared.index["sources"][0]["folder"])

    def read():
        rows = prepared.train_rows(256, True, seed=0)
        return rows.batch(0, rows.rows_per_epoch), list(prepared.held_out("s0", 256).batches(4))

    read()
    for name, dtype, value, problem in [
        ("train-00000.bin", np.uint16, tokenizer.vocab_size, f"holds {tokenizer.vocab_size}, beyond"),
        ("held_out-00000.bin", np.uint16, 65535, "holds 65535, beyond"),
        ("train-00000.mask", np.uint8, 2, "holds 2, beyond 1"),
        ("train.idx", np.int64, -1, "does not say where documents begin"),
        ("held_out.idx", np.int64, 2**62, "does not say where documents begin"),
        ("held_out.bytes", np.int64, 2**62, "its sum is not that of index.json"),
        ("train.bytes", np.int64, -1, "its sum is not that of index.json"),
    ]:
        whole = (folder / name).read_bytes()
        values = np.frombuffer(whole, dtype).copy()
        values[1] = value
        (folder / name).write_bytes(values.tobytes())
        with pytest.raises(ValueError, match=f"{name}: damaged, .*{problem}.*; remove {folder}") as error:
            read()
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(whole)
    read()


def test_half_a_source_is_whole_after_two_epochs(opened):
    prepared = opened(documents(60), documents(60, 100), weights=(1.0, 0.5))
    rows = prepared.train_rows(T, False, seed=0)
    seen = Counter(epoch_of(rows, 0)) + Counter(epoch_of(rows, 1))
    stream = train_stream(prepared, 1).tolist()
    half = [tuple(stream[i : i + T]) for i in range(0, len(stream) - T + 1, T - 1)]
    missed = [row for row in half if seen[row] == 0]
    assert len(missed) <= 1, "an odd number of rows leaves one over, no more"


def test_the_last_epochs_of_a_long_run_are_still_permutations(opened):
    rows = opened(documents(30)).train_rows(T, False, seed=2**31)
    assert sorted(epoch_of(rows, 10**6)) == sorted(epoch_of(rows, 0))


def test_document_mask_numbers_documents_and_ignores_targets_across_their_borders(opened, tokenizer):
    rows = opened(documents(40)).train_rows(T, True, seed=0)
    batch = rows.batch(0, rows.rows_per_epoch)
    assert batch.keys() == {"input_ids", "labels", "document_ids"}
    is_bos = batch["input_ids"] == tokenizer.bos_id
    assert is_bos.any()
    assert batch["labels"][is_bos].eq(IGNORED).all()
    assert batch["labels"][~is_bos].equal(batch["input_ids"][~is_bos])
    steps = batch["document_ids"].diff(dim=1)
    assert steps.equal(is_bos[:, 1:].long()), "a document begins at its BOS and nowhere else"


def test_held_out_rows_count_every_token_but_bos_once(opened, tokenizer):
    records = documents(120)
    prepared = opened(records, held_out_fraction=0.3)
    for document_mask in (False, True):
        held_out = prepared.held_out("s0", T, document_mask)
        n_held_out = prepared.index["sources"][0]["held_out"]["documents"]
        stream = np.fromfile(f"{prepared.index['sources'][0]['folder']}/held_out-00000.bin", np.uint16)
        targets = []
        for batch_size in (1, 5):
            targets.append([])
            for batch in held_out.batches(batch_size):
                labels = batch["labels"][:, 1:]
                targets[-1] += labels[labels != IGNORED].tolist()
                if "attention_mask" in batch:
                    padding = ~batch["attention_mask"]
                    assert padding.any() and batch["labels"][padding].eq(IGNORED).all()
                    assert batch["input_ids"][padding].eq(tokenizer.pad_id).all()
                    if document_mask:
                        text = batch["document_ids"][batch["attention_mask"]].unique()
                        assert not torch.isin(batch["document_ids"][padding], text).any()
        assert targets[0] == targets[1] == stream[stream != tokenizer.bos_id].tolist()
        assert held_out.n_tokens == len(targets[0]) == len(stream) - n_held_out
        assert held_out.n_bytes == prepared.index["sources"][0]["held_out"]["bytes"]


def test_a_subset_ends_with_a_whole_document_and_counts_its_own_bytes(opened, tokenizer):
    prepared = opened(documents(120), held_out_fraction=0.3)
    whole = prepared.held_out("s0", T)
    subset = whole.subset(100)
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in subset.batches(4)])
    targets = labels[labels != IGNORED].tolist()
    assert 90 < subset.n_tokens == len(targets) < 160 < whole.n_tokens
    assert targets[-1] == tokenizer.eos_id
    assert subset.n_bytes == len(tokenizer.decode(targets).encode())
    assert whole.subset(10**9).n_bytes == whole.n_bytes


def test_without_held_out_documents_there_are_no_rows(opened, chats):
    for prepared in (opened(documents(20)), opened(chats(9), format="chat")):
        held_out = prepared.held_out("s0", 64)
        assert (held_out.n_tokens, held_out.n_bytes, list(held_out.batches(4))) == (0, 0, [])
        assert held_out.subset(5).n_tokens == 0


def test_packed_conversations_are_whole_and_only_answers_are_targets(opened, tokenizer, chats):
    from data.chat import encode_conversation

    records = chats(60)
    rows = opened(records, format="chat").train_rows(256, False, seed=0)
    batch = rows.batch(0, rows.rows_per_epoch)
    assert batch.keys() == {"input_ids", "labels", "document_ids", "attention_mask"}
    assert batch["attention_mask"].dtype == torch.bool
    found, learned = Counter(), Counter()
    for ids, labels, numbers, real in zip(
        *(batch[k] for k in ("input_ids", "labels", "document_ids", "attention_mask"))
    ):
        assert labels[~real].eq(IGNORED).all() and ids[~real].eq(tokenizer.pad_id).all()
        assert not torch.isin(numbers[~real], numbers[real]).any(), "padding belongs to no conversation"
        for number in numbers[real].unique():
            at = (numbers == number) & real
            found[tuple(ids[at].tolist())] += 1
            learned[tuple(labels[at].tolist())] += 1
        assert labels.ne(IGNORED).any(), "a row without targets"
    encoded = [encode_conversation(tokenizer, record["messages"]) for record in records]
    assert found == Counter(tuple(ids) for ids, _ in encoded)
    assert learned == Counter(tuple(i if m else IGNORED for i, m in zip(ids, mask)) for ids, mask in encoded)


def test_conversations_too_long_for_a_row_are_counted_and_left_out_of_the_bytes(opened, tokenizer, chats):
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 400}]}
    rows = opened([*chats(9), long], format="chat").train_rows(256, False, seed=0)
    assert rows.skipped == {"s0": {"longer than 256 tokens": 1}}
    held = opened([*chats(60), *[dict(long, n=i) for i in range(9)]], format="chat", held_out_fraction=0.5)
    held_out = held.held_out("s0", 256)
    spelled = ""
    for batch in held_out.batches(3):
        for labels in batch["labels"]:
            spelled += tokenizer.decode(labels[labels != IGNORED].tolist())
    counted = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in held_out.batches(3))
    assert held_out.n_bytes == len(spelled.encode()) and held_out.n_tokens == counted > 0


def test_too_little_text_for_one_row_is_an_error(opened, chats):
    with pytest.raises(
        ValueError, match="source 's0': nothing of its .* makes a row of 5000 tokens; give it more text"
    ):
        opened(documents(3)).train_rows(5000, False, seed=0)
    with pytest.raises(ValueError, match="makes a row of 8 tokens; raise data.context_length"):
        opened(chats(3), format="chat").train_rows(8, True, seed=0)
    with pytest.raises(ValueError, match="leave not one row an epoch; raise them"):
        opened(documents(5), weights=(0.001,)).train_rows(T, False, seed=0)
