"""Fine-tune language models with Unsloth on all the GPUs of a machine."""

__version__ = "0.1.0"
