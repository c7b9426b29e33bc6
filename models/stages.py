"""Which layers each pipeline stage holds. Pure integers.

Virtual stage ``v`` of the model (there are ``pp * num_chunks`` of them, in model order) lives on
pipeline rank ``v % pp`` as its chunk ``v // pp``: Megatron's interleaved placement.
"""

from dataclasses import dataclass

from mtrl.parallel.errors import LayoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Layers of every virtual stage, in model order."""

    pp: int
    layers: tuple[tuple[int, ...], ...]

    @classmethod
    def balanced(cls, num_layers: int, pp: int, num_chunks: int = 1) -> "Stages":
        """Split ``num_layers`` as evenly as they go; when they do not divide, the first and the last
        stage, which also hold the embedding and the output layer, are the last to get one more.

        >>> Stages.balanced(7, pp=4).layers
        ((0,), (1, 2), (3, 4), (5, 6))

        Raises:
            LayoutError: there are fewer layers than stages.
        """
        num_stages = pp * num_chunks
        if num_layers < num_stages:
            raise LayoutError(
                f"{num_layers} layers cannot fill {num_stages} pipeline stages "
                f"(p{pp} x {num_chunks} chunks); use p{max(1, num_layers // num_chunks)} or less"
            )
        base, extra = divmod(num_layers, num_stages)
        by_preference = [*range(1, num_stages - 1), num_stages - 1, 0]
        longer = set(by_preference[:extra]) if num_stages > 1 else set()
        layers, start = [], 0
        for stage in range(num_stages):
            size = base + (stage in longer)
            layers.append(tuple(range(start, start + size)))
            start += size
        return cls(pp=pp, layers=tuple(layers))

    @property
    def num_chunks(self) -> int:
        """Model chunks a pipeline rank holds (the virtual pipeline size)."""
        return len(self.layers) // self.pp

    @property
    def is_even(self) -> bool:
        """Whether every stage has the same number of layers."""
        return len({len(stage) for stage in self.layers}) == 1

    def chunk_layers(self, pp_rank: int, chunk: int) -> tuple[int, ...]:
        """The layers of one chunk of a pipeline rank, in order."""
        return self.layers[chunk * self.pp + pp_rank]

    def is_first(self, pp_rank: int, chunk: int) -> bool:
        """Whether this chunk holds the embedding."""
        return pp_rank == 0 and chunk == 0

    def is_last(self, pp_rank: int, chunk: int) -> bool:
        """Whether this chunk holds the final norm and the output layer."""
        return pp_rank == self.pp - 1 and chunk == self.num_chunks - 1
