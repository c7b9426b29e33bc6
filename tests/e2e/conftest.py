from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.world import ENGINE_PRELOADED, World
from tests.e2e.jobs import Finished, torchrun
from tests.e2e.toy import write_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy job's files; runs go to ``runs/NAME`` in it."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """For runs of which only the files matter: cheaper than torchrun, which imports everything anew."""
    with_engine = any(item.get_closest_marker("vllm") for item in request.session.items)
    shared = World(preload=ENGINE_PRELOADED if with_engine else ())
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def grpo(toy: Path) -> Finished:
    """SFT, then GRPO, as a user starts it; in ``runs/grpo``."""
    return torchrun(toy, "grpo.yaml")


@pytest.fixture(scope="session")
def checkpoint(toy: Path, grpo: Finished) -> Path:
    """What ``grpo`` trained."""
    assert grpo.status == 0, grpo.err
    return toy / "runs" / "grpo" / "checkpoints" / "step_000007"
