"""Ranks, groups and devices: everything mtrl knows about parallelism, and nothing about models."""
