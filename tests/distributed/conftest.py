from collections.abc import Iterator

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """One nursery of gloo ranks for the whole session; see world.py."""
    shared = World()
    yield shared
    shared.close()
