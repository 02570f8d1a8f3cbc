"""Shards are written once, whole or not at all, and hold what they should."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data import corpora
from data import prepare as module
from data.config import DataConfig, SourceConfig
from data.integrity import read_checksums, write_checksums
from data.prepare import open_prepared, prepare
from data.tokenizer import Tokenizer


def documents(n, word="word"):
    return [{"text": f"{word} {i} " + "and then some " * (i % 4)} for i in range(n)]


def folder_of(prepared, name="s0"):
    return Path(next(s["folder"] for s in prepared.index["sources"] if s["name"] == name))


def stream(prepared, split="train", name="s0", ending="bin"):
    folder = folder_of(prepared, name)
    parts = [
        np.fromfile(f, np.uint16 if ending == "bin" else np.uint8) for f in sorted(folder.glob(f"{split}-*.{ending}"))
    ]
    return np.concatenate(parts).tolist() if parts else []


def everything_under(folder):
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_shards_hold_bos_text_eos_of_every_document_in_order(tokenizer, jsonl, config):
    records = documents(30)
    data = config({"path": jsonl(records)})
    prepare(data, tokenizer, progress=False)
    prepared = open_prepared(data, tokenizer)
    expected = [i for r in records for i in (tokenizer.bos_id, *tokenizer.encode(r["text"]), tokenizer.eos_id)]
    assert stream(prepared) == expected
    train = prepared.index["sources"][0]["train"]
    assert train["tokens"] == len(expected) and train["documents"] == 30
    assert train["bytes"] == sum(len(r["text"].encode()) for r in records)


def test_checksums_cover_every_file_and_coreutils_agrees(tokenizer, jsonl, config, chats):
    data = config({"path": jsonl(chats(30))}, format="chat", held_out_fraction=0.3)
    prepare(data, tokenizer, progress=False)
    folder = folder_of(open_prepared(data, tokenizer))
    names = {path.name for path in folder.iterdir()}
    assert read_checksums(folder).keys() == names - {"SHA256SUMS"} and "index.json" in names and "train.idx" in names
    checked = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len(names) - 1, checked.stdout + checked.stderr
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", folder.name]


def test_conversations_hold_tokens_mask_and_offsets(tokenizer, jsonl, config, chats):
    from data.chat import encode_conversation

    records = chats(12)
    data = config({"path": jsonl(records)}, format="chat")
    prepare(data, tokenizer, progress=False)
    prepared = open_prepared(data, tokenizer)
    encoded = [encode_conversation(tokenizer, record["messages"]) for record in records]
    assert stream(prepared) == [i for ids, _ in encoded for i in ids]
    assert stream(prepared, ending="mask") == [m for _, mask in encoded for m in mask]
    offsets = np.fromfile(folder_of(prepared) / "train.idx", np.int64)
    assert np.diff(offsets).tolist() == [len(ids) for ids, _ in encoded]
    answers = [m["content"].strip() for r in records for m in r["messages"] if m["role"] == "assistant"]
    assert prepared.index["sources"][0]["train"]["bytes"] == sum(len(answer.encode()) for answer in answers)


def test_many_small_shards_are_the_same_stream(tokenizer, jsonl, config, monkeypatch, tmp_path):
    data = config({"path": jsonl(documents(40))})
    prepare(data, tokenizer, progress=False)
    whole = open_prepared(data, tokenizer)
    monkeypatch.setattr(module, "SHARD_TOKENS", 37)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    cut_data = config({"path": data.sources[0].path})
    cut_data.cache_dir = str(tmp_path / "other")
    prepare(cut_data, tokenizer, progress=False)
    cut = open_prepared(cut_data, tokenizer)
    assert len(cut.index["sources"][0]["train"]["files"]) > 5
    assert stream(cut) == stream(whole)
    a, b = (p.train_rows(100, False, seed=1).batch(0, 5)["input_ids"] for p in (whole, cut))
    assert a.equal(b), "rows that lie across shards differ"


def test_a_second_call_touches_nothing(tokenizer, jsonl, config, monkeypatch):
    data = config({"path": jsonl(documents(20))})
    folder = prepare(data, tokenizer, progress=False)
    before = everything_under(folder)
    monkeypatch.setattr(module, "iterate", lambda *_: pytest.fail("the source was read again"))
    assert prepare(data, tokenizer, progress=False) == folder
    assert everything_under(folder) == before


def test_an_interruption_costs_only_the_source_it_hit(tokenizer, jsonl, config, monkeypatch):
    data = config({"path": jsonl(documents(20), "a.jsonl")}, {"path": jsonl(documents(20), "b.jsonl")})
    read, real = [], module.iterate

    def interrupted(source, format):
        for i, record in enumerate(real(source, format)):
            if source.name == "s1" and i == 7:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(module, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tokenizer, progress=False)
    folder = Path(data.cache_dir) / "prepared"
    assert [p.name[:3] for p in folder.iterdir() if p.is_dir()] == ["s0-"], "the interrupted source left something"
    monkeypatch.setattr(module, "iterate", lambda source, format: read.append(source.name) or real(source, format))
    prepare(data, tokenizer, progress=False)
    assert read == ["s1"], "the finished source was read again"
    open_prepared(data, tokenizer)


def test_what_a_killed_process_left_is_cleared(tokenizer, jsonl, config):
    data = config({"path": jsonl(documents(20))})
    leftover = Path(data.cache_dir) / "prepared" / "s0-0123456789abcdef.partial"
    leftover.mkdir(parents=True)
    (leftover / "train-00000.bin").write_bytes(b"half")
    prepare(data, tokenizer, progress=False)
    assert not leftover.exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tokenizer, jsonl, config, monkeypatch):
    data = config({"path": jsonl(documents(3000))})

    def on_the_full_disk(self):
        self.file, self.left = open("/dev/full", "wb"), module.SHARD_TOKENS
        self.files.append({"name": "full", "tokens": 0})

    monkeypatch.setattr(module._ShardWriter, "_next_file", on_the_full_disk)
    with pytest.raises(ValueError, match="data.cache_dir: the disk of .* is full; free some space") as error:
        prepare(data, tokenizer, progress=False)
    assert "\n" not in str(error.value)
    assert [p.name for p in (Path(data.cache_dir) / "prepared").iterdir()] == [".lock"]


def test_a_mistake_in_the_data_leaves_nothing(tokenizer, jsonl, config):
    data = config({"path": jsonl([*documents(20), '{"text": "cut of'])})
    with pytest.raises(ValueError, match="data.jsonl:21: not readable as JSON"):
        prepare(data, tokenizer, progress=False)
    assert [p.name for p in (Path(data.cache_dir) / "prepared").iterdir()] == [".lock"]


def test_a_cache_folder_that_cannot_be_made_is_named(tokenizer, jsonl, config, tmp_path):
    data = config({"path": jsonl(documents(3))})
    (tmp_path / "file").write_text("")
    data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match="data.cache_dir: cannot make the folder"):
        prepare(data, tokenizer, progress=False)


def test_shards_of_another_tokenizer_are_refused(tokenizer, manual, jsonl, config):
    data = config({"path": jsonl(documents(20))})
    other = Tokenizer.train(manual[:3], 300)
    with pytest.raises(ValueError, match="source 's0': not prepared yet in data.cache_dir .*scripts.prepare_data"):
        open_prepared(data, other)
    prepare(data, tokenizer, progress=False)
    with pytest.raises(ValueError, match="made with another tokenizer .*run: python -m scripts.prepare_data"):
        open_prepared(data, other)
    prepare(data, other, progress=False)  # the remedy works, and the first shards stay
    assert open_prepared(data, other).index["tokenizer_fingerprint"] == other.fingerprint
    folder = folder_of(open_prepared(data, tokenizer))
    index, names = folder / "index.json", read_checksums(folder)
    index.write_text(index.read_text().replace(tokenizer.fingerprint, other.fingerprint))
    write_checksums(folder, names)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        open_prepared(data, tokenizer)


def test_changed_text_or_settings_are_prepared_anew_but_a_weight_is_not(tokenizer, jsonl, config):
    path = jsonl(documents(20))
    data = config({"path": path})
    prepare(data, tokenizer, progress=False)
    open_prepared(config({"path": path, "weight": 3.0}), tokenizer)
    for other in (config({"path": path, "text_key": "story"}), config({"path": path}, held_out_fraction=0.1)):
        with pytest.raises(ValueError, match="not prepared yet"):
            open_prepared(other, tokenizer)
    stamp = os.stat(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1_000))
    with pytest.raises(ValueError, match="not prepared yet"):
        open_prepared(data, tokenizer)


def test_a_damaged_shard_is_named(tokenizer, jsonl, config):
    data = config({"path": jsonl(documents(20))})
    prepare(data, tokenizer, progress=False)
    prepared = open_prepared(data, tokenizer)
    shard = folder_of(prepared) / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match="train-00000.bin: missing or not of the size in index.json"):
        prepared.train_rows(16, False, seed=0)
    (folder_of(prepared) / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json: damaged, its bytes are not those that were written .*; remove"):
        open_prepared(data, tokenizer)


def test_each_part_of_a_prepared_source_is_verified(tokenizer, jsonl, config, chats):
    """A flipped bit anywhere is found and its file named; verify("held_out") reads what evaluation needs, no more."""
    data = config({"path": jsonl(chats(40))}, format="chat", held_out_fraction=0.3)
    prepare(data, tokenizer, progress=False)
    prepared = open_prepared(data, tokenizer)
    prepared.verify()
    for path in sorted(folder_of(prepared).iterdir()):
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            named = r"\S+" if path.name == "SHA256SUMS" else f"(SHA256SUMS|{path.name})"  # a wrong sum names its file
            with pytest.raises(ValueError, match=f"^{folder_of(prepared)}/{named}: .*; remove .*prepare_data"):
                prepared.verify()
            if path.name.startswith("train"):
                prepared.verify("held_out")
            elif path.name.startswith("held_out"):
                prepared.verify("train")
        path.write_bytes(whole)
    prepared.verify()


def test_content_digests_tell_text_from_time_and_place(tokenizer, jsonl, config, tmp_path):
    def digests(records, name, cache):
        data = config(
            {"path": jsonl(records, name)}, {"path": jsonl(documents(9), "same.jsonl")}, held_out_fraction=0.2
        )
        data.cache_dir = str(tmp_path / cache)
        prepare(data, tokenizer, progress=False)
        return open_prepared(data, tokenizer).content_digests()

    first = digests(documents(60), "a.jsonl", "cache")
    assert first.keys() == {"s0", "s1"} and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in first.values())
    assert digests(documents(60), "b.jsonl", "elsewhere") == first, "time and place must not matter"
    other = documents(60)
    other[7]["text"] += "!"
    changed = digests(other, "a.jsonl", "cache")
    assert changed["s0"] != first["s0"] and changed["s1"] == first["s1"]


def test_a_half_removed_folder_is_refused_or_made_anew(tokenizer, jsonl, config):
    data = config({"path": jsonl(documents(40))}, held_out_fraction=0.3)
    prepare(data, tokenizer, progress=False)
    prepared = open_prepared(data, tokenizer)
    folder, whole = folder_of(prepared), everything_under(folder_of(prepared))
    for name in ("SHA256SUMS", "held_out.idx", "held_out.bytes", "held_out-00000.bin", "train-00000.bin"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(
            ValueError, match=f"{name}: missing.*; remove {folder} and run: python -m scripts.prepare_data"
        ):
            opened = open_prepared(data, tokenizer)
            opened.train_rows(16, False, 0), opened.held_out("s0", 16)
        if name != "SHA256SUMS":
            with pytest.raises(ValueError, match=f"{name}: missing"):
                open_prepared(data, tokenizer).verify()
        (folder / name).write_bytes(content)
    (folder / "index.json").unlink()
    prepare(data, tokenizer, progress=False)
    assert {
        path: content
        for path, (_, content) in everything_under(folder).items()
        if "index" not in path and "SUMS" not in path
    } == {path: content for path, (_, content) in whole.items() if "index" not in path and "SUMS" not in path}


def test_nothing_is_written_or_removed_through_a_link(tokenizer, jsonl, config, tmp_path):
    """A cache folder from a stranger with links to a person's own files: they stay as they are."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    data = config({"path": jsonl(documents(20))})
    prepare(data, tokenizer, progress=False)
    folder = folder_of(open_prepared(data, tokenizer))
    prepared = folder.parent
    shutil.rmtree(folder)
    folder.symlink_to(mine)
    (prepared / "other.partial").symlink_to(mine)
    (prepared / f"{folder.name}.partial").symlink_to(mine)
    (prepared / ".lock").unlink()
    (prepared / ".lock").symlink_to(mine / "diary.txt")
    with pytest.raises(OSError):
        prepare(data, tokenizer, progress=False)
    (prepared / ".lock").unlink()
    prepare(data, tokenizer, progress=False)
    assert not folder.is_symlink() and sorted(p.name for p in prepared.iterdir()) == [".lock", folder.name]
    assert [p.name for p in mine.iterdir()] == ["diary.txt"] and (mine / "diary.txt").read_text() == "dear diary"
    shard = folder / "train-00000.bin"
    (mine / "elsewhere").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(mine / "elsewhere")
    with pytest.raises(ValueError, match="train-00000.bin: (a link|missing or not of the size)"):
        open_prepared(data, tokenizer).train_rows(16, False, seed=0)
    with pytest.raises(ValueError, match="train-00000.bin: a link; remove"):
        open_prepared(data, tokenizer).verify()
    (folder / "index.json").unlink()
    os.mkfifo(folder / "index.json")
    with pytest.raises(ValueError, match="index.json: no plain file; remove"):
        open_prepared(data, tokenizer)


def test_added_data_moves_no_document_between_train_and_held_out(tokenizer, jsonl, config):
    def held_out(n):
        data = config({"path": jsonl(documents(n), f"{n}.jsonl")}, held_out_fraction=0.2)
        prepare(data, tokenizer, progress=False)
        texts = tokenizer.decode(stream(open_prepared(data, tokenizer), "held_out"), skip_special_tokens=False)
        return texts.replace("<|bos|>", "").split("<|eos|>")[:-1]

    few, many = held_out(100), held_out(300)
    assert 8 < len(few) < 35
    assert many[: len(few)] == few


def test_what_is_left_out_is_counted(tokenizer, jsonl, config, chats):
    data = config({"path": jsonl([*documents(5), {"text": ""}])})
    prepare(data, tokenizer, progress=False)
    assert open_prepared(data, tokenizer).index["sources"][0]["skipped"] == {"empty text": 1}
    silent = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " \n"}]}
    data = config({"path": jsonl([*chats(3), silent], "chat.jsonl")}, format="chat")
    prepare(data, tokenizer, progress=False)
    assert open_prepared(data, tokenizer).index["sources"][0]["skipped"] == {"nothing to learn": 1}


def test_nothing_to_train_on_is_an_error(tokenizer, jsonl, config):
    with pytest.raises(
        ValueError, match=r"source 's0': nothing to train on: 0 documents .* 2 skipped \(2 empty text\)"
    ):
        prepare(config({"path": jsonl([{"text": ""}, {"text": ""}])}), tokenizer, progress=False)
    with pytest.raises(ValueError, match="data.sources: there is no source; name at least one"):
        prepare(config(), tokenizer, progress=False)


def test_held_out_tokens_stop_after_whole_documents(tokenizer, jsonl, config):
    data = config({"path": jsonl(documents(200))}, held_out_fraction=0.5, held_out_max_tokens=100)
    prepare(data, tokenizer, progress=False)
    source = open_prepared(data, tokenizer).index["sources"][0]
    assert 100 <= source["held_out"]["tokens"] < 140
    left_out = source["skipped"]["held out, beyond held_out_max_tokens"]
    assert left_out + source["held_out"]["documents"] + source["train"]["documents"] == 200


def test_large_vocabularies_get_four_bytes(tokenizer, jsonl, config, monkeypatch):
    data = config({"path": jsonl(documents(10))})
    monkeypatch.setattr(module, "_dtype", lambda tokenizer: np.uint32)
    prepare(data, tokenizer, progress=False)
    prepared = open_prepared(data, tokenizer)
    assert prepared.index["dtype"] == "uint32"
    batch = prepared.train_rows(8, False, seed=0).batch(0, prepared.train_rows(8, False, seed=0).rows_per_epoch)
    assert int(batch["input_ids"].max()) < tokenizer.vocab_size


@pytest.fixture(scope="module")
def prepared_bibles(tokenizer, tmp_path_factory, bibles):
    cache = tmp_path_factory.mktemp("bibles")
    sources = [SourceConfig(name=v, kind="embedded", corpus=f"bible-{v}") for v in bibles]
    data = DataConfig(cache_dir=str(cache), sources=sources, held_out_fraction=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "bible_books", bibles.get)  # parsed once for all these tests
        prepare(data, tokenizer, progress=False)
    return open_prepared(data, tokenizer)


def test_no_held_out_book_is_in_a_training_shard_of_any_version(prepared_bibles, tokenizer, bibles):
    names = r"\b(Vashti|Haman|Elimelech|Naomi|Abed-?nego|Belteshazzar|Syntyche)\b"  # in the held-out books alone
    for version, books in bibles.items():
        train = tokenizer.decode(stream(prepared_bibles, "train", version))
        held_out = tokenizer.decode(stream(prepared_bibles, "held_out", version))
        assert set(re.findall(names, held_out)) >= {"Vashti", "Haman", "Naomi", "Syntyche"}, version
        assert not re.search(names, train), version
        assert held_out == "".join(books[book] for book in corpora.HELD_OUT_BOOKS)
        assert train == "".join(text for book, text in books.items() if book not in corpora.HELD_OUT_BOOKS)


def test_no_held_out_verse_is_in_a_training_shard(prepared_bibles, tokenizer):
    """Every verse of at least 60 characters, except those that a book we train on says in the same words."""
    for version in ("web", "kjv"):
        train = re.sub(r"\s+", " ", tokenizer.decode(stream(prepared_bibles, "train", version)))
        held_out, others = [], set()
        for verse_id, verse in corpora.bible_verses(version).items():
            if corpora.BOOKS[verse_id // 1_000_000 - 1] in corpora.HELD_OUT_BOOKS:
                held_out.append(verse)
            else:
                others.add(verse)
        sample = [verse for verse in held_out if len(verse) >= 60 and verse not in others][::6]
        assert len(sample) > 120
        assert [verse for verse in sample if verse in train] == []


def test_the_index_can_be_read_by_anyone(prepared_bibles):
    index = json.loads((folder_of(prepared_bibles, "bbe") / "index.json").read_text())
    assert index["held_out"]["documents"] == 6 and index["train"]["documents"] == 60
    assert index["format"] == "text" and index["dtype"] == "uint16" and index["seconds"] > 0
