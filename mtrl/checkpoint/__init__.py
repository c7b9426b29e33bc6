"""Checkpoints: Hugging Face folders that transformers and vLLM open as they are."""
