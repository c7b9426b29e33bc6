"""mtrl: reinforcement learning of mixture-of-experts language models on Megatron-Core and vLLM."""

__version__ = "0.1.0"
