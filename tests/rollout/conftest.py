import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.world import ENGINE_PRELOADED, World
from tests.rollout import scenarios


@pytest.fixture(scope="session")
def rollout_world() -> Iterator[World]:
    shared = World(preload=ENGINE_PRELOADED)
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def scenario(
    rollout_world: World, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], list[Any]]:
    """Results a rank of a function of scenarios.py; each runs once a session."""

    @functools.cache
    def run(name: str, size: int) -> list[Any]:
        folder = str(tmp_path_factory.mktemp(name))
        return rollout_world.run(getattr(scenarios, name), {"folder": folder}, size=size, timeout_s=300)

    return run
