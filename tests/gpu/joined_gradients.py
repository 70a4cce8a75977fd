"""Gradients of padded and of joined rows on one GPU, for an engine and a model family; prints JSON.

    python joined_gradients.py ENGINE FAMILY FOLDER

What they are held against is one row a pass: of transformers in float32, so that two kernels of bfloat16 that round
each in its own way are judged by the same measure; of Unsloth, whose kernels want bfloat16, as they are.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LENGTHS = (37, 400, 12, 255, 90, 611, 5, 128)
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 64


def make_folder(family: str, folder: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZES),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES),
        "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
        "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=WINDOW, query_pre_attn_scalar=64),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[family]()).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(3, 1000))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


def load(engine: str, folder: Path) -> Any:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if engine == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=1024, load_in_4bit=False, use_gradient_checkpointing=False
        )
        model = FastLanguageModel.get_peft_model(
            model, r=8, lora_dropout=0, target_modules=targets, use_gradient_checkpointing=False
        )
    else:
        import torch
        import transformers
        from peft import LoraConfig, get_peft_model

        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
        )
        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    import torch

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def main(engine: str, family: str, folder: Path) -> None:
    if engine == "unsloth":
        import unsloth  # noqa: F401
    make_folder(family, folder)
    model = load(engine, folder)
    import torch

    from parallel_tune import row_attention
    from parallel_tune.data import IGNORED, boundary_arguments, collate, join

    generator = torch.Generator().manual_seed(1)
    rows: Any = []
    for length in LENGTHS:
        ids = torch.randint(3, 1000, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    targets = torch.tensor(sum(LENGTHS) - len(LENGTHS), device="cuda")
    device = torch.device("cuda", 0)

    def step(batches: Iterator[dict[str, Any]], model: Any = model, exact: bool = False) -> tuple[float, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            lengths = batch.pop("row_lengths", None)
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            if lengths:
                inputs |= boundary_arguments(lengths, engine, device)
            with torch.autocast("cuda", torch.bfloat16, enabled=not exact):
                loss = model(**inputs, num_items_in_batch=targets).loss
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    def padded(count: int) -> Iterator[dict[str, Any]]:
        return (collate(rows[at : at + count], 0) for at in range(0, len(rows), count))

    def joined(count: int) -> Iterator[dict[str, Any]]:
        return (join(rows[at : at + count], 0) for at in range(0, len(rows), count))

    if engine == "transformers":
        loss, gradient = step(padded(1), copy.deepcopy(model).float(), exact=True)
    else:
        loss, gradient = step(padded(1))
    said: dict[str, Any] = {"loss": loss}
    for name, batches in (("padded", padded(4)), ("again", padded(2))):
        said[name] = compare(step(batches), loss, gradient)
    kernels = 0
    if engine == "transformers":
        row_attention.use_row_attention(model)
        kernel = row_attention._varlen

        def counted(*arguments: Any) -> Any:
            nonlocal kernels
            kernels += 1
            return kernel(*arguments)

        row_attention._varlen = counted
    for name, count in (("joined", 4), ("all joined", len(rows))):
        said[name] = compare(step(joined(count)), loss, gradient)
    if engine == "transformers":
        said["flash_kernels"] = kernels
        said["flash_serves"] = row_attention.flash_serves(torch.cuda.get_device_capability(device))
    without = ({**batch, "row_lengths": [sum(batch["row_lengths"])]} for batch in joined(4))
    if engine == "transformers":
        said["without boundaries"] = compare(step(without), loss, gradient)
    print(json.dumps(said))


def compare(found: Any, loss: float, gradient: Any) -> dict[str, float]:
    other, its = found
    return {"loss": abs(other / loss - 1), "gradient": float((its - gradient).norm() / gradient.norm())}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
