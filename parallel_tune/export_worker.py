"""The process that exports: load, merge, convert, push.

python -m parallel_tune.export_worker RUN_DIRECTORY < {"wanted": ..., "card": ...}
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

from parallel_tune import outcome
from parallel_tune.config import TrainConfig
from parallel_tune.export import Export, unfinished
from parallel_tune.llama_cpp import GGUF_TYPES
from parallel_tune.model_card import public_name
from parallel_tune.process import die_with_parent, importing, leave
from parallel_tune.rundir import RunDir
from parallel_tune.unneeded import leave_out, unneeded_packages
from strategies.errors import ParallelTuneError, RunFailed


def main(arguments: list[str]) -> NoReturn:
    """Export as stdin says. Never returns."""
    run = RunDir(Path(arguments[0]))
    asked = json.load(sys.stdin)
    try:
        export(run, Export(**asked["wanted"]), asked["card"])
        how = outcome.Outcome(0)
    except ParallelTuneError as error:
        how = outcome.Outcome(error.exit_code, error.message, error.hint, traceback.format_exc())
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        how = outcome.Outcome(1, message, "", traceback.format_exc())
    outcome.save(run.logs / "export.json", how)
    leave(how.code)


def export(run: RunDir, wanted: Export, card: str) -> None:
    """Write the export into its folder, with the card, and push it if asked; a push that fails leaves the folder.

    Raises:
        RunFailed: the converter or the push failed.
    """
    config, _ = run.read()
    import_libraries(config, wanted)
    target = Path(wanted.save_path)
    folder = unfinished(target)
    match wanted.method:
        case "lora":
            require_readable(run.adapter)
            shutil.copytree(run.adapter, folder, dirs_exist_ok=True)
        case "merged_16bit":
            save_merged(run, config, folder)
        case "merged_4bit":
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # goes with what a killed export left
                save_merged(run, config, Path(scratch))
                save_in_4bit(Path(scratch), folder)
        case "gguf":
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # goes with what a killed export left
                merged = Path(scratch).absolute() / "model"
                save_merged(run, config, merged)
                # Converters name the model by this card, else by the folder that they read it from.
                name = public_name(config.model).rpartition("/")[2]
                (merged / "README.md").write_text(f"---\nmodel_name: {json.dumps(name)}\n---\n", encoding="utf-8")
                if wanted.exporter == "unsloth":
                    write_by_unsloth(merged, folder, wanted, config)
                else:
                    write_gguf(merged, folder, wanted)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if target.exists():
        target.rmdir()  # empty, as was checked
    folder.rename(target)
    if wanted.hub_path:
        try:
            push(target, wanted.hub_path)
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise RunFailed(
                f"{target} is written, but the push to {wanted.hub_path} failed: {message}",
                f"`hf upload {wanted.hub_path} {shlex.quote(str(target))}` pushes it without a new export.",
            ) from error


def import_libraries(config: TrainConfig, wanted: Export) -> None:
    """What every export imports, without what most have no use for; see `process.importing`."""
    if wanted.method != "merged_4bit" and wanted.exporter != "unsloth":
        leave_out(unneeded_packages(config, "transformers"))
    with importing():
        import peft  # noqa: F401


def require_readable(adapter: Path) -> None:
    """Refuse an adapter whose weights cannot be read, which a mere copy would not find out.

    Raises:
        RunFailed: they are cut off, damaged or missing.
    """
    from peft import load_peft_weights

    try:
        load_peft_weights(str(adapter), device="cpu")
    except Exception as error:
        raise RunFailed(
            f"the adapter in {adapter} cannot be read: {type(error).__name__}: {error}",
            f"Remove that folder: `parallel-tune resume {shlex.quote(str(adapter.parent))}` makes it anew from the "
            "last checkpoint.",
        ) from error


def save_merged(run: RunDir, config: TrainConfig, folder: Path) -> None:
    """The base model in 16 bit with the adapter added to its weights: one rounding, whatever the base was held in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parallel_tune.engines.transformers import nf4

    dtype = torch.float16 if config.named_dtype == "float16" else torch.bfloat16
    source = str(run.model) if config.full_finetuning else config.model
    # A LoftQ adapter belongs to the rounded weights: added to the unrounded ones, it would correct them twice.
    options: dict[str, Any] = {} if config.loftq_config is None else {"quantization_config": nf4(dtype)}
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    if not config.full_finetuning:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(run.adapter)).merge_and_unload()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(run.result(config))).save_pretrained(folder)


def save_in_4bit(merged: Path, folder: Path) -> None:
    """The merged model with its linear layers in nf4."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parallel_tune.engines.transformers import nf4

    where = {"": 0 if torch.cuda.is_available() else "cpu"}
    model: Any = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.bfloat16, device_map=where, quantization_config=nf4(torch.bfloat16)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(merged).save_pretrained(folder)


def write_gguf(merged: Path, folder: Path, wanted: Export) -> None:
    """One file a type; types that the converter does not write are made from its 16-bit file.

    Raises:
        RunFailed: llama.cpp did not write a file.
    """
    for kind in wanted.quantizations:
        file = folder / f"model-{kind}.gguf"
        if kind in GGUF_TYPES:
            convert(merged, file, kind, str(wanted.converter))
            continue
        whole = merged / "whole.gguf"
        if not whole.exists():
            convert(merged, whole, "auto", str(wanted.converter))
        _run_llama_cpp([str(wanted.quantizer), str(whole), str(file), kind], file)


def write_by_unsloth(merged: Path, folder: Path, wanted: Export, config: TrainConfig) -> None:
    """One file a type, by Unsloth's exporter.

    Raises:
        RunFailed: it failed.
    """
    from parallel_tune.unsloth_gguf import write

    dtype = "f16" if config.named_dtype == "float16" else "bf16"
    write(merged, folder, wanted.quantizations, dtype, Path(str(wanted.converter)), Path(str(wanted.quantizer)))


def convert(merged: Path, file: Path, kind: str, converter: str) -> None:
    """Run llama.cpp's converter.

    Raises:
        RunFailed: it did not write the file.
    """
    command = [sys.executable, converter, str(merged), "--outfile", str(file)]
    _run_llama_cpp([*command, "--outtype", kind], file)


def _run_llama_cpp(command: list[str], file: Path) -> None:
    # The converter imports what lies beside it, which our own processes must not.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, preexec_fn=die_with_parent)
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode != 0 or not file.exists():
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RunFailed(
            f"making {file.name} ended with code {done.returncode}: {last}",
            f"The export log has the whole output of {shlex.join(command)}",
        )


def push(folder: Path, hub_path: str) -> None:
    """Make the repository, private if it is new, and upload the folder; the token comes from HF_TOKEN or the login."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(hub_path, private=True, exist_ok=True)
    hub.upload_folder(repo_id=hub_path, folder_path=folder, commit_message="parallel-tune export")


if __name__ == "__main__":
    main(sys.argv[1:])
