"""Taking turns with memory: storages come back as they were, under all views; what frees comes first."""

from typing import Any

import pytest
import torch

from mtrl.memory import HostCopy, Memory, Part, bytes_in_use

GiB = 2**30


class Engine:
    """Notes what it is asked for; the one that sleeps needs a GPU."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def sleep(self) -> None:
        self.done.append("sleep")

    def wake(self, part: str) -> None:
        self.done.append(f"wake {part}")


class Noted(HostCopy):
    """A copy that notes its turns too."""

    def __init__(self, name: str, tensors: list[torch.Tensor], done: list[str]) -> None:
        super().__init__(lambda: tensors, keeps=name != "gradients")
        self.name, self.done = name, done

    def offload(self) -> None:
        self.done.append(f"{self.name} away")
        super().offload()

    def onload(self) -> None:
        self.done.append(f"{self.name} back")
        super().onload()


def parts(done: list[str]) -> tuple[dict[Part, HostCopy], dict[str, torch.Tensor]]:
    names: tuple[Part, ...] = ("weights", "gradients", "optimizer")
    tensors = {name: torch.randn(1000) for name in names}
    return {name: Noted(name, [tensors[name]], done) for name in names}, tensors


def test_views_of_what_was_offload_are_views_of_it_again() -> None:
    whole = torch.arange(24.0)
    view, transposed = whole[4:10], whole.view(4, 6).T
    copy = HostCopy(lambda: [whole, view])  # one storage, once
    expected = transposed.clone()
    for _ in range(2):
        copy.offload()
        assert whole.untyped_storage().nbytes() == 0
        copy.onload()
        assert torch.equal(view, torch.arange(4.0, 10.0)) and torch.equal(transposed, expected)
    whole[5] = -1.0
    assert view[1] == -1.0 and transposed.max() == 23.0


def test_memory_is_given_back_while_away() -> None:
    copy = HostCopy(lambda: [big], keeps=False)
    big = torch.ones(GiB // 8)

    before = bytes_in_use()
    copy.offload()
    freed = before - bytes_in_use()
    copy.onload()
    assert freed > 0.9 * big.nbytes and big.shape == (GiB // 8,)


def test_what_frees_comes_before_what_takes() -> None:
    done: list[str] = []
    copies, tensors = parts(done)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    memory = Memory(copies, Engine(done), "all")
    for _ in range(2):
        done.clear()
        memory.to("training")
        memory.to("push")
        memory.filled()
        memory.to("sampling")
        memory.to("sampling")
        away = ["gradients away", "optimizer away", "wake weights", "weights away", "wake kv_cache"]
        back = ["sleep", "weights back", "optimizer back", "gradients back"]
        assert done in (["sleep", *away], [*back, *away])
    memory.to("training")
    assert torch.equal(tensors["weights"], kept["weights"])
    assert torch.equal(tensors["optimizer"], kept["optimizer"])
    assert tensors["gradients"].shape == (1000,)
    told = memory.report()
    assert next(each["what"] for each in told if each["stage"] == "training") == "engine sleeps"
    assert all(each["before"] > 0 and each["after"] > 0 for each in told)


def test_checking_a_push_needs_both_sides() -> None:
    done: list[str] = []
    memory = Memory(parts(done)[0], Engine(done), "all")
    for stage in ("training", "push", "check", "sampling"):
        memory.to(stage)  # type: ignore[arg-type]
    assert done[-2:] == ["wake kv_cache", "weights away"]


def test_an_engine_that_slept_is_empty_until_it_is_filled() -> None:
    memory = Memory(parts([])[0], Engine([]), "none")
    assert not memory.is_engine_empty
    memory.to("training")
    assert memory.is_engine_empty
    memory.to("push")
    assert memory.is_engine_empty
    memory.filled()
    assert not memory.is_engine_empty


@pytest.mark.parametrize("stage", ["training", "push", "sampling"])
def test_nothing_moves_unless_asked_for(stage: Any) -> None:
    done: list[str] = []
    memory = Memory(parts(done)[0], None, "none")
    memory.to(stage)
    assert done == [] and memory.report() == [] and not memory.is_engine_empty


def test_with_the_optimizer_alone_weights_stay() -> None:
    done: list[str] = []
    memory = Memory(parts(done)[0], None, "optimizer")
    for stage in ("push", "sampling", "training"):
        memory.to(stage)  # type: ignore[arg-type]
    assert done == ["gradients away", "optimizer away", "optimizer back", "gradients back"]


class Pushes:
    """Notes the versions it is asked to push; the second time it fails, if it is to."""

    def __init__(self, *, fails: bool = False) -> None:
        self.versions: list[int] = []
        self.fails = fails

    def run(self, *, policy_version: int) -> int:
        self.versions.append(policy_version)
        if self.fails and len(self.versions) == 2:
            raise RuntimeError("a push that failed")
        return 100


def sampling(pushes: Pushes, *, sleeps: bool) -> Any:
    from mtrl.session import Sampling

    memory = Memory(parts([])[0], Engine([]) if sleeps else None, "all")
    engine: Any = None
    push: Any = pushes
    return Sampling(engine=engine, push=push, memory=memory)


def test_an_engine_that_slept_for_a_checkpoint_gets_the_same_weights_again() -> None:
    pushes = Pushes()
    side = sampling(pushes, sleeps=True)
    assert side.take_over_weights() == 100
    side.turn_to("sampling")
    side.turn_to("sampling")
    assert pushes.versions == [1]
    side.turn_to("training")  # a checkpoint
    side.turn_to("sampling")
    assert pushes.versions == [1, 1] and side.policy_version == 1
    assert side.take_over_weights() == 200  # what was pushed again is counted
    assert pushes.versions == [1, 1, 2] and side.take_over_weights() == 100


def test_an_engine_that_stays_awake_keeps_its_weights() -> None:
    pushes = Pushes()
    side = sampling(pushes, sleeps=False)
    side.take_over_weights()
    for stage in ("sampling", "training", "sampling"):
        side.turn_to(stage)
    assert pushes.versions == [1]


def test_an_engine_whose_second_push_failed_is_still_empty() -> None:
    side = sampling(Pushes(fails=True), sleeps=True)
    side.take_over_weights()
    side.turn_to("training")
    with pytest.raises(RuntimeError, match="a push that failed"):
        side.turn_to("sampling")
    assert side.memory.is_engine_empty


def test_an_engine_wakes_before_it_is_shut_down() -> None:
    done: list[str] = []
    memory = Memory(parts([])[0], Engine(done), "none")
    memory.to("training")
    memory.close()
    assert done == ["sleep", "wake weights", "wake kv_cache"]


def test_copies_of_what_is_gone_are_dropped() -> None:
    held = [torch.ones(1000)]
    copy = HostCopy(lambda: held)
    for _ in range(3):
        assert copy.offload() == 4000
        assert copy.onload() == 4000
        held[0] = torch.ones(1000)  # as a new phase makes a new optimizer
    assert len(copy._host) == 1
