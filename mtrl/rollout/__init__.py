"""Sampling: the engine's interface, vLLM inside the trainer's process, and the seeds of completions.

Importing this package imports neither vLLM nor torch; ``vllm_engine`` does.
"""
