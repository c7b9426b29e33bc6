"""What only a built layout can refuse."""

from mtrl.models.builder import build_model
from mtrl.parallel import groups
from mtrl.parallel.errors import LayoutError
from mtrl.parallel.layout import RankLayout
from mtrl.parallel.spec import parse_training_spec
from tests.distributed.world import World
from tests.toys import tiny_config


def build_with_context_parallelism() -> str:
    parallel = groups.create(RankLayout.from_spec(parse_training_spec("megatron:c2")))
    config = tiny_config(vocab_size=32, num_layers=2, tied=False, dense_layers=None)
    try:
        build_model(config, parallel)
    except LayoutError as error:
        return str(error)
    return "built"


def test_a_model_under_context_parallelism_is_refused(world: World) -> None:
    # The ledger counts this refusal where a config asks for it: tests/unit/test_preflight.py.
    for said in world.run(build_with_context_parallelism, size=2):
        assert said == "megatron:c2: context parallelism (c2) is not built yet; write it without c"
