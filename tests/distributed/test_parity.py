"""Every layout gives transformers' losses, gradients and weights, for every family."""

import itertools
from typing import Any

import pytest

from tests.distributed.pairs import (
    both_stacks,
    candidates,
    covering,
    features,
    layout_and_family,
    legal_specs,
    suite,
)
from tests.distributed.parity import Errors, Measured, Pair
from tests.distributed.selected import selected
from tests.distributed.world import World
from tests.family_toys import FAMILY_TOYS

SUITE, BOTH_STACKS = suite(), both_stacks()
# One process with all samples of a step in one row: the same sums in another order.
FLOORS = {toy: Pair(spec="megatron:d1", toy=toy, max_tokens=1000) for toy in {pair.toy for pair in SUITE}}


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    """Of the pairs whose tests were selected, and of the floors of all toys whose were."""
    pairs = selected(request, "pair")
    pairs += [FLOORS[pair.toy] for pair in pairs]
    pairs += [FLOORS[name] for name in selected(request, "floor")]
    return Measured(world, tmp_path_factory.mktemp("parity"), pairs)


def marked(pair: Pair) -> Any:
    return pytest.param(pair, marks=[] if pair in BOTH_STACKS else pytest.mark.one_stack)


@pytest.mark.parametrize("pair", [marked(pair) for pair in SUITE], ids=str)
def test_a_layout_gives_the_numbers_of_transformers(measured: Measured, pair: Pair) -> None:
    errors = measured(pair)
    print(f"{pair}: {errors}")
    assert not errors.beyond(measured(FLOORS[pair.toy])), errors


@pytest.mark.parametrize("floor", sorted(FLOORS))
def test_the_floor_is_below_the_bounds(measured: Measured, floor: str) -> None:
    nothing = Errors(loss=0.0, grad_norm=0.0, gradient=0.0, weights=0.0)
    assert not measured(FLOORS[floor]).beyond(nothing)


def test_every_legal_layout_of_up_to_8_ranks_is_enumerated_once() -> None:
    specs = list(legal_specs())
    assert len(specs) == len(set(specs)) == 313


def test_the_suite_covers_every_two_features_that_can_meet() -> None:
    def met(pairs: tuple[Pair, ...]) -> set[frozenset[tuple[str, object]]]:
        return {frozenset(two) for pair in pairs for two in itertools.combinations(features(pair), 2)}

    pool = tuple(candidates(tuple(FAMILY_TOYS), (1, 2, 3, 4)))
    assert not met(pool) - met(SUITE)
    assert len(covering(pool)) < 60 <= len(SUITE)


def test_both_stacks_run_every_family_and_every_two_choices_of_a_layout() -> None:
    pool = tuple(candidates(tuple(FAMILY_TOYS), (1, 2, 3, 4)))
    wanted, found = (set().union(*map(layout_and_family, pairs)) for pairs in (pool, BOTH_STACKS))
    assert found == wanted and set(BOTH_STACKS) < set(SUITE)
