"""Benchmarks; each is a module that is run by its name and writes its page and numbers under ``docs/``."""
