"""`--trace`: an architecture that the closed form lacks is planned by its trace; one that it has is checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from parallel_tune.cli import program
from parallel_tune.memory import TrainingSettings
from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.trace_worker import Worker
from parallel_tune.memory.traced import TraceProcess
from parallel_tune.plan_view import render_plan
from strategies.contracts import Arrangement, Part, Plan
from strategies.errors import ConfigError, RunFailed

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
ONE_CHOICE = (
    "--per_device_train_batch_size=1", "--gradient_accumulation_steps=2", "--use_gradient_checkpointing=none",
    "--max_seq_length=256",
)  # fmt: skip


def folder(place: Path, model_type: str, **more: Any) -> str:
    (place / "config.json").write_text(json.dumps({"model_type": model_type, **SHAPE, **more}))
    return str(place)


def plan(*options: str) -> dict[str, Any]:
    result = CliRunner().invoke(program, ["plan", "--json", *options], catch_exceptions=False)
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_an_unknown_architecture_is_refused_and_told_of_the_option(verb: str, tmp_path: Path) -> None:
    model = folder(tmp_path, "olmo2")
    with pytest.raises(
        ConfigError, match="is a olmo2 model, and the memory of its layers is known for gemma"
    ) as caught:
        CliRunner().invoke(program, [verb, "--model", model, "--hardware", "cpu:2"], catch_exceptions=False)
    assert "--trace" in caught.value.hint


def test_an_unknown_architecture_is_planned_by_its_trace(tmp_path: Path) -> None:
    model = folder(tmp_path, "olmo2")
    made = plan("--model", model, "--hardware=2xT4-16GB", "--strategy=model_parallel", "--trace", *ONE_CHOICE)
    assert (made["estimate"], made["fits"], made["strategy"]) == ("trace", True, "model_parallel")
    assert any("traced on transformers' own olmo2 layers" in line for line in made["basis"])
    assert made["device_map"]["model.norm"] == made["device_map"]["lm_head"] == 1
    facts = facts_from_config({"model_type": "olmo2", **SHAPE})
    settings = TrainingSettings(
        compute_dtype="float16", sequence_length=256, attention_mask=False, cross_entropy="fused"
    )
    from parallel_tune.memory.trace import trace_peak

    for device in made["devices"]:
        first, last = device["layers"]
        part = Part(first, last, first == 0, last == 3)
        arrangement = Arrangement(1, 1, 2, "none")
        expected = trace_peak(facts, settings, part, arrangement, {"model_type": "olmo2", **SHAPE})
        if made["lanes"] == 1 or part.head:
            assert device["traced_allocated_bytes"] == pytest.approx(expected, rel=0.001)
        assert device["traced_allocated_bytes"] != device["closed_form_allocated_bytes"]
        assert 0 <= device["predicted_allocated_bytes"] - device["traced_allocated_bytes"] <= 64 << 20  # workspaces
        memory = device["memory"]
        assert min(value for value in memory.values() if isinstance(value, int)) >= 0


def test_a_known_architecture_is_checked_and_keeps_its_closed_form(tmp_path: Path) -> None:
    model = folder(tmp_path, "llama")
    options = ("--model", model, "--hardware=1xT4-16GB", "--engine=transformers", *ONE_CHOICE)
    checked, bare = plan(*options, "--trace"), plan(*options)
    device = checked["devices"][0]
    assert checked["estimate"] == "closed_form"
    assert device["predicted_peak_bytes"] == bare["devices"][0]["predicted_peak_bytes"]
    assert device["closed_form_allocated_bytes"] == pytest.approx(device["traced_allocated_bytes"], rel=0.01)
    assert bare["devices"][0]["traced_allocated_bytes"] is None
    shown = " ".join(render_plan(Plan.from_json(json.dumps(checked))).split())
    assert "GiB on device 0, " in shown
    assert "by the closed form" in shown


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-model"}, "transformers cannot build a 'no-such-model' model"),
        ({"model_type": "t5"}, "transformers cannot build a 't5' model"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2}, "layers of the kind conv"),
        (
            {"model_type": "deepseek_v3", "first_k_dense_replace": 3, "n_routed_experts": 4},
            "layers of this deepseek_v3",
        ),
        ({"model_type": "some_vl", "text_config": SHAPE}, "text model inside another one"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # as the process does
def test_what_cannot_be_traced_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Worker({**SHAPE, **config}, known=False)


def test_what_the_process_cannot_trace_reaches_the_command() -> None:
    whole = {**SHAPE, "model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2}
    with (
        pytest.raises(ConfigError, match=r"cannot trace: .* layers of the kind conv") as caught,
        TraceProcess(facts_from_config(whole), whole),
    ):
        pass
    assert "full and sliding attention" in caught.value.hint


def test_a_model_without_sdpa_is_traced_with_the_attention_that_it_has(tmp_path: Path) -> None:
    """Attention that computes the scores of all pairs, whose bytes grow with the square of the length."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    asked = (
        f"--model={folder(tmp_path, 'gpt_oss', **experts)}", "--hardware=1xA100-40GB", "--trace",
        "--engine=transformers", "--target_modules=q_proj,v_proj", *ONE_CHOICE[:-1],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="a gpt_oss model cannot compute its attention by sdpa") as caught:
        plan(*asked, "--max_seq_length=256")
    assert "--attn_implementation eager" in caught.value.hint
    shorter, longer = (
        plan(*asked, "--attn_implementation=eager", f"--max_seq_length={length}")["devices"][0][
            "traced_allocated_bytes"
        ]
        for length in (1024, 2048)
    )
    assert longer > 2.5 * shorter > 2.5 * 4 * 8 * 1024**2


def test_a_plan_counts_the_scores_of_eager_attention() -> None:
    length = 4096
    asked = (
        "--model=meta-llama/Llama-3.2-1B", "--hardware=1xH100-80GB", "--engine=transformers", *ONE_CHOICE[:-1],
        f"--max_seq_length={length}",
    )  # fmt: skip
    kernels, eager = (plan(*asked, f"--attn_implementation={name}") for name in ("sdpa", "eager"))
    more = eager["devices"][0]["predicted_allocated_bytes"] - kernels["devices"][0]["predicted_allocated_bytes"]
    scores = 16 * 32 * length**2 * (4 + 2)
    assert 0.9 * scores < more < 1.1 * scores
    assert [any("eager attention" in said for said in made["basis"]) for made in (kernels, eager)] == [False, True]


def test_adapters_that_find_no_linear_are_said_with_a_way_out() -> None:
    config = {"model_type": "gpt_neox", **SHAPE}
    with TraceProcess(facts_from_config(config), config) as process:
        assert process.facts.modules.layers == "gpt_neox.layers"
        assert process.facts.modules.tail == ("gpt_neox.final_layer_norm",)
        part, arrangement = Part(0, 3, True, True), Arrangement(1, 1, 1, "none")
        with pytest.raises(ConfigError) as caught:
            process.trace(TrainingSettings(sequence_length=64), part, arrangement)
        assert "all-linear" in caught.value.hint
        # The process lives on.
        both = [
            process.trace(TrainingSettings(sequence_length=64, lora_targets=("all-linear",), **four), part, arrangement)
            for four in ({}, {"load_in_4bit": True})
        ]
        assert both[1]["kept"]["weights"] < both[0]["kept"]["weights"]
        assert both[1]["kept"]["adapters"] == both[0]["kept"]["adapters"]


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "import sys; sys.stdin.readline(); print('no json')"])
def test_a_process_that_fails_is_an_error_in_words(body: str) -> None:
    config = {"model_type": "olmo2", **SHAPE}
    process = TraceProcess(facts_from_config(config), config, (sys.executable, "-c", body))
    with pytest.raises(RunFailed, match="tracing a olmo2 model failed"), process:
        pass


def test_an_unknown_architecture_trains_by_its_traced_plan(
    tune: Any, tiny_tokenizer: Any, rows_file: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {**SHAPE, "vocab_size": len(tiny_tokenizer), "hidden_size": 64, "intermediate_size": 128}
    config = AutoConfig.for_model("olmo2", **values | {"num_hidden_layers": 2, "num_attention_heads": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    ended = tune(
        f"--model={tmp_path}", f"--dataset={rows_file}", "--strategy=model_parallel", "--hardware=cpu:2", "--trace",
        "--max_steps=2", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=1", "--max_seq_length=64",
        "--use_gradient_checkpointing=none", f"--output_dir={tmp_path / 'run'}", base=False,
    )  # fmt: skip
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["estimate"] == "trace"
    assert report["steps"] == 2
    assert "prediction_note" not in report
    assert all(device["predicted_allocated_bytes"] > 0 for device in report["devices"])
    assert ended.code == 0
