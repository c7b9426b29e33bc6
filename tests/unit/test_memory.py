"""Taking turns with memory: storages come back as they were, under all views; what frees comes first."""

from typing import Any

import pytest
import torch

from mtrl.memory import Memory, Part, Shelf, bytes_in_use

GiB = 2**30


class Engine:
    """Notes what it is asked for; the one that sleeps needs a GPU."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def sleep(self) -> None:
        self.done.append("sleep")

    def wake(self, part: str) -> None:
        self.done.append(f"wake {part}")


class Noted(Shelf):
    """A shelf that notes its turns too."""

    def __init__(self, name: str, tensors: list[torch.Tensor], done: list[str]) -> None:
        super().__init__(lambda: tensors, keeps=name != "gradients")
        self.name, self.done = name, done

    def put_away(self) -> None:
        self.done.append(f"{self.name} away")
        super().put_away()

    def bring_back(self) -> None:
        self.done.append(f"{self.name} back")
        super().bring_back()


def parts(done: list[str]) -> tuple[dict[Part, Shelf], dict[str, torch.Tensor]]:
    names: tuple[Part, ...] = ("weights", "gradients", "optimizer")
    tensors = {name: torch.randn(1000) for name in names}
    return {name: Noted(name, [tensors[name]], done) for name in names}, tensors


def test_views_of_what_was_put_away_are_views_of_it_again() -> None:
    whole = torch.arange(24.0)
    view, transposed = whole[4:10], whole.view(4, 6).T
    shelf = Shelf(lambda: [whole, view])  # one storage, once
    expected = transposed.clone()
    for _ in range(2):
        shelf.put_away()
        assert whole.untyped_storage().nbytes() == 0
        shelf.bring_back()
        assert torch.equal(view, torch.arange(4.0, 10.0)) and torch.equal(transposed, expected)
    whole[5] = -1.0
    assert view[1] == -1.0 and transposed.max() == 23.0


def test_memory_is_given_back_while_away() -> None:
    shelf = Shelf(lambda: [big], keeps=False)
    big = torch.ones(GiB // 8)

    before = bytes_in_use()
    shelf.put_away()
    freed = before - bytes_in_use()
    shelf.bring_back()
    assert freed > 0.9 * big.nbytes and big.shape == (GiB // 8,)


def test_what_frees_comes_before_what_takes() -> None:
    done: list[str] = []
    shelves, tensors = parts(done)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    memory = Memory(shelves, Engine(done), "all")
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
