"""Gradients of a mixture of experts are the same under every layout, those of one process.

Covers Megatron's own model, DDP, optimizers and gradient norm with attention and experts on different groups.
Leaves out context parallelism and mtrl's own layers.
"""

import importlib
import zlib
from typing import Any

import pytest
import torch

from mtrl.parallel import megatron_mends
from tests.distributed.world import World

LAYOUTS = [
    ("megatron:t2", 2),
    ("megatron:(attn:d2|ffn:e2)", 2),
    ("megatron:(attn:t2|ffn:e2)", 2),
    ("megatron:(attn:d2|ffn:t2)", 2),
    ("megatron:d2t2", 4),
    ("megatron:(attn:d2t2|ffn:t2e2)", 4),
    ("megatron:p2", 2),
    ("megatron:(attn:p2t2|ffn:p2e2)", 4),
]
# With ep 1 and etp != tp: where Megatron-Core before 0.19 reduces expert gradients over the wrong group.
ONLY_ETP_DIFFERS = ["megatron:t2", "megatron:(attn:d2|ffn:t2)"]
VOCAB_SIZE, HIDDEN_SIZE, SEQUENCE_LENGTH, NUM_SEQUENCES, NUM_EXPERTS = 64, 32, 16, 8, 4
NUM_STEPS, NUM_LAYERS = 2, 2


def is_needed(mend: str) -> bool:
    return next(each for each in megatron_mends.MENDS if each.name == mend).is_needed


class TorchRMSNorm(torch.nn.RMSNorm):
    """What Megatron builds as a norm; its own wrapper refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def build(groups: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    attn, ffn = groups.layout.spec.attn, groups.layout.spec.ffn
    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=48,
        moe_ffn_hidden_size=48,
        num_moe_experts=NUM_EXPERTS,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp32",
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=attn.tp,
        sequence_parallel=attn.tp > 1,
        expert_model_parallel_size=ffn.ep,
        expert_tensor_parallel_size=ffn.etp,
        pipeline_model_parallel_size=attn.pp,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        variable_seq_lengths=False,
    )
    layer = get_gpt_layer_local_spec(num_experts=NUM_EXPERTS, moe_grouped_gemm=False, normalization="RMSNorm")
    layer.submodules.input_layernorm = TorchRMSNorm
    layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    layers_here = NUM_LAYERS // attn.pp
    block = TransformerBlockSubmodules(layer_specs=[layer] * layers_here, layer_norm=TorchRMSNorm)
    model = GPTModel(
        config,
        block,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQUENCE_LENGTH,
        pre_process=groups.coordinates.pp == 0,
        post_process=groups.coordinates.pp == attn.pp - 1,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pg_collection=groups.collection,
    )
    fill(model, groups)
    return model


def pieces(model: Any, groups: Any) -> dict[str, tuple[Any, int, int, int]]:
    """By global name: a parameter, the dim it is cut along, which part this rank has, of how many."""
    found = {}
    for name, parameter in model.named_parameters():
        is_expert = ".local_experts." in name
        if name.startswith("decoder.layers."):
            _, _, local_layer, rest = name.split(".", 3)
            layers_before = groups.coordinates.pp * NUM_LAYERS // groups.attn.pp.size()
            name = f"decoder.layers.{layers_before + int(local_layer)}.{rest}"
        if is_expert:
            head, _, tail = name.partition(".local_experts.")
            local, _, rest = tail.partition(".")
            num_local = NUM_EXPERTS // groups.ffn.ep.size()
            name = f"{head}.experts.{groups.ffn.ep.rank() * num_local + int(local)}.{rest}"
        group = groups.ffn.etp if is_expert else groups.attn.tp
        is_cut = getattr(parameter, "partition_dim", -1) >= 0
        dim = parameter.partition_dim if is_cut else 0
        found[name] = (parameter, dim, group.rank() if is_cut else 0, group.size() if is_cut else 1)
    return found


def fill(model: Any, groups: Any) -> None:
    """Give every parameter its part of a tensor that depends on its global name only."""
    for name, (parameter, dim, index, parts) in pieces(model, groups).items():
        shape = list(parameter.shape)
        shape[dim] *= parts
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)
        parameter.data.copy_(full.chunk(parts, dim)[index])


def my_tokens(groups: Any) -> torch.Tensor:
    """This rank's share [sequences, positions + 1] of one global batch."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(VOCAB_SIZE, (NUM_SEQUENCES, SEQUENCE_LENGTH + 1), generator=generator)
    return tokens.chunk(groups.attn.dp.size())[groups.attn.dp.rank()]


def forward_step(batches: Any, model: Any) -> Any:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE_LENGTH).expand(tokens.shape[0], -1)
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return losses, lambda output: (
        output.sum(),
        torch.tensor(output.numel()),
        {"loss": output.sum().detach()},
    )


def build_experts_unmarked() -> None:
    """From here on, experts are as Transformer Engine's grouped ones: nothing says that etp shards them."""
    experts = importlib.import_module("megatron.core.transformer.moe.experts").SequentialMLP
    original = experts.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.tensor_model_parallel = False

    experts.__init__ = initialise


def prepare(spec: str, distributed_optimizer: bool) -> tuple[Any, Any, Any]:
    """The groups, the model under DDP and its optimizer."""
    from mtrl.parallel import groups as parallel_groups
    from mtrl.parallel.layout import RankLayout
    from mtrl.parallel.spec import parse_training_spec

    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    groups = parallel_groups.create(RankLayout.from_spec(parse_training_spec(spec)))
    parallel_groups.seed_everything(1, groups)
    model = build(groups)
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
    ddp = DistributedDataParallel(model.config, ddp_config, model, pg_collection=groups.collection)
    # A large epsilon: Adam's first step is otherwise the gradient's sign, which makes last bits large.
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        adam_eps=1e-2,
        clip_grad=1.0,
        use_distributed_optimizer=distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(
        config, [ddp], use_gloo_process_groups=False, pg_collection=groups.collection
    )
    return groups, ddp, optimizer


def accumulate(groups: Any, ddp: Any) -> None:
    """Gradients of the global batch in two microbatches, by Megatron's schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    microbatches = my_tokens(groups).chunk(2)
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[ddp],
        num_microbatches=len(microbatches),
        seq_length=SEQUENCE_LENGTH,
        micro_batch_size=microbatches[0].shape[0],
        forward_only=False,
        p2p_communicator=P2PCommunicator(pp_group=groups.attn.pp, config=ddp.module.config),
        pg_collection=groups.collection,
    )


def train(spec: str, distributed_optimizer: bool, without: list[str], unmarked: bool) -> dict[str, Any]:
    """Two steps; the first step's gradients (not of the distributed optimizer) and every gradient norm."""
    for name in without:
        megatron_mends.undo(name)
    if unmarked:
        build_experts_unmarked()
    groups, ddp, optimizer = prepare(spec, distributed_optimizer)
    gradients, norms = {}, []
    for step in range(NUM_STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        accumulate(groups, ddp)
        if step == 0 and not distributed_optimizer:
            gradients = {
                name: {"gradient": parameter.main_grad.clone(), "dim": dim, "index": index, "parts": parts}
                for name, (parameter, dim, index, parts) in pieces(ddp.module, groups).items()
            }
        norms.append(float(optimizer.step()[1]))
    return {"gradients": gradients, "norms": norms}


@pytest.fixture(scope="module")
def one_process(world: World) -> dict[str, Any]:
    found: dict[str, Any] = run(world, "megatron:d1", 1)[0]
    return found


def run(
    world: World,
    spec: str,
    size: int,
    *,
    zero: bool = False,
    without: tuple[str, ...] = (),
    unmarked: bool = False,
) -> list[Any]:
    arguments = {
        "spec": spec,
        "distributed_optimizer": zero,
        "without": list(without),
        "unmarked": unmarked,
    }
    return world.run(train, arguments, size=size)


def largest_gradient_error(found: list[Any], reference: dict[str, Any]) -> float:
    """Of all parameters and ranks, the largest difference relative to the parameter's largest gradient."""
    errors = [0.0]
    for rank in found:
        for name, piece in rank["gradients"].items():
            full = reference["gradients"][name]["gradient"]
            expected = full.chunk(piece["parts"], piece["dim"])[piece["index"]]
            errors.append(float((piece["gradient"] - expected).abs().max() / full.abs().max()))
    return max(errors)


@pytest.mark.parametrize(("spec", "size"), LAYOUTS)
def test_gradients_and_their_norm_are_those_of_one_process(
    world: World, one_process: dict[str, Any], spec: str, size: int
) -> None:
    found = run(world, spec, size)
    assert {name for rank in found for name in rank["gradients"]} == set(one_process["gradients"])
    # float32 sums in another order: a few ulp of the largest element.
    assert largest_gradient_error(found, one_process) < 1e-5
    for rank in found:
        assert rank["norms"] == pytest.approx(one_process["norms"], rel=1e-6)


@pytest.mark.parametrize(("spec", "size"), LAYOUTS)
def test_the_distributed_optimizer_finds_the_same_norm(
    world: World, one_process: dict[str, Any], spec: str, size: int
) -> None:
    for rank in run(world, spec, size, zero=True):
        assert rank["norms"] == pytest.approx(one_process["norms"], rel=1e-6)


@pytest.mark.parametrize("spec", ONLY_ETP_DIFFERS)
def test_without_the_mend_exactly_its_versions_reduce_expert_gradients_wrongly(
    world: World, one_process: dict[str, Any], spec: str
) -> None:
    error = largest_gradient_error(run(world, spec, 2, without=("expert_gradients",)), one_process)
    if is_needed("expert_gradients"):
        assert error > 0.1
    else:
        assert error < 1e-5


# Experts that etp shards and that do not say so exist only in the versions whose mend marks them.
UNMARKED = ["megatron:(attn:t2|ffn:e2)"] + ["megatron:(attn:d2|ffn:t2)"] * is_needed("expert_shards")


@pytest.mark.parametrize("zero", [False, True], ids=["plain", "distributed optimizer"])
@pytest.mark.parametrize("spec", UNMARKED)
def test_experts_that_do_not_say_they_are_sharded_are_all_in_the_gradient_norm(
    world: World, one_process: dict[str, Any], spec: str, zero: bool
) -> None:
    for rank in run(world, spec, 2, zero=zero, unmarked=True):
        assert rank["norms"] == pytest.approx(one_process["norms"], rel=1e-6)


def test_without_the_mend_exactly_its_versions_leave_out_experts_of_other_ranks(
    world: World, one_process: dict[str, Any]
) -> None:
    without = ("expert_gradient_norm",)
    norm = run(world, "megatron:(attn:t2|ffn:e2)", 2, unmarked=True, without=without)[0]["norms"][0]
    if is_needed("expert_gradient_norm"):
        assert norm < 0.99 * one_process["norms"][0]
    else:
        assert norm == pytest.approx(one_process["norms"][0], rel=1e-6)


def test_without_the_mend_unmarked_shards_of_experts_are_left_out(
    world: World, one_process: dict[str, Any]
) -> None:
    without = ("expert_shards",)
    norm = run(world, "megatron:(attn:d2|ffn:t2)", 2, unmarked=True, without=without)[0]["norms"][0]
    assert norm < 0.99 * one_process["norms"][0]
