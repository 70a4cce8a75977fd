"""What torch's partitioner keeps of a decoder layer that is compiled as one region, and what the tape counts for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from parallel_tune.memory.compiled_tape import UNEXPLAINED_HIDDEN, compiled_layer
from parallel_tune.memory.facts import facts_from_config
from parallel_tune.memory.operations import Scene
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.tape import Tape

TOKENS = 512
SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 8, "num_key_value_heads": 2,
         "head_dim": 32, "num_hidden_layers": 1, "vocab_size": 1000}  # fmt: skip
VIEWS = {"view", "permute", "alias", "transpose", "reshape", "unsqueeze", "squeeze", "t", "detach"}
LAYERS: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (transformers.LlamaConfig, LlamaDecoderLayer),
    "qwen2": (transformers.Qwen2Config, Qwen2DecoderLayer),
    "qwen3": (transformers.Qwen3Config, Qwen3DecoderLayer),
}


def attend(module: Any, query: Any, key: Any, value: Any, _: Any, scaling: float, **__: Any) -> tuple[Any, None]:
    """Flash attention over joined rows, heads grouped, as Unsloth runs it inside a compiled layer."""
    states = [state[0].transpose(0, 1) for state in (query, key, value)]
    result = torch.ops.aten._flash_attention_forward(
        *states, module.boundaries, module.boundaries, TOKENS, TOKENS, 0.0, False, False, scale=scaling,
        window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    return result[0].unsqueeze(0), None


def base(node: Any) -> Any:
    """The node whose storage this one looks at."""
    while node.op == "call_function" and getattr(node.target, "overloadpacket", None) is not None:
        if node.target.overloadpacket.__name__ not in VIEWS:
            break
        node = node.args[0]
    return node


def kept_bytes(kind: str) -> int:
    """Activations that a compiled layer keeps for its derivative, its input included."""
    make_config, make_layer = LAYERS[kind]
    transformers.AttentionInterface.register("joined_flash", attend)
    config = make_config(**SIZES, attn_implementation="joined_flash")
    with torch.device("meta"):
        layer: Any = make_layer(config, 0).to(torch.bfloat16).train()
    names = [name for name, _ in layer.named_parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = {"dtype": torch.bfloat16, "device": "cpu"}
        weights = [torch.empty(weight.shape, requires_grad=True, **made) for weight in layer.parameters()]
        source = torch.empty(1, TOKENS, SIZES["hidden_size"], requires_grad=True, **made)
        angles = [torch.empty(1, TOKENS, SIZES["head_dim"], **made) for _ in range(2)]
        boundaries = torch.empty(3, dtype=torch.int32)

        def forward(source: Any, cos: Any, sin: Any, boundaries: Any, *weights: Any) -> tuple[Any]:
            layer.self_attn.boundaries = boundaries
            result = torch.func.functional_call(
                layer, dict(zip(names, weights, strict=True)), (source,), {"position_embeddings": (cos, sin)}
            )
            return (result[0] if isinstance(result, tuple) else result,)

        inputs = (source, *angles, boundaries, *weights)
        joint = aot_export_joint_simple(forward, inputs, trace_joint=True, decompositions=select_decomp_table())
        forwards, _ = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=1, compiler="inductor")
    (output,) = [node for node in forwards.graph.nodes if node.op == "output"]
    kept = {base(node) for node in output.args[0][1:]}
    placeholders = [node for node in forwards.graph.nodes if node.op == "placeholder"]
    return sum(
        node.meta["val"].nbytes for node in kept if node not in placeholders or node is placeholders[0]
    )  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_the_partitioner_keeps_what_is_counted(kind: str) -> None:
    facts = facts_from_config({"model_type": kind, **SIZES})
    settings = TrainingSettings(method="full", engine="unsloth", sequence_length=TOKENS)
    scene, tape = Scene(settings, TOKENS), Tape()
    source = tape.value(scene.bytes_of(facts.hidden_size), needs_gradient=True)
    output = compiled_layer(tape, scene, facts, 0, 1, source)
    tape.drop(source)
    tape.drop(output)
    counted = tape.live_bytes - UNEXPLAINED_HIDDEN * scene.bytes_of(facts.hidden_size)
    # A float32 or two per token and head of the norms' statistics are not counted.
    assert counted == pytest.approx(kept_bytes(kind), rel=0.01)
