"""Transformer Engine's user buffers: memory that GPUs of a node share, in which tokens travel between tensor
parallel ranks while products run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mtrl.parallel.groups import ParallelGroups

from megatron.core.transformer.transformer_config import TransformerConfig


@contextmanager
def user_buffers(config: TransformerConfig, groups: ParallelGroups, *, row_length: int) -> Iterator[None]:
    """Hold them, for rows of ``row_length`` tokens and no other, while the model runs. Collective over WORLD.

    Transformer Engine keeps them for a process, so no two may be held at a time. They are given back when all
    ranks get to the end; where one fails, the others may wait for it in a kernel, and the end of their
    processes gives them back.
    """
    # Here, so that the module can be imported where there is none.
    from transformer_engine import pytorch as te

    tp, modes = groups.attn.tp, te.UserBufferQuantizationMode
    ranks = dist.get_process_group_ranks(tp)
    # It takes neither groups nor ranks: its domains are the world's ranks, cut into runs.
    assert ranks == list(range(ranks[0], ranks[0] + tp.size())) and ranks[0] % tp.size() == 0, ranks
    kinds = [modes.FP8] if config.fp8 else [modes.NONE]
    if config.fp8 and config.first_last_layers_bf16:
        kinds.append(modes.NONE)
    te.initialize_ub(
        shape=[row_length // groups.attn.cp.size(), config.hidden_size],
        tp_size=tp.size(),
        quantization_modes=kinds,
        dtype=config.params_dtype,
        # Left to itself it takes MPI where torch has it, which needs mpirun.
        bootstrap_backend="nccl" if torch.cuda.is_available() else "gloo",
    )
    yield
    te.destroy_ub()
