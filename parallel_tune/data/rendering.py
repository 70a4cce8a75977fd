"""Rows to the exact text that is tokenised, with the character spans of the answers in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parallel_tune.data.formats import Conversation, PlainText, Turn
from strategies.errors import ConfigError

Renderer = Callable[[Conversation | PlainText, int], "Rendered"]


@dataclass(frozen=True)
class Rendered:
    """A row's text.

    Attributes:
        answers: spans of characters [start, end) that the model is to write: each answer and the token that ends it.
        templated: the text came from a chat template, which writes its own special tokens.
        append_eos: EOS still has to be added, as a token, and learned.
    """

    text: str
    answers: list[tuple[int, int]]
    templated: bool = False
    append_eos: bool = False


def make_renderer(tokenizer: Any) -> Renderer:
    """A function that renders rows for this tokenizer, by its chat template where it has one."""
    template = _Template(tokenizer) if getattr(tokenizer, "chat_template", None) else None

    def render(row: Conversation | PlainText, number: int) -> Rendered:
        if isinstance(row, Conversation):
            if template is not None:
                return template.render(row, number)
            if row.plain is None:
                return _headed(row, str(tokenizer.eos_token))
            row = row.plain
        text = row.prompt + row.completion
        return Rendered(text, [(len(row.prompt), len(text))], append_eos=True)

    return render


def _headed(row: Conversation, eos: str) -> Rendered:
    """Turns under headings, for a tokenizer without a chat template; each answer ends in EOS."""
    text, answers = "", []
    for number, turn in enumerate(row.turns):
        text += f"### {turn['role'].capitalize()}:\n"
        start = len(text)
        text += turn["content"]
        if turn["role"] == "assistant":
            text += eos
            if number >= row.first_answer:
                answers.append((start, len(text)))
        text += "\n\n" if number + 1 < len(row.turns) else ""
    return Rendered(text, answers)


class _Template:
    """A tokenizer's chat template, and where answers lie in what it writes.

    Most templates carry no generation markers, and rendering a shorter conversation is no prefix of the longer one with
    some (Qwen3 writes an empty thought into the last answer only). So an answer is located by rendering the same
    conversation once more with a stand-in for that answer: what stands before and after it is the frame.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._special = sorted(special, key=lambda token: (-len(token), token))
        self._header = self._answer_header()

    def render(self, row: Conversation, number: int) -> Rendered:
        text = self._apply(row.turns, number)
        answers, last = [], len(row.turns) - 1
        append_eos = False
        for index, turn in enumerate(row.turns):
            if turn["role"] != "assistant" or index < row.first_answer:
                continue
            span = self._locate(row.turns, index, text, number)
            if span is None:
                continue  # the template leaves this turn out
            start, end = span
            ending = self._ending(text, end)
            answers.append((start, end + len(ending)))
            append_eos = index == last and not ending
        if append_eos:
            text = text[: answers[-1][1]]  # EOS comes right after the answer
        return Rendered(text, answers, templated=True, append_eos=append_eos)

    def _apply(self, turns: list[Turn], number: int, **options: Any) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except Exception as error:  # jinja's errors, or a template's own raise_exception
            roles = ", ".join(turn["role"] for turn in turns)
            raise ConfigError(
                f"row {number}: the model's chat template refuses its turns ({roles}): {error}",
                "correct the row, or choose a model whose template takes such turns",
            ) from error
        return text

    def _answer_header(self) -> str:
        """What the template writes to open an answer; empty where that cannot be told apart."""
        question = [{"role": "user", "content": "?"}]
        try:
            asked = self._apply(question, 0)
            opened = self._apply(question, 0, add_generation_prompt=True)
        except ConfigError:
            return ""
        return opened.removeprefix(asked) if opened.startswith(asked) else ""

    def _locate(self, turns: list[Turn], index: int, text: str, number: int) -> tuple[int, int] | None:
        stand_in = "ANSWERSTANDSHERE"
        while stand_in in text:
            stand_in += "X"
        replaced = self._apply([*turns[:index], {**turns[index], "content": stand_in}, *turns[index + 1 :]], number)
        count = replaced.count(stand_in)
        if count == 0:
            return None
        before, _, after = replaced.partition(stand_in)
        start = len(before)
        header = before.rfind(self._header) if self._header else -1
        if header >= 0 and not any(token in before[header + len(self._header) :] for token in self._special):
            start = header + len(self._header)  # what stands between header and answer is the model's to write
        end = len(text) - len(after)
        if count > 1 or end < start or text[:start] != before[:start] or text[end:] != after:
            raise ConfigError(
                f"row {number}: cannot tell where answer {index + 1} lies in the text that the chat template writes",
                "train on whole rows (answers_only off), or choose a model with a simpler chat template",
            )
        return start, end

    def _ending(self, text: str, end: int) -> str:
        """The special token that ends the answer, with the spaces before it (Llama 2 writes one); empty without one."""
        rest = text[end:]
        token = next((token for token in self._special if rest.lstrip(" ").startswith(token)), None)
        return rest[: rest.index(token) + len(token)] if token else ""
