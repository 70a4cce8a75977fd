"""Token ids and exact labels, on the demo model's tokenizer and on a tiny one without a chat template."""

import os
from pathlib import Path
from typing import Any

import pytest

from parallel_tune.data import IGNORED, EncodedRow, chunk_text, encode_rows, load_rows
from parallel_tune.demo_model import fetch_demo_model
from strategies.errors import ConfigError

ANSWERS = ["Blue.", " two\nlines \n", "ends in a smile 😀", "naïve — “quotes”", "x", "```python\n  print(1)\n```"]

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
# like Qwen3's: a thought in the last answer only, so that a shorter conversation is no prefix of a longer one
THINKING = (
    "{% for m in messages %}<|head|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def smol() -> Any:
    from transformers import AutoTokenizer

    cache = Path(os.environ.get("PARALLEL_TUNE_TEST_CACHE") or "~/.cache/parallel-tune").expanduser()
    return AutoTokenizer.from_pretrained(fetch_demo_model(cache / "SmolLM2-135M-Instruct"))


@pytest.fixture
def tiny() -> Any:
    """A byte-level tokenizer of 300 tokens that writes BOS, and knows no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|head|>", "<|/head|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the answer to the question is this and that, and the other"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )


def learned(row: EncodedRow, tokenizer: Any) -> str:
    text: str = tokenizer.decode([token for token in row["labels"] if token != IGNORED])
    return text


def chat(*answers: str, **extra: str) -> dict[str, Any]:
    turns = []
    for number, answer in enumerate(answers):
        turns += [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": answer, **extra}]
    return {"messages": turns}


def one(row: dict[str, Any], tokenizer: Any, answers_only: bool = True, length: int = 500) -> EncodedRow:
    rows, report = encode_rows([row], tokenizer, length, answers_only)
    assert report.rows == len(rows) == 1
    return rows[0]


def test_every_answer_of_a_chat_and_its_end_token_are_learned(smol: Any) -> None:
    """The oracle joins pieces tokenised one by one, which is exact since special tokens or line ends stand between."""
    ids: list[int] = []
    labels: list[int] = []

    def piece(text: str, keep: bool) -> None:
        tokens = smol(text, add_special_tokens=False)["input_ids"]
        ids.extend(tokens)
        labels.extend(tokens if keep else [IGNORED] * len(tokens))

    row = chat(*ANSWERS)
    piece("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n", False)
    for turn in row["messages"]:
        is_answer = turn["role"] == "assistant"
        piece(f"<|im_start|>{turn['role']}\n", False)
        piece(turn["content"] + "<|im_end|>", is_answer)
        piece("\n", False)
    encoded = one(row, smol)
    assert encoded["input_ids"] == ids
    assert encoded["labels"] == labels
    assert ids == smol.apply_chat_template(row["messages"])["input_ids"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_alpaca_rows_become_chat_turns(smol: Any, answer: str) -> None:
    row = one({"instruction": "Name a colour.", "input": "Not red 😀", "output": answer}, smol)
    assert learned(row, smol) == answer + "<|im_end|>"
    assert "user\nName a colour.\n\nNot red 😀<|im_end|>" in smol.decode(row["input_ids"])
    assert row == one({"messages": [{"role": "user", "content": "Name a colour.\n\nNot red 😀"},
                                    {"role": "assistant", "content": answer}]}, smol)  # fmt: skip


def test_whole_rows_learn_all_but_the_first_token(smol: Any, tiny: Any) -> None:
    for tokenizer in (smol, tiny):
        row = one(chat("a b c"), tokenizer, answers_only=False)
        assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
        assert one(chat("a b c"), tokenizer)["input_ids"] == row["input_ids"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_without_a_chat_template_a_plain_prompt_is_used(tiny: Any, answer: str) -> None:
    row = one({"instruction": "Name a colour.", "input": "Not red", "output": answer}, tiny)
    text = tiny.decode(row["input_ids"])
    assert text.startswith("<s>You are given a task, and material")
    assert text.endswith(f"### Material:\nNot red\n\n### Answer:\n{answer}</s>")
    assert learned(row, tiny) == answer + "</s>"
    assert row["input_ids"].count(tiny.bos_token_id) == row["input_ids"].count(tiny.eos_token_id) == 1


def test_turns_get_headings_without_a_chat_template(tiny: Any) -> None:
    row = one(chat("yes", "no"), tiny)
    assert tiny.decode(row["input_ids"]) == (
        "<s>### User:\nQuestion 0?\n\n### Assistant:\nyes</s>\n\n### User:\nQuestion 1?\n\n### Assistant:\nno</s>"
    )
    assert learned(row, tiny) == "yes</s>no</s>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA3, "first</s>second</s>"),
        (MISTRAL, "first </s>second </s>"),
        (THINKING, "first</s><think>\nhm\n</think>\n\nsecond</s>"),
        (NO_END, "firstsecond</s>"),
    ],
)
@pytest.mark.parametrize("is_fast", [True, False])
def test_templates_of_other_families(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, template: str, expected: str, is_fast: bool
) -> None:
    tiny.chat_template = template
    if not is_fast:
        monkeypatch.setattr(type(tiny), "is_fast", False)
    row = one(chat("first", "second", reasoning_content="hm"), tiny)
    assert learned(row, tiny) == expected
    assert row["input_ids"].count(tiny.bos_token_id) == template.count("bos_token")
    assert row["input_ids"][:1] != row["input_ids"][1:2]


def test_a_token_that_straddles_the_edge_belongs_to_the_answer(tiny: Any) -> None:
    tiny.chat_template = MISTRAL
    row = one(chat("the", "question"), tiny)
    assert learned(row, tiny) == " the </s> question </s>"  # " the" is one token, and the space is the template's


def test_a_slow_tokenizer_refuses_what_it_cannot_tell(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny), "is_fast", False)
    assert learned(one({"prompt": "is it?\n", "completion": "yes"}, tiny), tiny) == "yes</s>"
    with pytest.raises(ConfigError, match="tokenised otherwise"):
        one({"prompt": "the ans", "completion": "wer"}, tiny)


def test_a_template_that_refuses_names_the_row(tiny: Any) -> None:
    tiny.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + NO_END
    bad = {"messages": [{"role": "system", "content": "s"}, *chat("a")["messages"]]}
    with pytest.raises(ConfigError, match=r"row 2: .*\(system, user, assistant\): no system"):
        encode_rows([chat("a"), bad], tiny, 100)


def test_a_template_that_rewrites_answers_is_refused(tiny: Any) -> None:
    tiny.chat_template = "{% for m in messages %}{{ m.content }}|{{ m.content | length }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="row 1: cannot tell where answer 2 lies"):
        one(chat("a"), tiny)


def test_prompt_and_completion(smol: Any, tiny: Any) -> None:
    for tokenizer, eos in ((smol, "<|im_end|>"), (tiny, "</s>")):
        row = one({"prompt": "The sky is", "completion": " blue"}, tokenizer)
        assert learned(row, tokenizer) == " blue" + eos
        assert tokenizer.decode(row["input_ids"]).endswith("The sky is blue" + eos)
    history, asked = chat("earlier")["messages"], chat("last")["messages"]
    row = one({"prompt": history + asked[:1], "completion": asked[1:]}, smol)
    assert learned(row, smol) == "last<|im_end|>"
    mixed, _ = encode_rows(
        [{"prompt": "a", "completion": "b"}, {"prompt": asked[:1], "completion": asked[1:]}], smol, 99
    )
    assert len(mixed) == 2


def test_plain_text_is_learned_whole_with_one_bos_and_one_eos(tiny: Any) -> None:
    plain = one({"text": "the answer"}, tiny)
    assert tiny.decode(plain["input_ids"]) == "<s>the answer</s>"
    assert learned(plain, tiny) == "the answer</s>"
    assert one({"text": "<s>the answer</s>"}, tiny) == plain


def test_long_rows_are_cut_and_those_left_without_answer_dropped(smol: Any) -> None:
    rows = [
        chat("short"),
        chat("long " * 60),
        {"messages": chat("a " * 90)["messages"][:1] * 40 + chat("b")["messages"]},
    ]
    found, report = encode_rows([*rows, {"messages": []}], smol, 60, answers_only=True)
    assert (report.rows, report.truncated_rows, report.dropped_rows, report.empty_rows) == (2, 2, 1, 1)
    assert found.lengths == [len(one(rows[0], smol)["input_ids"]), 60]
    assert found[1]["labels"][-1] == found[1]["input_ids"][-1] != smol.eos_token_id
    assert report.tokens == sum(found.lengths)
    assert report.answer_tokens == sum(label != IGNORED for row in found for label in row["labels"])
    assert encode_rows(rows, smol, 60)[1].dropped_rows == 0


def test_rows_are_encoded_alike_whatever_stands_beside_them(smol: Any) -> None:
    rows = [chat(*ANSWERS[: 1 + number % 3]) for number in range(1003)]
    found, _ = encode_rows(rows, smol, 200, answers_only=True)
    assert [found[0], found[1], found[999], found[1002]] == [one(rows[n], smol, length=200) for n in (0, 1, 999, 1002)]
    assert found == encode_rows(rows, smol, 200, answers_only=True)[0]


def test_a_dataset_of_the_hub_library_works_too(smol: Any) -> None:
    from datasets import Dataset

    assert encode_rows(Dataset.from_list([chat("a")]), smol, 99)[0] == encode_rows([chat("a")], smol, 99)[0]


@pytest.mark.parametrize(
    ("rows", "length", "seen"),
    [
        ([], 99, "no rows"),
        ([{"text": " "}, {"text": None}], 99, "no row is left to train on: 2 empty"),
        ([{"text": "a"}, {"text": 3}], 99, "row 2: 'text' is int"),
        ([{"text": "a"}, chat("b")], 99, "row 2 has no 'text'"),
        ([{"text": "a"}], 1, "a length of 1 tokens"),
    ],
)
def test_unusable_rows_are_refused(tiny: Any, rows: list[dict[str, Any]], length: int, seen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encode_rows(rows, tiny, length)
    assert seen in str(caught.value)


def test_a_tokenizer_without_eos_is_refused(tiny: Any) -> None:
    tiny.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence"):
        one({"text": "a"}, tiny)


@pytest.mark.parametrize(("chunk_size", "stride"), [(16, 0), (16, 5), (7, 3), (1000, 10)])
def test_raw_text_is_cut_into_chunks_that_overlap(tiny: Any, chunk_size: int, stride: int) -> None:
    text = "the answer to the question is this, and that. " * 5
    whole = [*tiny(text)["input_ids"], tiny.eos_token_id]
    rows, report = chunk_text(text, tiny, chunk_size, stride)
    joined = list(rows[0]["input_ids"])
    for row in list(rows)[1:]:
        assert row["input_ids"][:stride] == joined[len(joined) - stride :]
        joined += row["input_ids"][stride:]
    assert joined == whole
    assert all(length == chunk_size for length in rows.lengths[:-1])
    unpredicted = 1 if stride else len(rows)
    assert report.answer_tokens == len(whole) - unpredicted
    assert (report.format, report.rows) == ("raw text", len(rows))


def test_raw_text_refuses_a_stride_as_long_as_the_chunk(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="stride of 8"):
        chunk_text("the answer", tiny, 8, 8)
    with pytest.raises(ConfigError, match="no text"):
        chunk_text(" \n", tiny, 8)


def test_a_file_to_labels(tmp_path: Path, smol: Any) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('instruction,input,output\n"Say ""hi"", twice",,"hi\nhi"\n')
    rows, report = encode_rows(load_rows(str(path)), smol, 100, answers_only=True)
    assert learned(rows[0], smol) == "hi\nhi<|im_end|>"
    assert report.format == "alpaca"


def test_columns_that_are_not_used_are_said(tiny: Any) -> None:
    """A system prompt in a column of its own would be missed otherwise."""
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "the answer"}]
    _, report = encode_rows([{"system": "Be brief.", "messages": turns}], tiny, 100)
    assert report.unused_columns == ("system",) and report.summary().endswith("; columns not used: system")
    many = {"text": "the answer", **{f"c{number}": None for number in range(7)}}
    assert encode_rows([many], tiny, 100)[1].summary().endswith("columns not used: c0, c1, c2, c3, c4 and 2 more")
    _, plain = encode_rows([{"instruction": "that", "input": "", "output": "this"}], tiny, 100)
    assert plain.unused_columns == () and "not used" not in plain.summary()
