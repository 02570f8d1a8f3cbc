"""lm_eval on a run: the numbers are those of the model asked one row at a time, and of `lm_eval --model hf` on the export."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import jinja2.sandbox
import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from data.chat import CHAT_TEMPLATE, encode_prompt
from eval import evaluate, harness, harness_guard, harness_scores, harness_tasks, tasks
from eval.harness_model import RunLM
from model.generate import generate
from train.checkpoint import Run, open_run

SUBJECTS = ("class", "module", "function", "object", "statement", "list", "string", "name", "value", "loop")
VERBS = ("returns", "raises", "defines", "binds", "holds", "ends")


def phrase(i: int, words: int) -> str:
    rng = random.Random(i)
    return " ".join(f"the {rng.choice(SUBJECTS)} {rng.choice(VERBS)}" for _ in range(words))


QUIZ = [  # two to five choices, of one token and of many, some questions longer than the small models' context of 128
    {
        "question": f"{phrase(i, 2 + (60 if i % 7 == 3 else i % 4))} a",
        "choices": [f"{word}{' that it holds' * (i % 3)}" for word in random.Random(i).sample(SUBJECTS, 2 + i % 4)],
        "label": i % 2,
    }
    for i in range(24)
]
TEXTS = [{"text": phrase(i, 3 + 40 * (i % 3)) + " — ça suffit.\n"} for i in range(9)]
CONTINUED = [{"start": f"{phrase(i, 1 + i % 6)} the", "wanted": random.Random(i).choice(SUBJECTS)} for i in range(14)]


def write_tasks(folder: Path) -> Path:
    """One task of each kind over local files: quiz, texts (rolling), cloze (likelihood), continued (answers)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("quiz", QUIZ), ("texts", TEXTS), ("continued", CONTINUED), ("shown", QUIZ[:6])):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def data(name: str) -> dict:
        files = {"test": str(folder / f"{name}.jsonl"), "train": str(folder / "shown.jsonl")}
        split = {"data_files": files if name == "quiz" else {"test": files["test"]}, "cache_dir": str(folder / "cache")}
        return {"dataset_path": "json", "dataset_kwargs": split, "test_split": "test"}

    accuracy = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    rolling = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
        for metric, aggregation in (("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))
    ]
    configs = {
        "quiz": {
            **data("quiz"), "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
            "doc_to_target": "label", "fewshot_split": "train", "metric_list": accuracy,
        },
        "texts": {**data("texts"), "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
                  "metric_list": rolling},
        "cloze": {
            **data("continued"), "output_type": "loglikelihood", "doc_to_text": "{{start}}", "doc_to_target": "{{' ' ~ wanted}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, accuracy[0]],
        },
        "continued": {
            **data("continued"), "output_type": "generate_until", "doc_to_text": "start", "doc_to_target": "wanted",
            "generation_kwargs": {"until": [".", "\n", "returns"], "max_gen_toks": 24}, "metric_list": exact,
        },
    }  # fmt: skip
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"local_{name}", **config}), encoding="utf-8")
    return folder


LOCAL = ["local_quiz", "local_texts", "local_cloze", "local_continued"]


@pytest.fixture(scope="module", autouse=True)
def one_load():
    """What the first test pays for: the import of lm_eval and datasets."""
    harness._quiet()


@pytest.fixture
def run(random_run) -> Run:
    return open_run(random_run(n_routed_experts=5, num_experts_per_tok=2), device="cpu", precision="float32")


def asked(*arguments: tuple, task: str = "quiz") -> list[Instance]:
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=args, idx=0, metadata=(task, i, 1))
        for i, args in enumerate(arguments)
    ]


def log_probabilities(run: Run, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return run.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def by_hand(run: Run, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """One row at a time, without padding: the last tokens that fit, each answer token from what is before it."""
    limit = run.model.config.max_position_embeddings
    ids = (context + answer)[-(limit + 1) :]
    log_p = log_probabilities(run, ids[:-1])
    places = range(len(ids) - 1 - len(answer), len(ids) - 1)
    return sum(log_p[t, ids[t + 1]].item() for t in places), all(log_p[t].argmax() == ids[t + 1] for t in places)


# ---- the model


def test_likelihoods_are_those_of_single_rows(run):
    model = RunLM(run, batch_size=3)
    questions = [(item["question"], f" {choice}") for item in QUIZ[:8] for choice in item["choices"]]
    questions += [("", "the class"), ("the class  ", "returns"), ("a", ""), ("The <|im_end|>\n", "<|eos|>")]
    encoded = [
        model._encode_pair(*pair) if pair[0] else ([run.tokenizer.bos_id], model.tok_encode(pair[1]))
        for pair in questions
    ]
    assert any(len(context) > 130 for context, _ in encoded), "no question is too long"
    assert encoded[-1] == (
        [*model.tok_encode("The "), run.tokenizer.im_end_id],
        [*model.tok_encode("\n"), run.tokenizer.eos_id],
    )
    scores = model.loglikelihood(asked(*questions))
    for (context, answer), (nats, greedy) in zip(encoded, scores):
        wanted = by_hand(run, context, answer) if answer else (0.0, True)
        assert math.isclose(nats, wanted[0], abs_tol=1e-4) and greedy == wanted[1], (context, answer)
    in_one_batch = RunLM(run, batch_size=50).loglikelihood(asked(*questions))
    assert all(math.isclose(a, b, abs_tol=1e-4) for (a, _), (b, _) in zip(in_one_batch, scores))
    assert "longer than the context of 128 tokens" in model.notes()[0]


def test_greedy_is_told(run):
    model = RunLM(run)
    ids = model.tok_encode("The class")
    best = log_probabilities(run, ids)[-1].argmax().item()
    other = (best + 1) % 500 + 5
    assert [g for _, g in model._loglikelihood_tokens([(None, ids, [best]), (None, ids, [other])])] == [True, False]


def test_requests_that_differ_in_their_last_token_share_a_row(run, monkeypatch):
    model, rows = RunLM(run), []
    forward = model._log_probabilities
    monkeypatch.setattr(model, "_log_probabilities", lambda batch: rows.extend(batch) or forward(batch))
    ids = model.tok_encode("The class")
    scores = model._loglikelihood_tokens(
        [(None, ids, [token]) for token in range(300, 340)] + [(None, ids[:-1], [ids[-1], 300])]
    )
    assert rows == [tuple(ids)]
    assert math.isclose(scores[-1][0], scores[0][0] + by_hand(run, ids[:-1], ids[-1:])[0], abs_tol=1e-4)


def test_a_rolling_text_is_read_whole_each_token_once(run):
    model = RunLM(run, batch_size=2)
    texts = [TEXTS[0]["text"], TEXTS[2]["text"], ""]
    totals = model.loglikelihood_rolling(asked(*((text,) for text in texts)))
    ids = [run.tokenizer.bos_id, *model.tok_encode(texts[0])]
    log_p = log_probabilities(run, ids)
    assert math.isclose(totals[0], sum(log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1)), abs_tol=1e-3)

    ids = [run.tokenizer.bos_id, *model.tok_encode(texts[1])]
    n, limit = len(ids) - 1, 128
    assert n > 2 * limit and n % limit, "the text is too short, or ends with a window"
    ends = [*range(limit, n, limit), n]
    windows = [
        ids[max(0, end - limit) : end + 1] for end in ends
    ]  # the last one reads as much as fits, and says only the rest
    wanted = 0.0
    for window, said in zip(windows, [limit] * (len(ends) - 1) + [n % limit]):
        log_p = log_probabilities(run, window[:-1])
        wanted += sum(log_p[t, window[t + 1]].item() for t in range(len(window) - 1 - said, len(window) - 1))
    assert math.isclose(totals[1], wanted, rel_tol=1e-5)
    assert totals[2] == 0.0


def test_answers_are_greedy_and_end_before_the_first_stop(run):
    model = RunLM(run, batch_size=4)
    chat = model.apply_chat_template([{"role": "user", "content": "What is a class?"}])  # with special tokens in it
    starts = [item["start"] for item in CONTINUED] + [phrase(3, 60), chat]
    plain = {"until": [], "max_gen_toks": 20}
    answers = model.generate_until(asked(*((start, dict(plain)) for start in starts)))
    for start, answer in zip(starts, answers):
        prompt = model.tok_encode(start)[-108:]
        (ids,) = generate(run.model, [prompt], max_new_tokens=20, temperature=0.0, stop_ids=model.stop_ids)
        assert answer == run.tokenizer.decode(ids), start
    assert any(len(answer) > 12 for answer in answers)
    stops = [answer[len(answer) // 2 :][:3] or "#" for answer in answers]
    cut = model.generate_until(asked(*((start, {**plain, "until": [stop]}) for start, stop in zip(starts, stops))))
    assert cut == [answer.split(stop)[0] for answer, stop in zip(answers, stops)]


def test_an_answer_longer_than_the_context_is_cut_and_said(run):
    model = RunLM(run)
    model.generate_until(asked(("The class", {"until": ["\n"]}), task="long_one"))
    assert model.notes() == ["long_one allows answers of 256 tokens, the model has a context of 128: cut at 64"]
    with pytest.raises(ValueError, match="num_beams.*lacks"):
        model.generate_until(asked(("The class", {"until": ["\n"], "num_beams": 4})))


def test_the_chat_form_is_that_of_the_template(run):
    model, tokenizer = RunLM(run), run.tokenizer
    chat = [
        {"role": "system", "content": " Be short. "}, {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"}, {"role": "user", "content": "\n3 + 3?\n"},
    ]  # fmt: skip
    template = jinja2.sandbox.SandboxedEnvironment().from_string(CHAT_TEMPLATE)
    text = model.apply_chat_template(chat)
    assert text == template.render(messages=chat, bos_token="<|bos|>", add_generation_prompt=True)
    assert model.tok_encode(text) == encode_prompt(tokenizer, chat)
    assert (
        model.apply_chat_template([*chat, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
        == f"{text}It is"
    )


def test_bos_is_put_once_and_only_where_it_is_asked_for(run):
    bos = run.tokenizer.bos_id
    assert bos not in RunLM(run).tok_encode("The class")
    model = RunLM(run, add_bos=True)
    assert model.tok_encode("The class") == [bos, *RunLM(run).tok_encode("The class")]
    assert model.tok_encode("<|bos|>The class").count(bos) == 1
    assert bos not in model.tok_encode("The class", add_special_tokens=False)


# ---- tasks and scores


def test_scores_come_with_error_and_chance(run, tmp_path):
    loaded = harness.load_tasks(LOCAL, include_path=write_tasks(tmp_path), fewshot=0)
    scores, notes = harness.run_harness(run, loaded, chat_template=False)
    assert list(scores) == LOCAL and "lost their beginning" in notes[0]
    quiz = scores["local_quiz"]
    assert quiz["metric"] == "acc" and quiz["n"] == 24 and set(quiz["metrics"]) == {"acc", "acc_norm"}
    assert quiz["chance"] == pytest.approx(sum(1 / len(item["choices"]) for item in QUIZ) / 24)
    assert quiz["standard_error"] == pytest.approx(math.sqrt(quiz["score"] * (1 - quiz["score"]) / 23))
    texts = scores["local_texts"]
    raw = RunLM(run).loglikelihood_rolling(asked(*((item["text"],) for item in TEXTS)))
    size = sum(len(item["text"].encode()) for item in TEXTS)
    assert texts["metric"] == "bits_per_byte" and texts["score"] == pytest.approx(-sum(raw) / size / math.log(2))
    assert texts["higher_is_better"] is False and "chance" not in texts and texts["standard_error"] > 0
    assert "chance" not in scores["local_continued"] and scores["local_cloze"]["metric"] == "perplexity"
    first = scores["local_quiz"]["examples"][0]
    assert (
        first["question"] == QUIZ[0]["question"]
        and first["answer"] in QUIZ[0]["choices"]
        and first["wanted"] == QUIZ[0]["choices"][0]
    )


def test_a_perplexity_beyond_all_numbers_is_left_out(run, tmp_path):
    """Chinese has no spaces: a text is one word, and e to its nats is more than a float holds."""
    folder = write_tasks(tmp_path)
    (folder / "texts.jsonl").write_text(
        json.dumps({"text": "这是一个很长的没有空格的句子" * 12}) + "\n", encoding="utf-8"
    )
    scores, _ = harness.run_harness(run, harness.load_tasks(["local_texts"], include_path=folder))
    assert list(scores["local_texts"]["metrics"]) == ["bits_per_byte"]
    json.dumps(scores, allow_nan=False)


def test_a_question_that_lacks_what_the_template_names_ends_in_a_sentence(run, tmp_path):
    folder = write_tasks(tmp_path)
    lines = [json.dumps({"start": "a", "wanted": "b", "more": more}) + "\n" for more in ({"x": {"y": "c"}}, None)]
    (folder / "continued.jsonl").write_text("".join(lines))
    path = folder / "continued.yaml"
    path.write_text(path.read_text().replace("doc_to_text: start", "doc_to_text: '{{ start ~ more.x.y }}'"))
    loaded = harness.load_tasks(["local_continued"], include_path=folder)
    with pytest.raises(ValueError, match="template of local_continued fails on a question.*mend its YAML"):
        harness.run_harness(run, loaded)


def test_the_error_of_a_rate_is_that_of_resampled_texts():
    rng = random.Random(0)
    pairs = [(-size * rng.uniform(0.6, 1.4), size) for size in (rng.randrange(20, 400) for _ in range(300))]
    rates = []
    for _ in range(2000):
        drawn = rng.choices(pairs, k=len(pairs))
        rates.append(-sum(a for a, _ in drawn) / sum(b for _, b in drawn) / math.log(2))
    mean = sum(rates) / len(rates)
    spread = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / len(rates))
    assert harness_scores.error_of_rate(pairs)["standard_error"] == pytest.approx(spread, rel=0.07)


def test_few_shot_examples_are_shown_and_are_training_ones(run, tmp_path):
    loaded = harness.load_tasks(["local_quiz"], include_path=write_tasks(tmp_path), fewshot=3)
    raw = harness.evaluate(run, loaded, limit=4, chat_template=False)
    for sample in raw["samples"]["local_quiz"]:
        shown = sample["arguments"][0][0].split("\n\n")
        assert len(shown) == 4 and shown[3] == sample["doc"]["question"]
        solved = {f"{item['question']} {item['choices'][item['label']]}" for item in QUIZ[:6]}
        assert set(shown[:3]) <= solved
    scores, _ = harness.run_harness(run, loaded, limit=4)
    assert scores["local_quiz"]["fewshot"] == 3


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict:
    return harness.load_tasks(list(harness_tasks.NAMES)).tasks["tasks"]


def test_local_tasks_do_not_ask_for_the_network(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the Hub's name was looked up, which takes seconds where there is no network")

    monkeypatch.setattr(harness.socket, "getaddrinfo", refuse)
    loaded = harness.load_tasks(LOCAL, include_path=write_tasks(tmp_path))
    assert list(loaded.tasks["tasks"]) == LOCAL


@pytest.mark.slow
def test_our_tasks_ask_and_judge_as_eval_tasks_does(own):
    """The same questions in the same order, and of right, wrong and mangled answers the same scores."""
    rng = random.Random(3)
    for name, task in tasks.tasks().items():
        theirs = own[f"minimoe_{name}"]
        docs = list(theirs.eval_docs)
        assert [doc["question"] for doc in docs] == [item.messages[-1]["content"] for item in task.items]
        stated = theirs.config.metadata
        assert stated["chance"] == pytest.approx(task.chance, abs=1e-6) and stated["trivial"] == pytest.approx(
            task.trivial[1], abs=1e-6
        )
        if name == "continue":
            assert [doc["choices"][doc["label"]] for doc in docs] == [item.answer for item in task.items]
            continue
        for item, doc in list(zip(task.items, docs))[:60]:
            other = rng.choice(task.items).answer
            bent = (f" {item.answer.upper()} ", f"{item.answer}!", item.answer[:-1], item.answer.replace(" ", ""))
            for answer in (item.answer, *bent, other, f"{item.answer} {other}", "", "!"):
                assert judged(theirs, doc, answer) == pytest.approx(task.score(answer, item.answer)), (
                    name,
                    answer,
                    item.answer,
                )


def judged(task, doc: dict, answer: str) -> float:
    instance = Instance(
        request_type="generate_until", doc=doc, arguments=("", {}), idx=0, metadata=(task.task_name, 0, 1)
    )
    instance.resps = [answer]
    task._instances = [instance]
    task.apply_filters()
    (score,) = task.process_results(doc, [next(iter(instance.filtered_resps.values()))]).values()
    return float(score)


@pytest.mark.slow
def test_our_tasks_show_training_questions_with_their_whole_answers(own):
    for name, task in own.items():
        if name == "minimoe_continue":
            assert not task.has_training_docs() and task.config.num_fewshot == 0
            continue
        task.set_fewshot_seed(1)
        text = task.fewshot_context(task.eval_docs[0], num_fewshot=2)
        shown, held_out = text.split("\n\n"), {doc["question"] for doc in task.eval_docs}
        assert len(shown) == 3 and shown[2] == task.eval_docs[0]["question"]
        assert not any(example.startswith(question) for example in shown[:2] for question in held_out), name
        answers = {doc["question"]: doc["answer"] for doc in task.dataset["train"]}
        assert all(any(example == f"{q} {a}" for q, a in answers.items()) for example in shown[:2]), (name, shown)


@pytest.mark.slow
def test_the_longest_right_answer_fits(own, small_tokenizer):
    for name, task in own.items():
        if name != "minimoe_continue":
            longest = max(len(small_tokenizer.encode(doc["answer"])) for doc in task.eval_docs if name in ("minimoe_sums", "minimoe_backwards")
                          or len(doc["answer"]) < 60)  # fmt: skip
            assert task.config.generation_kwargs["max_gen_toks"] >= longest, name


@pytest.mark.slow
def test_a_folder_of_tasks_is_written_twice_but_not_over_other_files(tmp_path):
    first = harness_tasks.write_tasks(tmp_path / "out")
    assert first == harness_tasks.write_tasks(tmp_path / "out") and len(first) == 7
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.tex"):
        harness_tasks.write_tasks(tmp_path / "out")


@pytest.mark.slow
def test_our_own_folder_passes_the_guard_and_no_changed_one(run, tmp_path):
    folder = tmp_path / "own"
    harness_tasks.write_tasks(folder, cache=tmp_path / "cache")
    harness.load_tasks(["minimoe_modern"], include_path=folder)
    code = folder / "minimoe_words.py"
    code.write_text(code.read_text() + f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="function.*names code"):
        harness.load_tasks(["minimoe_modern"], include_path=folder)
    assert not (tmp_path / "ran").exists()


# ---- strangers' folders


GOOD = "task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: FOLDER/x.jsonl}}\ntest_split: test\ndoc_to_target: a\n"
MARK = "open('FOLDER/ran', 'w')"
HOSTILE = {
    "function": (GOOD + "doc_to_text: !function evil.text\n", "names code"),
    "function in an included file": (GOOD + "include: rest\n", "names code"),
    "included from elsewhere": (GOOD + "include: ../outside.yaml\n", "lies outside"),
    "included from lm_eval": (GOOD + "include: /usr/lib/x.yaml\n", "lies outside"),
    "python tag": (GOOD + "doc_to_text: !!python/object/apply:os.system ['touch FOLDER/ran']\n", "names code"),
    "python class": (GOOD + "class: !!python/name:evil.Task\n", "names code"),
    "metric of the Hub": (
        GOOD + "doc_to_text: q\nmetric_list: [{metric: evil, aggregation: mean}]\n",
        "'evil' is not allowed",
    ),
    "metric by evaluate": (GOOD + "doc_to_text: q\nmetric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate"),
    "pickled table": (GOOD.replace("json\n", "pandas\n") + "doc_to_text: q\n", "'pandas' is not allowed"),
    "data folder": (GOOD.replace("json\n", "./evil\n") + "doc_to_text: q\n", "'./evil' is not allowed"),
    "unsafe code": (GOOD + "doc_to_text: q\nunsafe_code: false\nmetadata: {unsafe_code: true}\n", "unsafe_code"),
    "prompt file": (GOOD + "use_prompt: 'evil.yaml:x'\n", "use_prompt"),
    "metric by a merge key": (
        GOOD + "metadata: {x: &m {metric: evil}}\ndoc_to_text: q\nmetric_list: [{<<: *m}]\n",
        "'evil' is not allowed",
    ),
    "another file system": (GOOD.replace("FOLDER/", "reference://") + "doc_to_text: q\n", "data_files: 'reference://"),
    "chained file systems": (GOOD.replace("FOLDER/", "filecache::/") + "doc_to_text: q\n", "data_files: 'filecache::"),
    "options of file systems": (
        GOOD.replace("kwargs: {", "kwargs: {storage_options: {file: {fo: FOLDER/x.jsonl}}, ") + "doc_to_text: q\n",
        "'storage_options' is not allowed",
    ),
    "options by a merge key": (
        GOOD.replace("kwargs: {", "kwargs: {<<: &o {storage_options: {}}, ") + "doc_to_text: q\n",
        "'<<' is not allowed",
    ),
    "deep": ("a: " + "[" * 1100, "no readable YAML"),
    "template": (
        GOOD + "doc_to_text: \"{{ cycler.__init__.__globals__.os.popen('touch FOLDER/ran').read() }}\"\n",
        "unsafe",
    ),
    "template over data": (GOOD + 'doc_to_text: "{{ q.__class__.__mro__ }}"\n', "unsafe"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_folder_that_would_run_code_is_refused(name, tmp_path):
    text, message = HOSTILE[name]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "x.jsonl").write_text('{"q": "1", "a": "2"}\n')
    (folder / "evil.py").write_text(MARK.replace("FOLDER", str(tmp_path)) + "\n")
    (folder / "rest").write_text("doc_to_text: !function evil.text\n")
    (folder / "x.yaml").write_text(text.replace("FOLDER/x", f"{folder}/x").replace("FOLDER", str(tmp_path)))
    (tmp_path / "outside.yaml").write_text("doc_to_text: q\n")
    with pytest.raises(ValueError, match=message):
        harness.load_tasks(["x"], include_path=folder)
    assert not (tmp_path / "ran").exists()


def test_a_value_that_aliases_repeat_a_billion_times_is_read_once(tmp_path, monkeypatch):
    lines = ["a: &a [x]", *(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]" for i in range(20))]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    read: list[str] = []
    monkeypatch.setattr(harness_guard, "_check_entry", lambda key, *_: read.append(key))
    harness_guard.check_folder(tmp_path, {"acc"}, {})
    assert read == [chr(97 + i) for i in range(21)]


def test_the_guard_lets_honest_folders_through(tmp_path):
    folder = write_tasks(tmp_path)
    (folder / "rest").write_text("doc_to_text: question\n")
    (folder / "with.yaml").write_text(
        "include: rest\ntask: w\ndataset_path: allenai/ai2_arc\nmetric_list: [{metric: acc}]\n"
    )
    harness_guard.check_folder(
        folder, {"acc", "acc_norm", "exact_match", "word_perplexity", "bits_per_byte", "perplexity"}, {}
    )
    with pytest.raises(ValueError, match="is no folder"):
        harness_guard.check_folder(tmp_path / "nothing", set(), {})


# ---- the command


def test_the_command_asks_both_kinds_and_keeps_the_shape(run, tmp_path, monkeypatch, capsys):
    folder = write_tasks(tmp_path / "tasks")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run.run_dir), "--tasks", "local_quiz,sums,local_texts", "--limit", "3",
                                      "--include-path", str(folder), "--precision", "float32", "--chat-template", "no"])  # fmt: skip
    assert evaluate.main() == 0
    result = json.loads((run.run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert set(result["tasks"]) == {"sums", "local_quiz", "local_texts"}
    for task in result["tasks"].values():
        assert {"score", "n", "metric"} <= set(task) and task["n"] == 3
    printed = capsys.readouterr().out
    assert "local_quiz" in printed and "bits_per_byte" in printed and "±" in printed


def test_choices_of_tasks():
    assert evaluate.choose_tasks("sums, arc_easy,minimoe_sums,sums", is_chat=False) == (
        ["sums"],
        ["arc_easy", "minimoe_sums"],
    )
    with pytest.raises(ValueError, match="'sumz' is no task; did you mean 'sums'"):
        evaluate.choose_tasks("sumz", is_chat=True)
    assert evaluate.choose_tasks("xsum", is_chat=True) == ([], ["xsum"])
    assert evaluate.choose_tasks("books", is_chat=True, own_folder=True) == ([], ["books"])


# ---- beside lm_eval itself


@pytest.mark.slow
def test_a_name_that_is_no_task_and_one_of_the_hub_end_in_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match="'arc_eazy' is no task of ours.*did you mean 'arc_easy'"):
        harness.load_tasks(["arc_eazy"])
    monkeypatch.setattr(harness.socket, "getaddrinfo", lambda *args: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match="arc_easy.*allenai/ai2_arc is not on this machine.*minimoe_sums"):
        harness.load_tasks(["arc_easy"])
    with pytest.raises(ValueError, match="humaneval runs code that the model writes"):
        harness.load_tasks(["humaneval"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_numbers_are_those_of_lm_eval_on_the_export(trained, kind, tmp_path):
    """Every answer, every log-likelihood to 1e-4, every score: with few-shot examples for the text run, in chat form for the other."""
    from scripts.export_hf import export

    run = open_run(getattr(trained, kind), device="cpu", precision="float32")
    folder, exported = write_tasks(tmp_path / "tasks"), export(run, tmp_path / "export")
    harness_tasks.write_tasks(tmp_path / "own", cache=tmp_path / "cache")
    chosen, shots, form = LOCAL, 2, []
    if kind == "chat":
        chosen, shots, form = (
            [*LOCAL, "minimoe_sums", "minimoe_continue", "minimoe_modern"],
            1,
            ["--apply_chat_template"],
        )
        harness_tasks.write_tasks(tmp_path / "own", cache=tmp_path / "cache")
        for path in (
            tmp_path / "own"
        ).iterdir():  # the YAML beside the others, since lm_eval takes one folder; the data stay
            if path.suffix in (".yaml", ".py"):
                path.rename(folder / path.name)
    theirs = lm_eval_on(exported, chosen, folder, tmp_path / "out", ["--num_fewshot", str(shots), *form])
    ours = harness.evaluate(run, harness.load_tasks(chosen, include_path=folder, fewshot=shots), limit=16)
    for name in chosen:
        assert len(ours["samples"][name]) == len(theirs["samples"][name]) > 0
        for a, b in zip(ours["samples"][name], theirs["samples"][name]):
            assert [str(x) for args in a["arguments"] for x in args[:1]] == b["contexts"], f"{name}: other questions"
            same_answers(name, a["resps"], b["resps"])
        for key, value in theirs["results"][name].items():
            if isinstance(value, float) and "_stderr" not in key:
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, key)


def same_answers(name: str, ours: list, theirs: list) -> None:
    for a, b in zip(ours, theirs, strict=True):
        (a,), (b,) = a, b  # one answer a request
        if isinstance(a, str):
            assert a == b, f"{name}: another answer"
        elif isinstance(a, float):
            assert close(a, b), name
        else:
            assert close(a[0], b[0]) and str(a[1]) == str(b[1]), name


def close(ours: float, theirs: str | float) -> bool:
    """1e-4 nats; sums over hundreds of tokens, which they add in float32, to a millionth."""
    return math.isclose(ours, float(theirs), abs_tol=1e-4, rel_tol=1e-6)


def lm_eval_on(exported: Path, names: list[str], include: Path, out: Path, more: list[str]) -> dict:
    """Results and samples of the real command on the real export, without a network."""
    command = [
        Path(sys.executable).with_name("lm_eval"), "run", "--model", "hf", "--model_args", f"pretrained={exported},dtype=float32",
        "--tasks", ",".join(names), "--include_path", include, "--device", "cpu", "--batch_size", "5", "--limit", "16",
        "--output_path", out, "--log_samples", *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(out.rglob("results_*.json")).read_text(encoding="utf-8"))
    samples = {}
    for name in names:
        lines = next(out.rglob(f"samples_{name}_*.jsonl")).read_text(encoding="utf-8").splitlines()
        rows = sorted(map(json.loads, lines), key=lambda row: row["doc_id"])
        for row in rows:
            row["contexts"] = [str(args["arg_0"]) for args in row["arguments"].values()]
        samples[name] = rows
    return {"results": results["results"], "samples": samples}
