"""A real run on two virtual devices ends with a page of its own figures, and the parent stays light."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from parallel_tune.reporting.compare import compare

WORDS = ["tree", "house", "light", "green", "river", "stone", "cloud", "music", "paper", "window", "garden"]


def make_model(folder: Path) -> None:
    """A Llama of two layers with a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", "<unk>", *WORDS]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_rows(path: Path) -> None:
    chance = random.Random(0)
    rows = [{"instruction": " ".join(chance.sample(WORDS, 4)), "output": " ".join(WORDS[:3])} for _ in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_page(run: Path) -> dict[str, Any]:
    """The figures on a run's page are those of its report, which is given back."""
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    html = (run / "report.html").read_text()
    assert f"<b>{report['tokens']:,}</b>" in html
    assert f"<b>{report['final_loss']:.4f}</b>" in html
    assert f"<b>{report['held_out_loss_before']:.4f} → {report['held_out_loss_after']:.4f}</b>" in html
    return report


def test_a_run_of_two_processes_ends_with_its_page(ddp_run: Any) -> None:
    check_page(ddp_run.run)
    assert list((ddp_run.run / "tensorboard").glob("events.*"))


def test_a_run_ends_with_its_page(tmp_path: Path, capsys: Any) -> None:
    model, rows, run = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run"
    make_model(model)
    make_rows(rows)
    options = f"--model {model} --dataset {rows} --output_dir {run} --hardware cpu:2 --strategy model_parallel".split()
    options += ["--max_steps=3", "--global_batch_size=4", "--max_seq_length=64", "--val_size=4"]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    code = "import sys; from parallel_tune.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        env=os.environ | quiet,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"report: {run / 'report.html'}" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"  # the parent never imports torch

    # TensorBoard, the default tracker where it is installed, keeps its files with the run.
    assert list((run / "tensorboard").glob("events.*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl", "run"]

    report = check_page(run)
    capsys.readouterr()
    compare([run], tmp_path / "out")
    assert f"{report['tokens']:,}" in capsys.readouterr().out
