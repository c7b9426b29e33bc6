"""Implementations of the transformer's parts, each with the places of its parameters by role."""
