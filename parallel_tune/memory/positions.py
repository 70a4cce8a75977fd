"""How many tokens of a row a model was made for, and what a plan says of rows that are longer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Positions:
    """Places that a model tells apart, by its config.json.

    Attributes:
        plain: what it was made for, the config's own scaling aside; 0 if the config does not say.
        reach: how far that scaling carries; None where it follows rows of any length.
        scaling: transformers' name of the scaling; "" for none.
    """

    plain: int = 0
    reach: int | None = 0
    scaling: str = ""


def positions_of(text: Mapping[str, Any]) -> Positions:
    """What a text model's config.json says of them."""
    plain = text.get("max_position_embeddings")
    if type(plain) is not int or plain < 1:
        return Positions()
    found = [(str(each.get("rope_type") or each.get("type") or "default"), each) for each in _scalings(text)]
    scaled = [(name, each) for name, each in found if name != "default"]
    if not scaled:
        return Positions(plain, plain)
    if any(name == "dynamic" for name, _ in scaled):
        return Positions(plain, None, "dynamic")
    # Some count the scaling in max_position_embeddings, some do not: the larger is what may have been meant.
    factors = [each.get("factor") or 1 for _, each in scaled]
    bases = [each.get("original_max_position_embeddings") or plain for _, each in scaled]
    reaches = [
        int(factor * base)
        for factor, base in zip(factors, bases, strict=True)
        if isinstance(factor, int | float) and isinstance(base, int | float)
    ]
    return Positions(plain, max(plain, *reaches, 0), scaled[0][0])


def _scalings(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config's scalings: one, or one for each kind of layer."""
    given = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        return []
    kinds = [each for each in given.values() if isinstance(each, Mapping)]
    return kinds or [given]


def beyond_positions(positions: Positions, engine: str, max_seq_length: int, longest: int | None) -> tuple[str, ...]:
    """What a plan says where rows are longer than the model was made for.

    Args:
        longest: tokens of the longest row, where rows are known.
    """
    if engine == "unsloth" and positions.scaling != "llama3" and 0 < positions.plain < max_seq_length:
        instead = f", in place of its own scaling ({positions.scaling})" if positions.scaling else ""
        return (
            f"--max_seq_length {max_seq_length} is more than the model's {positions.plain} positions: Unsloth "
            f"stretches them {max_seq_length / positions.plain:.3g} times{instead}, for shorter rows too",
        )
    length = max_seq_length if longest is None else min(longest, max_seq_length)
    if not positions.reach or length <= positions.reach:
        return ()
    return (
        f"rows of up to {length} tokens are longer than the {positions.reach} positions that the model was made for: "
        "it learns what comes behind them from this data alone",
    )
