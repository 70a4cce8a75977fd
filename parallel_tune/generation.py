"""One greedy answer of a model, with or without an adapter."""

from __future__ import annotations

import logging
from pathlib import Path


def answer(model: Path, adapter: Path | None, prompt: str, max_new_tokens: int = 80) -> str:
    """What the model says to a user's prompt, decoded greedily on the CPU or the first GPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # They warn of kernels for 4-bit and 8-bit weights, which are not used here.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).to(device)
    if adapter is not None:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, str(adapter))
    turns = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.no_grad():
        tokens = network.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    said: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said.strip()
