from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """One nursery of gloo ranks for the whole session; see world.py."""
    shared = World()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def te_world() -> Iterator[World]:
    """Ranks that find the plain torch reference as ``transformer_engine``; see tests/te_reference."""
    shared = World(path=(Path(__file__).resolve().parents[1] / "te_reference",))
    yield shared
    shared.close()
