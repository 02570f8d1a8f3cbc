"""Bounds of a config's values, kept as metadata of its dataclass fields: {"min": 1, "max": 8}, {"min": 0.0, "exclusive": True} for
more than the minimum, {"choices": ("silu", "gelu")}. ModelConfig and the loader of YAML files check with the same words."""

from __future__ import annotations

from collections.abc import Mapping


def out_of_bounds(value: object, bounds: Mapping) -> str | None:
    """What `value` is not, to be said after it, such as "must be at least 1"; None where nothing is wrong."""
    if "choices" in bounds and value not in bounds["choices"]:
        return f"is none of {', '.join(bounds['choices'])}"
    low, high, exclusive = bounds.get("min"), bounds.get("max"), bounds.get("exclusive", False)
    if low is not None and (value <= low if exclusive else value < low):
        return f"must be {'more than' if exclusive else 'at least'} {_plain(low)}"
    if high is not None and value > high:
        return f"must be at most {_plain(high)}"
    return None


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
