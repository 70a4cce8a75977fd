"""The benchmark of imports measures one way in a fresh process, and says what the other spares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def benchmark(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("imports")


def test_an_import_without_collections_leaves_nothing_to_go_through(benchmark: Any) -> None:
    row = benchmark.one_import("transformers", "off")
    assert row["import_seconds"] > 0 and row["resident_peak_bytes"] > 100 << 20
    assert row["collection_seconds_after"] < row["import_seconds"] / 20


def test_figures_are_medians_of_both_ways(benchmark: Any) -> None:
    def rows(collections: str, *seconds: float) -> list[dict[str, Any]]:
        more = {"collection_seconds_after": 0.1, "resident_peak_bytes": 7}
        return [{"engine": "unsloth", "collections": collections, "import_seconds": s, **more} for s in seconds]

    figures = benchmark.conclude(rows("on", 8.0, 10.0, 9.0) + rows("off", 6.0, 7.5, 6.75))
    assert figures["unsloth_on"]["import_seconds"] == 9.0
    assert figures["unsloth_off"]["fastest_and_slowest_seconds"] == [6.0, 7.5]
    assert figures["unsloth_spared"] == 0.25
