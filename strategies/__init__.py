"""How work is laid on GPUs: strategies, their registry, the selector, placement and pipelining."""
