"""Rows to token ids and labels: tokenised once, in batches, with exact answer masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from typing import Any

from parallel_tune.data.formats import detect_format, read_row
from parallel_tune.data.rendering import Rendered, make_renderer
from parallel_tune.data.rows import IGNORED, DataReport, EncodedRow, EncodedRows, describe
from strategies.errors import ConfigError

BATCH_ROWS = 1000


def encode_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_seq_length: int, answers_only: bool = False
) -> tuple[EncodedRows, DataReport]:
    """Token ids and labels of rows in any accepted form, in the rows' order.

    With `answers_only` the loss sees each answer and the token that ends it: every assistant turn of a conversation,
    the completion of a prompt, all of a plain text. Otherwise it sees all tokens. The first label is always ignored,
    since nothing predicts the first token, so the labels that are not ignored count the predicted tokens.

    An answer ends in the chat template's own end token, or in EOS where there is none. Rows longer than
    `max_seq_length` tokens are cut on the right. Rows without text or answer, and rows with nothing left to learn, are
    left out. The report counts all of these.

    Raises:
        ConfigError: unknown columns, a row that cannot be read (with its number), or no row left.
    """
    _check_length(max_seq_length, tokenizer)
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise ConfigError("the dataset has no rows", "name another file or split")
    row_format = detect_format(first, first)
    render = make_renderer(tokenizer)
    found = EncodedRows()
    empty = dropped = truncated = 0
    numbered = enumerate(chain([first], iterator), 1)
    while batch := list(islice(numbered, BATCH_ROWS)):
        read = [(number, read_row(row, row_format, number)) for number, row in batch]
        rendered = [render(row, number) for number, row in read if row is not None]
        empty += len(read) - len(rendered)
        for encoded in _encode(rendered, tokenizer, answers_only):
            truncated += len(encoded["input_ids"]) > max_seq_length
            ids, labels = encoded["input_ids"][:max_seq_length], encoded["labels"][:max_seq_length]
            if labels.count(IGNORED) < len(labels):
                found.append({"input_ids": ids, "labels": labels})
            else:
                dropped += 1
    unused = tuple(str(name) for name in first if name not in (*row_format.columns, *row_format.optional))
    report = describe(found, row_format.kind, empty=empty, dropped=dropped, truncated=truncated, unused_columns=unused)
    if not found:
        raise ConfigError(
            f"no row is left to train on: {empty} empty, {dropped} without a learned token in the first "
            f"{max_seq_length} tokens",
            "check the dataset, or raise the maximum sequence length" if dropped else "check the dataset's columns",
        )
    return found, report


def chunk_text(
    text: str, tokenizer: Any, chunk_size: int, stride: int = 0, max_rows: int | None = None
) -> tuple[EncodedRows, DataReport]:
    """A long text as rows of at most `chunk_size` tokens, of which `stride` repeat the end of the row before.

    Repeated tokens are context and not learned again, so every token is predicted once; without a stride the first
    token of each row is not predicted. EOS follows the text's end.
    """
    _check_length(chunk_size, tokenizer)
    if not 0 <= stride < chunk_size - 1:
        raise ConfigError(
            f"a stride of {stride} tokens in chunks of {chunk_size}", "the stride must be smaller, by 2 at least"
        )
    if not text.strip():
        raise ConfigError("the text file holds no text", "name another file")
    whole = next(_encode([Rendered(text, [(0, len(text))], append_eos=True)], tokenizer, answers_only=False))
    ids, rows, start = whole["input_ids"], EncodedRows(), 0
    while True:
        window = ids[start : start + chunk_size]
        known = max(1, stride if start else 0)
        rows.append({"input_ids": window, "labels": [IGNORED] * known + window[known:]})
        if start + chunk_size >= len(ids) or len(rows) == max_rows:
            break
        start += chunk_size - stride
    return rows, describe(rows, "raw text")


def _check_length(length: int, tokenizer: Any) -> None:
    if length < 2:
        raise ConfigError(f"a length of {length} tokens leaves nothing to predict", "give at least 2, e.g. 2048")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token", "set tokenizer.eos_token")


def _encode(rendered: Iterable[Rendered], tokenizer: Any, answers_only: bool) -> Iterator[EncodedRow]:
    """Token ids and labels of rendered rows."""
    for templated, group in groupby(rendered, key=lambda row: row.templated):
        yield from _encode_alike(list(group), tokenizer, answers_only, templated)


def _encode_alike(
    rendered: list[Rendered], tokenizer: Any, answers_only: bool, templated: bool
) -> Iterator[EncodedRow]:
    with_offsets = answers_only and bool(tokenizer.is_fast)
    batch = tokenizer(
        [row.text for row in rendered],
        add_special_tokens=not templated,  # a template writes its own BOS
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_offsets,
        verbose=False,
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for number, (row, ids) in enumerate(zip(rendered, batch["input_ids"], strict=True)):
        learned = [True] * len(ids)
        if with_offsets:
            learned = _inside(batch["offset_mapping"][number], row.answers)
        elif answers_only:
            learned = _inside_by_prefix(ids, row, tokenizer)
        if len(ids) > 1 and ids[0] == ids[1] == bos:  # the text brought its own
            ids, learned = ids[1:], learned[1:]
        if row.append_eos:
            if ids[-1:] != [eos]:
                ids, learned = [*ids, eos], [*learned, True]
            learned[-1] = True
        labels = [token if keep else IGNORED for token, keep in zip(ids, learned, strict=True)]
        labels[:1] = [IGNORED] * len(labels[:1])
        yield {"input_ids": ids, "labels": labels}


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a character of a span.

    A token reaches from the end of the one before it, or from its own start where that is earlier: byte-level
    tokenizers trim spaces from the offsets they report, and give each of the tokens that share a character all of it.
    """
    inside, reached, current = [], 0, 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= min(start, reached):
            current += 1
        inside.append(current < len(spans) and min(start, reached) < spans[current][1] and end > spans[current][0])
        reached = max(reached, end)
    return inside


def _inside_by_prefix(ids: list[int], row: Rendered, tokenizer: Any) -> list[bool]:
    """The same without offsets: the text up to each edge of a span must tokenise to the row's first tokens."""
    inside = [False] * len(ids)
    for span in row.answers:
        edges = []
        for edge in span:
            prefix = tokenizer(row.text[:edge], add_special_tokens=not row.templated, verbose=False)["input_ids"]
            if prefix[-1:] == [tokenizer.eos_token_id] and ids[: len(prefix)] != prefix:
                prefix = prefix[:-1]  # a tokenizer that ends each text in EOS
            if ids[: len(prefix)] != prefix:
                raise ConfigError(
                    f"cannot tell the tokens of an answer: {row.text[:edge][-30:]!r} alone is tokenised otherwise",
                    "use the model's fast tokenizer, or train on whole rows (answers_only off)",
                )
            edges.append(len(prefix))
        inside[edges[0] : edges[1]] = [True] * (edges[1] - edges[0])
    return inside
