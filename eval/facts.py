"""Numbers and sentences that follow from a run folder's records: its model, compute, speed, balance, scores."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from eval.history import Stage
from eval.page import is_number, percent
from model import ModelConfig
from model.flops import flops_per_token, total_count
from train.config import build

MOST_LAYERS = 10_000  # of a model whose parameters are counted, layer by layer
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "em")  # of lm-evaluation-harness
LAST_ROWS = 10  # of training, whose mean is "the end of training"


def model_config(run: Stage) -> ModelConfig | None:
    """The config's model section; None where it is missing or of another version: a report then does without."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    tree = {key: value for key, value in run.section("model").items() if key in known}
    try:
        model = build(ModelConfig, tree, "model") if tree else None
    except ValueError:
        return None
    return model if model and model.num_hidden_layers <= MOST_LAYERS else None


def flops_of_token(run: Stage) -> int | None:
    """Operations of training on one token; None where the model is not known."""
    model = model_config(run)
    if model is None:
        return None
    return flops_per_token(model, run.section("data").get("context_length") or model.max_position_embeddings)


def describe_model(run: Stage, model: ModelConfig | None) -> str:
    """The model as a phrase: what kind, how many layers and experts."""
    kind = "A chat model" if run.is_chat else "A language model"
    if model is None:
        return kind
    if not model.moe_layers:
        return f"{kind} of {model.num_hidden_layers} dense layers"
    dense = model.num_hidden_layers - len(model.moe_layers)
    layers = f"{model.num_hidden_layers} layers" + (f" ({dense} dense, the others" if dense else "")
    shared = f" beside {model.n_shared_experts} shared" if model.n_shared_experts else ""
    experts = f"with {model.n_routed_experts} experts each, {model.num_experts_per_tok} at work on a token{shared}"
    return f"{kind} of {layers} {experts}" + (")" if dense else "")


def describe_device(run: Stage) -> str:
    """On what it was trained, as words; empty where the run does not say."""
    machine = run.run.get("machine") or {}
    processes, device = machine.get("processes") or 1, machine.get("device") or ""
    return f"{processes} processes on {device}" if device and processes > 1 else str(device)


def parameters(model: ModelConfig | None) -> tuple[int | None, int | None]:
    """(all, those active for a token)."""
    count = total_count(model) if model else None
    return (count.total, count.active) if count else (None, None)


def speed(run: Stage) -> float | None:
    """Tokens a second: the median over logged steps."""
    return _median([row.get("tokens_per_second") for row in run.train])


def memory_gib(run: Stage) -> float | None:
    """The peak that training logged."""
    return max((row["memory_gib"] for row in run.train if is_number(row.get("memory_gib"))), default=None)


def skipped_steps(run: Stage) -> int | None:
    """Bad steps so far, as the newest row counts them."""
    return next((row["skipped_steps"] for row in reversed(run.train) if is_number(row.get("skipped_steps"))), None)


def wanted_steps(run: Stage) -> int | None:
    """Steps that the config asks for; None where it counts epochs."""
    steps = run.section("train").get("steps")
    return steps if isinstance(steps, int) else None


def tasks(run: Stage) -> dict[str, dict]:
    """Tasks that have a score: a share of right answers, or a plain number such as a perplexity."""
    found = run.evaluation.get("tasks") or {}
    return {name: task for name, task in found.items() if is_number(task.get("score"))}


def is_share(task: dict) -> bool:
    """Whether the score is a share, shown in per cent: one that guessing has too, or of a metric from 0 to 1."""
    words = (task.get("metric") or "").split()
    of_shares = is_number(task.get("chance")) or (words[0].rstrip(":,") if words else "") in SHARES
    return of_shares and 0 <= task["score"] <= 1


def score_text(task: dict) -> str:
    """A share in per cent, any other score as a number."""
    return percent(task["score"]) if is_share(task) else f"{task['score']:,.4g}"


def error_text(task: dict) -> str:
    """One standard error, in the unit of `score_text`."""
    error = task.get("standard_error")
    if not is_number(error) or not error:
        return ""
    return f"± {100 * error:.1f}" if is_share(task) else f"± {error:.2g}"


def best_source(stage: Stage) -> tuple[str, float] | None:
    """The source for the headline and its bits per byte: eval.best_source, otherwise the first that has any."""
    measured = {name: f["bits_per_byte"] for name, f in stage.sources().items() if is_number(f.get("bits_per_byte"))}
    wanted = stage.section("eval").get("best_source")
    name = wanted if wanted in measured else next(iter(measured), None)
    return (name, measured[name]) if name else None


@dataclass
class Balance:
    """How the experts of a run are used, over layers."""

    layers: list[int]
    load: np.ndarray  # (L, E), each row sums to 1
    where: str  # on what it was measured, as words

    @property
    def relative(self) -> np.ndarray:
        """Loads as multiples of the fair share."""
        return self.load * self.load.shape[1]

    @property
    def max_vio(self) -> np.ndarray:
        """(L,) how far the busiest expert lies above its fair share."""
        return self.relative.max(1) - 1

    @property
    def dead(self) -> int:
        """Experts that got no token, of all layers."""
        return int((self.load == 0).sum())


def balance(stage: Stage) -> Balance | None:
    """At the end: held-out where evaluated, otherwise the mean of training's last rows."""
    routing = stage.evaluation.get("routing") or {}
    if routing.get("load"):
        return Balance(routing["layers"], np.array(routing["load"], dtype=float), f"on {measured_on(stage)}")
    rows = [row["routing"] for row in stage.train if row.get("routing")]
    rows = [row for row in rows if routing_shape(row) == routing_shape(rows[-1])][-LAST_ROWS:]
    if not rows:
        return None
    return Balance(rows[-1]["layers"], np.mean([row["load"] for row in rows], axis=0), "at the end of training")


def measured_on(stage: Stage) -> str:
    """On what an evaluation of the run was made, as words."""
    return "held-out conversations" if stage.is_chat else "held-out text"


def routing_shape(routing: dict) -> tuple[list, int]:
    """(layers, experts of a layer): rows of another shape cannot be drawn together."""
    return routing["layers"], len(routing["load"][0])


def ceiling(values: list[float]) -> tuple[float | None, float | None]:
    """(top of the picture, largest value) where the first few percent of a curve would flatten the rest, else (None, None)."""
    good = [y for y in values if math.isfinite(y)]
    if len(good) < 4:
        return None, None
    low, high = min(good), float(np.quantile(good, 0.94))
    high += 0.35 * (high - low)
    return (high, max(good)) if max(good) > high + 0.5 * (high - low) else (None, None)


def _median(values: list) -> float | None:
    good = [value for value in values if is_number(value)]
    return float(np.median(good)) if good else None
