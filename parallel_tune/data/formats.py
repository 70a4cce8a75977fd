"""The forms a dataset's rows may have, told apart by their columns, and read into conversations or plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from strategies.errors import ConfigError

Kind = Literal["alpaca", "messages", "sharegpt", "prompt/completion", "text"]
Turn = dict[str, Any]

ACCEPTED = """accepted columns, first match wins:
  messages (or conversations): a list of {role, content}
  conversations: a list of {from: human | gpt | system, value}
  prompt, completion: two texts, or two lists of {role, content}
  instruction, output, and input if wanted: alpaca
  text: plain text"""

CHAT_COLUMNS = ("messages", "conversations", "conversation")

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
}


@dataclass(frozen=True)
class RowFormat:
    """A form of rows.

    Attributes:
        kind: its name.
        columns: the columns that every row must have.
        optional: columns that a row may have.
    """

    kind: Kind
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlainText:
    """A text to be continued, and its continuation, which is what is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Turns of {role, content}, for a chat template.

    Attributes:
        first_answer: the first turn that may be an answer; assistant turns before it belong to the prompt.
        plain: the same for a tokenizer without a chat template, where the form has a plain wording of its own.
    """

    turns: list[Turn]
    first_answer: int = 0
    plain: PlainText | None = None


def detect_format(columns: Iterable[str], first_row: Mapping[str, Any]) -> RowFormat:
    """The form of rows with these columns; columns that no form knows are passed over.

    Raises:
        ConfigError: no form matches; it lists the columns seen and the accepted ones.
    """
    names = list(columns)
    for column in CHAT_COLUMNS:
        turns = first_row.get(column)
        if column in names and (turns is None or isinstance(turns, list)):
            opening = turns[0] if turns else {}
            is_sharegpt = isinstance(opening, Mapping) and opening.get("from") is not None
            return RowFormat("sharegpt" if is_sharegpt else "messages", (column,))
    if {"prompt", "completion"} <= set(names):
        return RowFormat("prompt/completion", ("prompt", "completion"))
    if {"instruction", "output"} <= set(names):
        return RowFormat("alpaca", ("instruction", "output"), ("input",))
    if "text" in names:
        return RowFormat("text", ("text",))
    seen = ", ".join(map(str, names)) or "none"
    for column in CHAT_COLUMNS:
        if column in names:
            seen += f" ({column} is of type {type(first_row[column]).__name__}, not a list)"
    raise ConfigError(f"the dataset's columns are not understood: {seen}", ACCEPTED)


def read_row(row: Mapping[str, Any], row_format: RowFormat, number: int) -> Conversation | PlainText | None:
    """One row as a conversation or plain text; None for a row without text, or without an answer where one belongs.

    Args:
        number: the row's number from 1, for messages.

    Raises:
        ConfigError: a column is missing, a field has the wrong type, a role is unknown.
    """
    missing = [column for column in row_format.columns if column not in row]
    if missing:
        raise ConfigError(
            f"row {number} has no {missing[0]!r} (it has {', '.join(map(str, row)) or 'no columns'}), "
            f"and the rows before it are {row_format.kind}",
            "give all rows one form",
        )
    if row_format.kind in ("messages", "sharegpt"):
        turns = _turns(row[row_format.columns[0]], row_format.columns[0], number)
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        # without any assistant turn a row can still be learned whole; with none but blank ones it teaches silence
        return Conversation(turns) if _any_text(answers or [turn["content"] for turn in turns]) else None
    if row_format.kind == "text":
        text = _text(row["text"], "text", number)
        return PlainText("", text) if text.strip() else None
    if row_format.kind == "alpaca":
        instruction, given, answer = (_text(row.get(c), c, number) for c in ("instruction", "input", "output"))
        if not answer.strip() or not (instruction.strip() or given.strip()):
            return None
        question = "\n\n".join(part for part in (instruction, given) if part.strip())
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Conversation(turns, plain=PlainText(alpaca_prompt(instruction, given), answer))
    if row.get("label") is False:
        raise ConfigError(
            f"row {number}: 'label' is False, which marks a completion that is not to be given (KTO's form), and every "
            "completion is trained on",
            "leave such rows out; TRL's KTO script, run by `parallel-tune launch`, learns from both kinds",
        )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before, after = _turns(prompt, "prompt", number), _turns(completion, "completion", number)
        found = _any_text(turn["content"] for turn in after)
        return Conversation(before + after, first_answer=len(before)) if found else None
    completion = _text(completion, "completion", number)
    return PlainText(_text(prompt, "prompt", number), completion) if completion.strip() else None


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """The prompt around an alpaca row for a tokenizer without a chat template; the answer follows, then EOS."""
    if given.strip():
        opening = "You are given a task, and material to work on. Write an answer that does what the task asks."
        return f"{opening}\n\n### Task:\n{instruction}\n\n### Material:\n{given}\n\n### Answer:\n"
    return f"You are given a task. Write an answer that does what it asks.\n\n### Task:\n{instruction}\n\n### Answer:\n"


def _any_text(texts: Iterable[str]) -> bool:
    return any(text.strip() for text in texts)


def _text(value: Any, column: str, number: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong_type(value, column, number, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"row {number}: {column!r} holds {value[error.start]!r}, half of a character, after "
            f"{value[max(0, error.start - 20) : error.start]!r}",
            "correct that row",
        ) from error
    return value


def _wrong_type(value: Any, column: str, number: int, wanted: str) -> ConfigError:
    return ConfigError(
        f"row {number}: {column!r} is {type(value).__name__} {str(value)[:40]!r}, not {wanted}", "correct that row"
    )


def _turns(value: Any, column: str, number: int) -> list[Turn]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong_type(value, column, number, "a list of turns")
    return [_turn(turn, column, number) for turn in value]


def _turn(turn: Any, column: str, number: int) -> Turn:
    if not isinstance(turn, Mapping):
        raise _wrong_type(turn, column, number, "a turn of {role, content}")
    role = _either(turn, "role", "from")
    if not isinstance(role, str) or role not in _ROLES:
        raise ConfigError(f"row {number}: {column!r} has a turn of role {role!r}", f"roles are {', '.join(_ROLES)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ConfigError(
            f"row {number}: {column!r} calls tools, which cannot be trained on yet", "leave such rows out"
        )
    if _ROLES[role] == "assistant" and turn.get("weight") == 0:
        raise ConfigError(
            f"row {number}: {column!r} has a turn of weight 0, and all answers of a row are trained on",
            "leave such rows out, or the weights",
        )
    if not {"content", "value"} & turn.keys():
        raise ConfigError(
            f"row {number}: {column!r} has a turn without content (it has {', '.join(map(str, turn))})",
            "name a turn's text content, or value beside from",
        )
    content = _either(turn, "content", "value")
    if isinstance(content, list):
        content = "".join(_part(part, column, number) for part in content)
    # other keys (name, reasoning_content, ...) are for the chat template; Arrow fills absent ones with None
    extra = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
    return {"role": _ROLES[role], "content": _text(content, column, number), **extra}


def _either(turn: Mapping[str, Any], name: str, sharegpt: str) -> Any:
    """A turn's role or content under the name that is filled: Arrow gives all turns all columns."""
    value = turn.get(name)
    return turn.get(sharegpt) if value is None else value


def _part(part: Any, column: str, number: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return _text(part.get("text"), column, number)
    raise ConfigError(
        f"row {number}: {column!r} holds {str(part)[:40]!r}, which is not text", "only text is trained on"
    )
