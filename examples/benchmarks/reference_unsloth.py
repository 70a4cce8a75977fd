"""The reference: stock Unsloth as its users write it, batch 1 x accumulation 4, offloaded checkpointing, 8-bit AdamW.

    python examples/benchmarks/reference_unsloth.py MODEL ROWS STEPS RESULT
    torchrun --nproc_per_node=2 examples/benchmarks/reference_unsloth.py MODEL ROWS STEPS RESULT

Beside ours, on the same rows and samples a step:

    parallel-tune bench ... --reference "python examples/benchmarks/reference_unsloth.py {model} {rows} {steps} {result}
        --global_batch {global_batch} --max_seq_length {max_seq_length}"

Options are those of bare_sft.py, which does it. Without a GPU it runs on Unsloth's CPU backend, to be tried out.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from bare_sft import main

if __name__ == "__main__":
    main(["--engine=unsloth", "--checkpointing=unsloth", "--batch=1", "--accumulation=4", *sys.argv[1:]])
