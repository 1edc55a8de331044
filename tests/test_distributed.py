"""Tensor parallelism and FSDP2 over two gloo processes, with torch's own engines."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from bounds import expected_and_bound
from support import Mlp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import int8fx
from int8fx import Int8Weight
from int8fx.kernels.quantize import quantize_weight

K, N, RANKS = 64, 96, 2


def built():
    torch.manual_seed(0)
    return Mlp(K, N).requires_grad_(False)


def batch():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def tensor_parallel(rank, mesh):
    """Each process quantises its shard: of rows the same values, of columns with finer scales."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = int8fx.quantize_(parallelize_module(built(), mesh, plan))
    up, down = model.up.weight, model.down.weight
    assert isinstance(up, DTensor) and type(up.to_local()) is Int8Weight
    assert up.shape == (N, K) and up.to_local().shape == (N // RANKS, K)
    whole = quantize_weight(built().up.weight)[0]
    assert torch.equal(up.to_local().w_int8, whole.chunk(RANKS)[rank])
    part = built().down.weight.chunk(RANKS, 1)[rank]
    assert torch.equal(down.to_local().w_int8, quantize_weight(part)[0])
    check(model)
    compiled = torch.compile(model, backend="llmint8")
    torch.testing.assert_close(compiled(batch()), model(batch()))


def tensor_parallel_saved(rank, mesh):
    """A whole state_dict gathers the float values that the shards stand for."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = int8fx.quantize_(parallelize_module(built(), mesh, plan))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    assert torch.equal(model.up.weight.full_tensor(), int8fx.quantize_(built()).up.weight.dequantize())
    if rank == 0:
        assert set(state) == {"up.weight", "up.bias", "down.weight"}
        assert torch.equal(state["up.weight"], int8fx.quantize_(built()).up.weight.dequantize())
        parts = built().down.weight.chunk(RANKS, 1)
        quantized = [Int8Weight.from_float(p, threshold=6.0, decomposition="column") for p in parts]
        assert torch.equal(state["down.weight"], torch.cat([q.dequantize() for q in quantized], 1))


def tp_plan_of_transformers(rank, mesh):
    """from_pretrained: each process reads its shard of the float file, and quantises it."""
    from transformers import DistributedConfig, LlamaForCausalLM

    from int8fx.integrations.transformers import Int8FxConfig

    path = os.environ["LLAMA"]
    options = {"quantization_config": Int8FxConfig()}
    parallel = {"distributed_config": DistributedConfig(tp_plan="auto")}
    floats = LlamaForCausalLM.from_pretrained(path).eval()
    alone = LlamaForCausalLM.from_pretrained(path, **options).eval()
    model = LlamaForCausalLM.from_pretrained(path, **options, **parallel).eval()
    up, down = (getattr(model.model.layers[0].mlp, name).weight for name in ("up_proj", "down_proj"))
    assert isinstance(up, DTensor) and type(up.to_local()) is Int8Weight
    whole = alone.model.layers[0].mlp.up_proj.weight
    assert torch.equal(up.to_local().w_int8, whole.w_int8.chunk(RANKS)[rank])
    part = floats.model.layers[0].mlp.down_proj.weight.chunk(RANKS, 1)[rank]
    assert torch.equal(down.to_local().w_int8, quantize_weight(part)[0])
    with torch.no_grad():
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
        check_mlp(rank, model.model.layers[0].mlp, floats.model.layers[0].mlp, x)
        tokens = torch.arange(8).unsqueeze(0)
        expected, y = floats(tokens).logits, model(tokens).logits
        # Rounding to int8 in every linear; a shard too few or a sum too many is an error of its size.
        assert (y - expected).norm() < 0.05 * expected.norm()
    if rank == 0:
        alone.save_pretrained(path + "-int8")
    dist.barrier()
    with pytest.raises(ValueError, match=r"int8 files cannot be read in shards.*the float checkpoint"):
        LlamaForCausalLM.from_pretrained(path + "-int8", **parallel)


def check_mlp(rank, mlp, floats, x):
    """A Llama MLP to the scheme's bound, on what each of its layers really got."""
    for name in ("gate_proj", "up_proj"):
        y, weight = getattr(mlp, name)(x), getattr(floats, name).weight.chunk(RANKS)[rank]
        expected, bound = expected_and_bound(x, weight, None, 6.0, "column")
        assert ((y.double() - expected).abs() <= bound).all()
    hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    gathered = [torch.empty_like(hidden) for _ in range(RANKS)]
    dist.all_gather(gathered, hidden.contiguous())
    whole, weight = torch.cat(gathered, -1), floats.down_proj.weight
    expected, bound = expected_and_bound(whole, weight, None, 6.0, "column")
    assert ((mlp.down_proj(hidden).double() - expected).abs() <= bound).all()


def tensor_parallel_of_floats(rank, mesh):
    """A float model in shards is left in float by the backend, and the reason says so."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(built(), mesh, plan)
    with int8fx.collect_reports() as reports:
        y = torch.compile(model, backend="llmint8")(batch())
    torch.testing.assert_close(y, built()(batch()), rtol=1e-4, atol=1e-4)
    reasons = {decision.reason for report in reports for decision in report.decisions}
    assert reasons == {"weight is a DTensor, no plain tensor"}


def fsdp2(rank, mesh):
    """int8 weights are sharded as they are and gathered bit for bit."""
    alone = int8fx.quantize_(built())
    model = int8fx.quantize_(built())
    fully_shard(model, mesh=mesh)
    shard = model.up.weight.to_local()
    assert type(shard) is Int8Weight and shard.shape == (N // RANKS, K)
    for _ in range(2):
        assert torch.equal(model(batch()), alone(batch()))


def check(model):
    """The whole model to the scheme's bound: layer by layer, on what the layer really got."""
    x, floats = batch(), built()
    hidden = model.up(x)
    hidden = hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
    gathered = [torch.empty_like(hidden) for _ in range(RANKS)]
    dist.all_gather(gathered, hidden.contiguous())
    hidden = torch.cat(gathered, -1)
    expected, bound = expected_and_bound(x, floats.up.weight, floats.up.bias, 6.0, "column")
    assert ((hidden.double() - expected).abs() <= bound).all()
    y = model(x).double()
    expected, bound = expected_and_bound(torch.relu(hidden), floats.down.weight, None, 6.0, "column")
    assert ((y - expected).abs() <= bound).all()


CASES = [
    tensor_parallel,
    tensor_parallel_saved,
    tensor_parallel_of_floats,
    tp_plan_of_transformers,
    fsdp2,
]


def save_llama(path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shapes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 100}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **shapes)
    LlamaForCausalLM(config).save_pretrained(path)


def _run(rank, path, results):
    # What torchrun would set, and where the model is.
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LLAMA": path.with_name("llama")}
    os.environ |= {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for case in CASES:
        try:
            case(rank, mesh)
            results.put((case.__name__, rank, ""))
        except BaseException:
            import traceback

            results.put((case.__name__, rank, traceback.format_exc()))
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each case came to on each rank; one pair of processes runs them all."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    path = tmp_path_factory.mktemp("rendezvous") / "file"
    save_llama(path.with_name("llama"))
    processes = [context.Process(target=_run, args=(rank, path, results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    found = [results.get() for _ in range(RANKS * len(CASES))]
    for process in processes:
        process.join(60)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_over_two_processes(outcomes, case):
    failures = [trace for name, _, trace in outcomes if name == case.__name__ and trace]
    assert not failures, failures[0]
    assert sum(name == case.__name__ for name, _, _ in outcomes) == RANKS
