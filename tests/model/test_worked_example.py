"""docs/moe_infer.md: every number that it shows is what the real functions compute."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import ModelConfig, segmented_ffn
from model import moe as moe_module
from model.experts import FEW_ASSIGNMENTS
from model.moe import MoEFeedForward
from model.permutation import rows_of_tokens, sort_by_expert, sorted_weights, sum_by_token

from .routings import Elsewhere

TEXT = (Path(__file__).resolve().parents[2] / "docs/moe_infer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def shown() -> dict[str, list]:
    """The document's `name = [...]` lines."""
    numbers = {}
    for statement in ast.parse("".join(text for language, text in BLOCKS if language == "python")).body:
        assert isinstance(statement, ast.Assign) and statement.targets[0].id not in numbers
        numbers[statement.targets[0].id] = ast.literal_eval(statement.value)
    return numbers


@torch.no_grad()
def layer_of_the_document(numbers: dict[str, list], D: int = 2, backend: str = "auto") -> MoEFeedForward:
    """Its three experts; with a larger D they are surrounded by zeros."""
    moe = MoEFeedForward(
        ModelConfig(
            vocab_size=8, hidden_size=D, head_dim=2, num_attention_heads=1, moe_intermediate_size=D, n_routed_experts=3,
            n_shared_experts=0, num_experts_per_tok=2, gated_ffn=False, hidden_act="relu", expert_backend=backend,
        )
    ).eval()  # fmt: skip
    for name in ("up_proj", "down_proj"):
        moe.experts.get_parameter(name).copy_(F.pad(torch.tensor(numbers[name]), (0, D - 2, 0, D - 2)))
    return moe


def inputs(numbers: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = torch.tensor(numbers["flat_expert_weights"]).view(-1, 1)
    return torch.tensor(numbers["x"], dtype=torch.float32), torch.tensor(numbers["flat_expert_indices"]), weights


def test_every_step_computes_the_numbers_shown():
    numbers = shown()
    moe = layer_of_the_document(numbers)
    x, flat_expert_indices, flat_weights = inputs(numbers)
    permutation = sort_by_expert(flat_expert_indices, 3)
    order, inverse, ends = permutation
    rows, weights = rows_of_tokens(x, order, 2), sorted_weights(flat_weights.view(4, 2), order)
    with torch.no_grad():
        before = [F.linear(row, moe.experts.up_proj[e]) for row, e in zip(rows, flat_expert_indices[order])]
        hidden = moe.experts.activation(torch.stack(before))
        weighted_hidden = moe.experts.activation(torch.stack(before), weights)
        outputs = moe.experts.run_segments(rows, ends, weights)
    computed = {
        "sorted_experts": flat_expert_indices[order],
        "order": order,
        "token_indices": order // 2,
        "ends": ends,
        "rows": rows,
        "weights": weights.squeeze(1),
        "hidden": hidden,
        "weighted_hidden": weighted_hidden,
        "weighted_outputs": outputs,
        "inverse": inverse,
        "y": sum_by_token(outputs, inverse, 2),
    }
    given = {"x", "flat_expert_indices", "flat_expert_weights", "up_proj", "down_proj"}
    assert numbers.keys() == computed.keys() | given, "every number shown is given or checked"
    for name, value in computed.items():
        assert value.tolist() == numbers[name], name


@pytest.mark.parametrize("way", ["loop", "segmented", "grouped_mm", "few", "few, gathered"])
def test_moe_infer_ends_where_the_document_does(monkeypatch, way):
    numbers, D = shown(), 4  # grouped_mm takes multiples of four
    few = way.startswith("few")
    monkeypatch.setattr(moe_module, "FEW_ASSIGNMENTS", FEW_ASSIGNMENTS if few else 0)
    if way == "grouped_mm":
        monkeypatch.setattr(segmented_ffn, "DTYPES", ())
    moe = layer_of_the_document(numbers, D, "loop" if way == "loop" else "grouped")
    calls = []
    for owner, name in (
        (moe.experts, "run_few"),
        (moe.experts, "run_segments"),
        (F, "grouped_mm"),
        (segmented_ffn, "segmented_ffn"),
        (torch, "bmm"),
    ):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, f=function, n=name, **kw: calls.append(n) or f(*args, **kw))
    x, flat_expert_indices, weights = inputs(numbers)
    x = F.pad(x, (0, D - 2))
    if way == "few, gathered":
        x = x.as_subclass(Elsewhere)
    y = moe.moe_infer(x, flat_expert_indices, weights)
    assert (
        calls
        == {
            "loop": ["run_segments"],
            "segmented": ["run_segments", "segmented_ffn"],
            "grouped_mm": ["run_segments", "grouped_mm", "grouped_mm"],
            "few": ["run_few"],
            "few, gathered": ["run_few", "bmm", "bmm"],
        }[way]
    )
    assert y[:, :2].tolist() == numbers["y"] and not y[:, 2:].any()
    assert len(numbers["flat_expert_indices"]) <= FEW_ASSIGNMENTS and f"up to {FEW_ASSIGNMENTS} of them" in TEXT


def test_the_sums_are_written_out_right():
    numbers = shown()
    lines = [line for language, text in BLOCKS if language == "text" for line in text.splitlines()]
    assert len(lines) == 4
    for token, line in enumerate(lines):
        left, right = line.removeprefix(f"token {token}: ").split(" = ")
        terms = [ast.literal_eval(term) for term in left.split(" + ")]
        assert terms == [numbers["weighted_outputs"][numbers["inverse"][a]] for a in (2 * token, 2 * token + 1)]
        assert ast.literal_eval(right) == [sum(row[i] for row in terms) for i in (0, 1)] == numbers["y"][token]


def test_weighing_in_between_is_weighing_the_outputs():
    """What the document says of linear products: down(w h) is w down(h)."""
    numbers = shown()
    moe = layer_of_the_document(numbers)
    x, flat_expert_indices, _ = inputs(numbers)
    order, _, ends = sort_by_expert(flat_expert_indices, 3)
    rows = rows_of_tokens(x, order, 2)
    with torch.no_grad():
        outputs = moe.experts.run_segments(rows, ends, torch.ones(8, 1))
    assert (torch.tensor(numbers["weights"]).unsqueeze(1) * outputs).tolist() == numbers["weighted_outputs"]
