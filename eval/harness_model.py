"""A run as lm-evaluation-harness sees a model: what to score, what to continue.

    results = lm_eval.evaluator.evaluate(RunLM(run), tasks)

Made to give the numbers that `lm_eval --model hf` gives on the export of the same run (tests/eval/test_harness.py): the text
is cut into tokens in one piece, names of special tokens in it become those tokens, no BOS is put before a context unless
`add_bos`, an empty context and a rolling text begin with BOS, and what is too long loses its left end.
Imports lm_eval, which is optional: only eval/harness.py imports this file, after it has asked for the package.
"""

from __future__ import annotations

import collections
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from model.batching import Batch, Row, Sampling

if typing.TYPE_CHECKING:
    from train.checkpoint import Run

LOGITS_AT_ONCE = 2**26  # numbers, a quarter of a GiB in float32: rows of a forward pass * tokens * vocabulary
NEW_TOKENS = 256  # where a task does not say, as lm_eval's own model has it
SAMPLING = ("top_k", "top_p", "repetition_penalty")  # of a task's options those that model.batching.Sampling has

Scored = tuple[float, bool]  # nats below zero, whether greedy decoding would have said the same


class RunLM(TemplateLM):
    """`run` behind lm_eval's interface; `notes()` says what a reader of the scores must know."""

    def __init__(self, run: Run, *, batch_size: int | None = None, add_bos: bool = False) -> None:
        import tokenizers

        super().__init__()
        self.run, self.config = run, run.model.config
        self.rows = batch_size or run.config.eval.batch_size
        self.add_bos = add_bos
        self._notes: set[str] = set()
        self.asked = self.cut = 0  # requests so far; those that lost their beginning
        self.bos, self.eos = (run.tokenizer.decode([i], skip_special_tokens=False) for i in self._border_ids())
        # Ours keeps special tokens in a text as text; lm_eval, like every tool that renders a template first, must not.
        self.tokens = tokenizers.Tokenizer.from_str(run.tokenizer.json_bytes.decode("utf-8"))
        self.tokens.no_truncation()
        self.tokens.no_padding()
        # <|im_end|> ends an answer of a chat model, as the export's generation_config.json says.
        self.stop_ids = {run.tokenizer.eos_id} | ({run.tokenizer.im_end_id} if self.is_chat else set())

    def notes(self) -> list[str]:
        """What happened to the questions that a score does not tell, in sentences."""
        cut = f"{self.cut:,} of {self.asked:,} texts were longer than the context of {self.max_length} tokens and lost their beginning"
        return sorted(self._notes) + [cut] * bool(self.cut)

    @property
    def is_chat(self) -> bool:
        return self.run.config.data.format == "chat"

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.run.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"minimoe-{self.run.tokenizer.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text with its special tokens; BOS before it where that was asked for and is not there yet."""
        ids = self.tokens.encode(string, add_special_tokens=False).ids
        wanted = self.add_bos if add_special_tokens is None else add_special_tokens and self.add_bos
        return [self.prefix_token_id, *ids] if wanted and not string.startswith(self.bos) else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """data/chat.py's CHAT_TEMPLATE, as text; without the generation prompt the last turn stays open."""
        turns = [f"<|im_start|>{turn['role']}\n{turn['content'].strip()}" for turn in chat_history]
        closed = [f"{turn}<|im_end|>\n" for turn in (turns if add_generation_prompt else turns[:-1])]
        return self.bos + "".join(closed) + ("<|im_start|>assistant\n" if add_generation_prompt else turns[-1])

    # ---- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        """(nats below zero, would greedy decoding say it?) of each continuation; the base class cuts the texts into tokens."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[Scored]:
        """Of each (_, context, continuation): requests that differ in their last token alone share one row."""
        wanted: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)  # what the model reads -> requests
        for i, (_, context, continuation) in enumerate(requests):
            self.cut += len(context) + len(continuation) > self.max_length + 1
            if not continuation:
                continue
            wanted[tuple((context + continuation)[-(self.max_length + 1) :][:-1])].append(i)
        self.asked += len(requests)
        scores: list[Scored] = [(0.0, True)] * len(requests)  # an empty answer is certain
        with self._progress(len(wanted), "scoring") as bar:
            for rows in self._batches(sorted(wanted, key=lambda row: (-len(row), row))):
                for row, log_p in zip(rows, self._log_probabilities(rows)):
                    for i in wanted[row]:
                        answer = torch.tensor(requests[i][2][-len(row) :], device=log_p.device)
                        each = log_p[len(row) - len(answer) : len(row)]  # (tokens of the answer, V)
                        said = each.gather(1, answer.unsqueeze(1)).double().sum().item()
                        scores[i] = said, bool((each.argmax(-1) == answer).all())
                bar.update(len(rows))
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats below zero of whole texts, BOS before them, in windows that each read as much as fits."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += nats
        return totals

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """`rows`, the longest first, in batches whose logits fit."""
        start = 0
        while start < len(rows):
            n = max(1, min(self.rows, LOGITS_AT_ONCE // (max(len(rows[start]), 1) * self.config.vocab_size)))
            yield rows[start : start + n]
            start += n

    def _log_probabilities(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """(B, T, V) float32, of rows padded on their right, which no earlier token sees."""
        T = max(map(len, rows))
        ids = torch.full((len(rows), T), self.run.tokenizer.pad_id)
        real = torch.zeros(len(rows), T, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            real[i, : len(row)] = True
        ids, real = ids.to(self.run.device), real.to(self.run.device)
        with torch.inference_mode(), self.run.autocast():
            logits = self.run.model(ids, attention_mask=None if real.all() else real).logits
        return logits.float().log_softmax(-1)

    # ---- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to the first stop; rows leave the batch as they end."""
        waiting = []
        for i, request in enumerate(requests):
            context, options = request.args
            sampling, until = self._sampling(dict(options), request.task_name or "a task")
            prompt, room = self.tok_encode(context), self.max_length - sampling.max_new_tokens
            self.cut += len(prompt) > room
            waiting.append((prompt[-room:] or [self.prefix_token_id], replace(sampling, seed=i), until, i))
        self.asked += len(requests)
        waiting.sort(key=lambda item: len(item[0]))  # the longest is taken first, from the end
        answers = [""] * len(requests)
        with self._progress(len(requests), "answering") as bar, self.run.autocast():
            batch, said = Batch(self.run.model), {}
            while waiting or batch.rows:
                events = []
                while waiting and len(batch.rows) < self.rows:
                    prompt, sampling, until, i = waiting.pop()
                    row = Row(prompt, sampling)
                    said[row] = (i, until, [])
                    events += batch.join(row)
                for event in [*events, *batch.step()]:
                    if event.row not in said:
                        continue  # it was stopped by an earlier event of these
                    i, until, ids = said[event.row]
                    if event.error:
                        raise ValueError(event.error)
                    ids += [event.token.id] if event.token else []
                    stopped = event.token is not None and self._ends_with_a_stop(ids, until)
                    if stopped or event.finish:
                        answers[i] = postprocess_generated_text(self.run.tokenizer.decode(ids), until, None)
                        batch.leave(event.row)
                        del said[event.row]
                        bar.update(1)
        return answers

    def _sampling(self, options: dict, task: str) -> tuple[Sampling, list[str]]:
        options = normalize_gen_kwargs(options, NEW_TOKENS)
        until = [stop for stop in handle_stop_sequences(options.pop("until", None), eos=self.eos) if stop]
        new_tokens, sample = options.pop("max_gen_toks"), options.pop("do_sample", False)
        temperature = float(options.pop("temperature", 0.0)) * bool(sample)
        chosen = {key: options.pop(key) for key in SAMPLING if key in options}
        if options:
            key, value = next(iter(options.items()))
            raise ValueError(f"{task}: generation_kwargs.{key}: {value!r} is an option that MiniMoE's generation lacks")
        if new_tokens < 1:
            raise ValueError(f"{task}: generation_kwargs.max_gen_toks: {new_tokens} must be at least 1")
        most = self.max_length // 2
        if new_tokens > self.max_length - 1:  # lm_eval's own model ends here with an assertion
            self._notes.add(
                f"{task} allows answers of {new_tokens} tokens, the model has a context of {self.max_length}: cut at {most}"
            )
            new_tokens = most
        return Sampling(new_tokens, tuple(self.stop_ids), temperature=temperature, **chosen), until

    def _ends_with_a_stop(self, ids: list[int], until: list[str]) -> bool:
        """Whether the newest tokens hold a stop: at most a token a byte, and two for a stop that begins inside one."""
        longest = max((len(stop.encode()) for stop in until), default=0)
        tail = self.run.tokenizer.decode(ids[-longest - 2 :], skip_special_tokens=False)
        return any(stop in tail for stop in until)

    def _border_ids(self) -> tuple[int, int]:
        return self.run.tokenizer.bos_id, self.run.tokenizer.eos_id

    def _progress(self, total: int, what: str) -> tqdm:
        """A bar where a person watches."""
        return tqdm(total=total, desc=what, unit="row", disable=not sys.stderr.isatty(), leave=False)
