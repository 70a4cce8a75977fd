"""The dataset in examples/ keeps the form that the demo and the README rely on."""

import json
from pathlib import Path

from parallel_tune.data import detect_format, load_rows

PATH = Path(__file__).parents[1] / "examples" / "short_answers.jsonl"


def test_the_example_rows_keep_their_form() -> None:
    lines = PATH.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) >= 220
    assert rows == load_rows(str(PATH))
    assert detect_format(rows[0], rows[0]).kind == "alpaca"
    for number, row in enumerate(rows, 1):
        assert list(row) == ["instruction", "input", "output"], number
        assert row["instruction"].strip(), number
        assert all(text == text.strip() for text in row.values()), number
        sentence, _, short = row["output"].partition("\nIn short: ")
        assert sentence.endswith((".", "?")), number
        assert short.endswith((".", "?")), number
        assert "\n" not in sentence + short, number
        assert len(short) < len(sentence), number
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert len({row["output"] for row in rows}) == len(rows)
    assert 0.10 <= sum(bool(row["input"]) for row in rows) / len(rows) <= 0.25
