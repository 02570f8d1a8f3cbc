"""Which experts work on which tokens: load per layer and source, how decided the routers are, each expert's typical tokens.

    with RoutingRecorder(run.model) as recorder:
        held_out_loss(run.model, recorder.watch("bbe", batches), ...)
    recorder.summary(run.tokenizer)

The recorder listens where every router passes once per forward pass (`MoEGate.auxiliary_loss`, which the model calls with the
choice and the padding mask), so that loss and routing come from the same pass. It counts in int64 and float64 of its own: the
gates' float32 counters are exact for one training step, not for millions of held-out tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model import MoEForCausalLM
from model.balance import load_statistics, router_entropy
from model.gate import Routing

TYPICAL_SAMPLE = 500_000  # tokens from whose routing the typical ones are found
TYPICAL_PER_EXPERT = 10
LEAST_TIMES = 10  # a typical token was seen so often at least
PRIOR = 20  # a token is ranked as if seen so many times more, at the expert's usual rate: rare ones need more evidence


class RoutingRecorder:
    """Counts the routing of every real token between `with` and its end. Works on a dense model too: nothing to count."""

    def __init__(self, model: MoEForCausalLM) -> None:
        self.layers = [layer for layer, _ in model.moe_layers()]
        self._gates = [moe.gate for _, moe in model.moe_layers()]
        self.n_experts, self.k = model.config.n_routed_experts, model.config.num_experts_per_tok
        self.counts: dict[str, Tensor] = {}  # source -> (L, E) int64, on the CPU
        self.tokens: dict[str, int] = {}
        self._entropy = torch.zeros(len(self.layers), dtype=torch.float64)  # nats, summed over tokens
        self._pairs: list[list[np.ndarray]] = [[] for _ in self.layers]  # token * E + expert, of the sample
        self._seen: list[np.ndarray] = []  # token ids of the sample
        self._source = ""
        self._batch_ids: Tensor | None = None  # (n,) ids of the batch's real tokens while the sample grows

    def __enter__(self) -> RoutingRecorder:
        for place, gate in enumerate(self._gates):
            gate.auxiliary_loss = self._listener(place, gate)  # an instance's attribute, in front of the class's method
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self._gates:
            del gate.auxiliary_loss

    def watch(self, source: str, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The same batches; what the model does with each is counted for `source`."""
        self.counts.setdefault(source, torch.zeros(len(self.layers), self.n_experts, dtype=torch.int64))
        self.tokens.setdefault(source, 0)
        for batch in batches:
            self._source = source
            mask = batch.get("attention_mask")
            ids = batch["input_ids"].flatten() if mask is None else batch["input_ids"][mask.bool()]
            self.tokens[source] += ids.numel()
            self._batch_ids = None
            if self._gates and sum(map(len, self._seen)) < TYPICAL_SAMPLE:
                self._batch_ids = ids.cpu()
                self._seen.append(self._batch_ids.numpy())
            yield batch

    def summary(self, tokenizer: Tokenizer | None = None) -> dict:
        """What evaluation.json holds under `routing`; {} for a dense model. Lists run over layers, then experts."""
        total = sum(self.tokens.values())
        if not self.layers or total == 0:
            return {}
        counts = torch.stack(list(self.counts.values())).sum(0)
        return {
            "layers": self.layers,
            "experts": self.n_experts,
            "experts_per_token": self.k,
            "tokens": total,
            "tokens_per_expert": counts.tolist(),
            "load": _load(counts),
            **{
                name: values.tolist() for name, values in load_statistics(counts).items()
            },  # max_vio, load_entropy, dead
            "router_entropy": (self._entropy / total).tolist(),
            "by_source": {name: {"tokens": self.tokens[name], "load": _load(by)} for name, by in self.counts.items()},
            **({"typical_tokens": self.typical_tokens(tokenizer)} if tokenizer is not None else {}),
        }

    def typical_tokens(self, tokenizer: Tokenizer) -> list[list[list[dict]]]:
        """[layer][expert] -> tokens that favour the expert most, best first: {"token", "lift", "count"}.

        lift = P(expert is chosen | token) / P(expert is chosen); the order is that of the lift shrunk towards 1 by PRIOR.
        count: how often the token was seen in the sample.
        """
        ids, times = np.unique(np.concatenate(self._seen), return_counts=True)
        found = []
        for pairs in self._pairs:
            codes, chosen = np.unique(np.concatenate(pairs), return_counts=True)
            table = np.zeros((len(ids), self.n_experts))  # times each token went to each expert
            table[np.searchsorted(ids, codes // self.n_experts), codes % self.n_experts] = chosen
            rate = table.sum(0) / times.sum()  # P(expert)
            usual = np.where(rate > 0, rate, 1.0)
            lift = table / times[:, None] / usual
            cautious = (table + PRIOR * rate) / (times[:, None] + PRIOR) / usual
            cautious[times < LEAST_TIMES] = 0.0
            layer = []
            for e in range(self.n_experts):
                best = [
                    t for t in np.argsort(-cautious[:, e], kind="stable")[:TYPICAL_PER_EXPERT] if cautious[t, e] > 1.0
                ]
                layer.append(
                    [
                        {
                            "token": tokenizer.decode([int(ids[t])], skip_special_tokens=False),
                            "lift": round(float(lift[t, e]), 3),
                            "count": int(times[t]),
                        }
                        for t in best
                    ]
                )
            found.append(layer)
        return found

    def _listener(self, place: int, gate: torch.nn.Module):
        def listen(routing: Routing, token_mask: Tensor | None = None) -> Tensor:
            chosen, entropy = routing.topk_idx, router_entropy(routing.scores)  # (B, T, k), (B, T)
            if token_mask is None:
                chosen, entropy = chosen.flatten(0, 1), entropy.flatten()
            else:
                chosen, entropy = chosen[token_mask], entropy[token_mask]  # (n, k), (n,)
            self.counts[self._source][place] += chosen.flatten().bincount(minlength=self.n_experts).cpu()
            self._entropy[place] += entropy.double().sum().cpu()
            if self._batch_ids is not None:
                codes = self._batch_ids.unsqueeze(1) * self.n_experts + chosen.cpu()
                self._pairs[place].append(codes.flatten().numpy())
            return type(gate).auxiliary_loss(gate, routing, token_mask)

        return listen


def _load(counts: Tensor) -> list[list[float]]:
    """Fractions of each layer's assignments: (L, E) int64 -> L lists that sum to 1."""
    return (counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
