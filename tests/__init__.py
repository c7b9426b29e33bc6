"""Tests of mtrl; conftest.py says what they share."""
