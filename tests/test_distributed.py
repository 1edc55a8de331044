"""Tensor parallelism and FSDP2 over two gloo processes, with torch's own engines."""

import copy
import os
import tempfile
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import int8fx
from int8fx import Int8Weight
from int8fx.errors import CalibrationError, CheckpointError
from int8fx.kernels.ops.quantize_reference import quantize_weight
from int8fx.testing.bounds import expected_and_bound
from int8fx.testing.four_bits import W4A16
from int8fx.testing.support import Mlp
from int8fx.weights import sharding

K, N, RANKS = 64, 96, 2


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def built(seed=0, rows=N):
    torch.manual_seed(seed)
    return Mlp(K, rows).requires_grad_(False)


def in_tensor_parallel(mesh, seed=0):
    return int8fx.quantize_(parallelize_module(built(seed), mesh, PLAN))


def in_fsdp2(mesh, seed=0, rows=N, **options):
    """Each layer by itself, so that its weights come and go with every call of it."""
    model = int8fx.quantize_(built(seed, rows), only=["*"])  # of few columns, too
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def built_int8():
    return int8fx.quantize_(built())


def locals_of(model):
    return [model.up.weight.to_local(), model.down.weight.to_local()]


def batch():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def tensor_parallel(rank, mesh):
    """Each process quantises its shard: of rows the same values, of columns with finer scales."""
    model = in_tensor_parallel(mesh)
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


def rotated_rows(rank, mesh):
    """Rows of a rotated weight, with and without static columns: the bits of one process alone."""
    x = batch() * torch.where(torch.arange(K) == 5, 50.0, 1.0)
    for columns in ([], [5, 40]):
        options = {"scheme": "int8-rotated", "columns": columns, "skip": ["down"]}
        alone = int8fx.quantize_(built(), **options)
        model = int8fx.quantize_(parallelize_module(built(), mesh, PLAN), **options)
        part = model.up.weight.to_local()
        assert type(part) is Int8Weight and part.options["columns"] == tuple(columns)
        y = model.up(x)
        y = y.to_local() if isinstance(y, DTensor) else y
        assert torch.equal(y, alone.up(x).chunk(RANKS, 1)[rank])


def fsdp2_rotated(rank, mesh):
    """Rows of each part go to every process, the static columns' weights among them."""
    for columns in ([], [5, 40]):
        options = {"scheme": "int8-rotated", "columns": columns, "only": ["up"]}
        model, alone = int8fx.quantize_(built(), **options), int8fx.quantize_(built(), **options)
        fully_shard(model.up, mesh=mesh)
        assert model.up.weight.to_local().shape == (N // RANKS, K)
        assert torch.equal(model.up(batch()), alone.up(batch()))


def columns_of_columns(rank, mesh):
    """A calibration names columns of all: a weight of which each process holds some is refused."""
    model = parallelize_module(built(), mesh, PLAN)
    calibration = int8fx.calibrate(built(), [batch()])
    with pytest.raises(CalibrationError, match=r"down: each process holds some of its 96 columns"):
        int8fx.quantize_(model, scheme="int8-rotated", calibration=calibration)
    assert type(model.up.weight.to_local()) is not Int8Weight


def tensor_parallel_saved(rank, mesh):
    """A whole state_dict gathers the float values that the shards stand for."""
    model = in_tensor_parallel(mesh)
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
        greedy = {"max_new_tokens": 3, "do_sample": False}
        for cache in ("dynamic", "static"):
            generated = model.generate(tokens, **greedy, cache_implementation=cache)
            assert torch.equal(generated, alone.generate(tokens, **greedy))
    model.save_pretrained(path + "-of-shards")
    if rank == 0:
        check_saved_by_shards(path + "-of-shards", alone, floats)
        alone.save_pretrained(path + "-int8")
    dist.barrier()
    with pytest.raises(ValueError, match=r"int8 files cannot be read in shards.*the float checkpoint"):
        LlamaForCausalLM.from_pretrained(path + "-int8", **parallel)


def check_saved_by_shards(path, alone, floats):
    """Files of int8 weights: rows as they are alone, columns quantised once more."""
    from transformers import LlamaForCausalLM

    read = LlamaForCausalLM.from_pretrained(path).state_dict()
    for name, tensor in alone.state_dict().items():
        assert read[name].dtype == tensor.dtype
        if "o_proj" not in name and "down_proj" not in name:
            assert torch.equal(read[name], tensor), name
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        name = f"model.layers.0.{name}"
        shards = floats.get_parameter(name).chunk(RANKS, 1)
        w_hat = torch.cat([q.float() * s.unsqueeze(1) for q, s in map(quantize_weight, shards)], 1)
        w_int8, w_scale = quantize_weight(w_hat)
        assert torch.equal(read[name], w_int8.unsqueeze(0))
        assert torch.equal(read[f"{name}_scale"], w_scale)


def tp_plan_compiled(rank, mesh):
    """Shards are the operators' own affair, which the backend leaves as they are: int8 all the same."""
    from transformers import DistributedConfig, LlamaForCausalLM

    from int8fx.integrations.transformers import Int8FxConfig

    parallel = {"distributed_config": DistributedConfig(tp_plan="auto")}
    quantised = {"quantization_config": Int8FxConfig()}
    model = LlamaForCausalLM.from_pretrained(os.environ["LLAMA"], **quantised, **parallel).eval()
    tokens, greedy = torch.arange(8).unsqueeze(0), {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(tokens, **greedy)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="llmint8")
    with int8fx.collect_reports() as reports:
        generated = model.generate(tokens, **greedy, cache_implementation="static")
    assert reports and torch.equal(generated, expected)
    assert type(model.model.layers[0].mlp.up_proj.weight.to_local()) is Int8Weight


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
    model = parallelize_module(built(), mesh, PLAN)
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


def fsdp2_by_layers(rank, mesh):
    """What is gathered is freed after each layer, and gathered anew into the same memory; parts may be
    of different length, or columns, or none at all."""

    def columns(parameter):
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % RANKS == 0 else None

    for rows in (N, N + 1, 1):
        for options in ({}, {"shard_placement_fn": columns}):
            alone = int8fx.quantize_(built(rows=rows), only=["*"])
            model = in_fsdp2(mesh, rows=rows, **options)
            assert [type(part) for part in locals_of(model)] == [Int8Weight, Int8Weight]
            for _ in range(2):
                assert torch.equal(model(batch()), alone(batch()))


def fsdp2_of_a_conv1d(rank, mesh):
    from transformers.pytorch_utils import Conv1D

    for width in (K, K + 1):
        torch.manual_seed(0)
        model = int8fx.quantize_(nn.Sequential(Conv1D(N, width)).requires_grad_(False))
        alone, x = copy.deepcopy(model), torch.randn(5, width)
        for module in (model[0], model):
            fully_shard(module, mesh=mesh)
        assert type(model[0].weight.to_local()) is Int8Weight
        for _ in range(2):
            assert torch.equal(model(x), alone(x))


def fsdp2_without_room_for_scales(rank, mesh):
    narrow = int8fx.quantize_(nn.Sequential(nn.Linear(3, 5)).requires_grad_(False), only=["*"])
    fully_shard(narrow, mesh=mesh)
    message = r"weight of shape \[5, 3\] into parts of 3 along dimension 0: 3 columns leave no room"
    with pytest.raises(RuntimeError, match=message):
        narrow(torch.randn(2, 3))


def fsdp2_quantised_in_shards(rank, mesh):
    """Rows are quantised as they are alone. Columns have scales of their own in each process."""
    alone = int8fx.quantize_(built())
    model = built()
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh)
    int8fx.quantize_(model)
    assert [type(part) for part in locals_of(model)] == [Int8Weight, Int8Weight]
    for _ in range(2):
        assert torch.equal(model(batch()), alone(batch()))
    with pytest.raises(ValueError, match="quantize_: FSDP2 has this model in use already"):
        int8fx.quantize_(model)
    with pytest.raises(ValueError, match="dequantize_: FSDP2 has this model in use already"):
        int8fx.dequantize_(model)
    for rows in (N, N + 1):
        floats = int8fx.dequantize_(in_fsdp2(mesh, rows=rows))
        torch.testing.assert_close(
            floats(batch()), int8fx.dequantize_(int8fx.quantize_(built(rows=rows)))(batch())
        )
    model = fully_shard(built(), mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    int8fx.quantize_(model)
    with pytest.raises(RuntimeError, match=r"scales of its own.*quantize_\(model\) comes before fully"):
        model(batch())


def checkpoints_of_shards(rank, mesh):
    """torch.distributed.checkpoint writes the shards as they are, and reads them bit for bit."""
    for build in (in_tensor_parallel, in_fsdp2, lambda mesh, seed=0: in_fsdp2(mesh, seed, N + 1)):
        with shared_directory() as path:
            model, read = build(mesh), build(mesh, seed=5)
            checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
            state = {"model": get_model_state_dict(read)}
            checkpoint.load(state, checkpoint_id=path)
            set_model_state_dict(read, state["model"])
            for part, expected in zip(locals_of(read), locals_of(model), strict=True):
                assert type(part) is Int8Weight and torch.equal(part, expected)
            assert torch.equal(read(batch()), model(batch()))


def checkpoints_of_other_shards(rank, mesh):
    """Rows go anywhere; columns with scales of their own only where they came from."""
    whole = int8fx.quantize_(built())
    with shared_directory() as path:
        checkpoint.save(in_fsdp2(mesh).state_dict(), checkpoint_id=path)
        read = in_tensor_parallel(mesh, seed=5)
        load(read, path)
        up, down = locals_of(read)
        assert torch.equal(up.w_int8, whole.up.weight.w_int8.chunk(RANKS)[rank])
        assert torch.equal(down.w_int8, whole.down.weight.w_int8.chunk(RANKS, 1)[rank])
        floats = built(5)
        load(floats, path)
        assert torch.equal(floats.up.weight, whole.up.weight.dequantize())
    with shared_directory() as path:
        checkpoint.save(in_tensor_parallel(mesh).state_dict(), checkpoint_id=path)
        message = r"columns \d+ to \d+ of an int8 weight of 32 rows cannot take values with other"
        with pytest.raises(checkpoint.CheckpointException, match=message):
            load(in_fsdp2(mesh, seed=5), path)


def load(model, path):
    state = model.state_dict()
    checkpoint.load(state, checkpoint_id=path)
    model.load_state_dict(state)


def whole_checkpoints_into_shards(rank, mesh):
    """Floats are quantised, shard by shard; int8 values are refused, and nothing changes."""
    whole = StateDictOptions(full_state_dict=True)
    for build in (in_tensor_parallel, in_fsdp2):
        read, expected = build(mesh, seed=5), build(mesh)
        before = [part.clone() for part in locals_of(read)]
        state = int8fx.quantize_(built()).state_dict()
        message = "up.weight: torch.int8 in the checkpoint.*in int8 shards: load whole weights before"
        with pytest.raises(CheckpointError, match=message):
            read.load_state_dict(state)
        with pytest.raises(CheckpointError, match=message):
            set_model_state_dict(read, state, options=whole)
        for part, unchanged in zip(locals_of(read), before, strict=True):
            assert torch.equal(part, unchanged)
        set_model_state_dict(read, built().state_dict(), options=whole)
        for part, wanted in zip(locals_of(read), locals_of(expected), strict=True):
            assert torch.equal(part, wanted)


class shared_directory:
    """A temporary directory that all ranks see: the first one's."""

    def __enter__(self):
        self.own = tempfile.TemporaryDirectory()
        names = [self.own.name]
        dist.broadcast_object_list(names)
        return names[0]

    def __exit__(self, *error):
        dist.barrier() if error[0] is None else None
        self.own.cleanup()


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


def every_scheme():
    """Of the table, and of another package."""
    int8fx.SCHEMES[W4A16.name] = W4A16
    try:
        yield from ({"scheme": name} for name in int8fx.SCHEMES)
    finally:
        del int8fx.SCHEMES[W4A16.name]


def tensor_parallel_in_every_scheme(rank, mesh):
    """Each process quantises its rows or columns; a checkpoint of the shards comes back bit for bit."""
    for options in every_scheme():
        model = int8fx.quantize_(parallelize_module(built(), mesh, PLAN), **options)
        up, down = locals_of(model)
        rows = built().up.weight.chunk(RANKS)[rank]
        columns = built().down.weight.chunk(RANKS, 1)[rank].contiguous()
        assert torch.equal(up, Int8Weight.from_float(rows, **options))
        assert torch.equal(down, Int8Weight.from_float(columns, **options))
        exact = built()(batch())
        assert (model(batch()) - exact).norm() < 0.15 * exact.norm()
        whole = sharding.whole(model.up.weight)
        assert torch.equal(whole.dequantize(), model.up.weight.full_tensor())
        with shared_directory() as path:
            read = int8fx.quantize_(parallelize_module(built(5), mesh, PLAN), **options)
            checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
            state = {"model": get_model_state_dict(read)}
            checkpoint.load(state, checkpoint_id=path)
            set_model_state_dict(read, state["model"])
            assert all(map(torch.equal, locals_of(read), locals_of(model)))
            assert torch.equal(read(batch()), model(batch()))


def fsdp2_in_every_scheme(rank, mesh):
    """Weights are cut into equal rows as they are, and gathered bit for bit."""
    for options in every_scheme():
        alone, model = (int8fx.quantize_(built(), **options) for _ in range(2))
        for module in (model.up, model.down, model):
            fully_shard(module, mesh=mesh)
        assert [type(part) for part in locals_of(model)] == [Int8Weight, Int8Weight]
        for _ in range(2):
            assert torch.equal(model(batch()), alone(batch()))
        uneven = fully_shard(int8fx.quantize_(built(rows=N + 1), **options), mesh=mesh)
        parts_apart = {"w8a16-group", "int8-rotated", "w4a16-group", "w4a8-group", "wna16-group", "nf4"}
        if not {*parts_apart, W4A16.name} & set(options.values()):
            uneven(batch())
            continue
        with pytest.raises(RuntimeError, match="into 2 parts along dimension 0: allowed are equal"):
            uneven(batch())


CASES = [
    tensor_parallel,
    rotated_rows,
    fsdp2_rotated,
    columns_of_columns,
    tensor_parallel_saved,
    tensor_parallel_of_floats,
    tp_plan_of_transformers,
    tp_plan_compiled,
    fsdp2,
    fsdp2_by_layers,
    fsdp2_of_a_conv1d,
    fsdp2_without_room_for_scales,
    fsdp2_quantised_in_shards,
    checkpoints_of_shards,
    checkpoints_of_other_shards,
    whole_checkpoints_into_shards,
    tensor_parallel_in_every_scheme,
    fsdp2_in_every_scheme,
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
    # A rank that fails alone leaves the other one in a collective.
    patience = {"timeout": timedelta(minutes=10)}
    where = {"init_method": f"file://{path}", "rank": rank, "world_size": RANKS}
    dist.init_process_group("gloo", **where, **patience)
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
    found = list(collected(results, processes, RANKS * len(CASES)))
    for process in processes:
        process.join(60)
    return found


def collected(results, processes, count):
    """As many results as are expected; a process that dies is an error, and leaves nobody waiting."""
    while count:
        if not results.empty():
            yield results.get()
            count -= 1
        elif any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
            pytest.fail(f"a process died: exit codes {[process.exitcode for process in processes]}")
        else:
            time.sleep(0.1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_over_two_processes(outcomes, case):
    failures = [trace for name, _, trace in outcomes if name == case.__name__ and trace]
    assert not failures, failures[0]
    assert sum(name == case.__name__ for name, _, _ in outcomes) == RANKS
