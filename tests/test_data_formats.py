"""The form of a dataset, told from its columns, and the reading of single rows."""

from typing import Any

import pytest

from parallel_tune.data.formats import Conversation, PlainText, alpaca_prompt, detect_format, read_row
from strategies.errors import ConfigError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def read(row: dict[str, Any]) -> Conversation | PlainText | None:
    return read_row(row, detect_format(row, row), 1)


def refusal(row: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(row)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, "alpaca"),
        ({"messages": TURNS}, "messages"),
        ({"messages": TURNS, "prompt": "a"}, "messages"),
        ({"conversations": SHARED, "id": 3}, "sharegpt"),
        ({"conversations": TURNS}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt/completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt/completion"),
        ({"text": "a", "url": "b"}, "text"),
        ({"messages": None}, "messages"),
    ],
)
def test_the_form_is_told_by_the_columns(row: dict[str, Any], kind: str) -> None:
    assert detect_format(list(row), row).kind == kind


def test_unknown_columns_are_listed_with_the_accepted_ones() -> None:
    message = refusal({"question": "a", "solution": "b"})
    assert "question, solution" in message
    for accepted in ("messages", "conversations", "prompt, completion", "instruction, output", "text"):
        assert accepted in message


def test_the_forms_of_one_conversation_read_alike() -> None:
    assert read({"messages": TURNS}) == read({"conversations": SHARED}) == Conversation(TURNS)
    alpaca = read({"instruction": "a", "input": "c", "output": "b"})
    assert isinstance(alpaca, Conversation)
    assert alpaca.turns == [{"role": "user", "content": "a\n\nc"}, TURNS[1]]
    assert alpaca.plain == PlainText(alpaca_prompt("a", "c"), "b")
    asked = read({"prompt": TURNS, "completion": TURNS})
    assert asked == Conversation(TURNS + TURNS, first_answer=2)


def test_parts_of_text_are_joined_and_empty_keys_left_out() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "!"}]
    row = read({"messages": [{"role": "user", "content": parts, "name": None}, {**TURNS[1], "name": "Bo"}]})
    assert row == Conversation([{"role": "user", "content": "a!"}, {**TURNS[1], "name": "Bo"}])


def test_a_turn_is_read_from_the_names_that_are_filled() -> None:
    """Parquet files hold all columns of all turns."""
    filled = [{"role": None, "content": None, **turn} for turn in SHARED]
    assert read({"conversations": filled}) == Conversation(TURNS)
    assert detect_format(["messages"], {"messages": [{**TURNS[0], "from": None}]}).kind == "messages"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "input": "", "output": " \n"},
        {"instruction": "a", "input": None, "output": None},
        {"instruction": "", "input": "", "output": "b"},
        {"messages": []},
        {"messages": None},
        {"messages": [TURNS[0], {"role": "assistant", "content": ""}]},
        {"prompt": "a", "completion": ""},
        {"prompt": TURNS[:1], "completion": []},
        {"text": "  "},
        {"text": None},
    ],
)
def test_rows_without_text_or_answer_are_empty(row: dict[str, Any]) -> None:
    assert read(row) is None


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"instruction": "a", "output": 42}, "row 1: 'output' is int '42'"),
        ({"text": ["a"]}, "row 1: 'text' is list"),
        ({"messages": ["a"]}, "row 1: 'messages' is str 'a'"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "role 'narrator'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "calls tools"),
        ({"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "calls tools"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "weight 0"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "role ['user']"),
        ({"messages": [{"role": "user", "text": "a"}, TURNS[1]]}, "without content (it has role, text)"),
        ({"conversations": [SHARED[0], {"from": "gpt", "text": "b"}]}, "without content (it has from, text)"),
        ({"messages": "[]"}, "messages (messages is of type str, not a list)"),
        ({"prompt": "a", "completion": TURNS[1:]}, "'prompt' is str 'a', not a list"),
        ({"prompt": "a", "completion": "b", "label": False}, "row 1: 'label' is False"),
        ({"text": "so \ud83d"}, "row 1: 'text' holds '\\ud83d', half of a character, after 'so '"),
    ],
)
def test_a_wrong_field_is_named_with_its_row(row: dict[str, Any], seen: str) -> None:
    assert seen in refusal(row)


def test_a_mix_of_forms_names_the_first_row_that_differs() -> None:
    form = detect_format(["text"], {"text": "a"})
    with pytest.raises(ConfigError, match=r"row 4 has no 'text' \(it has messages\), and the rows before it are text"):
        read_row({"messages": TURNS}, form, 4)
