"""Int8 weights that are moved, shared, read from C++ and freed, while others refer to them."""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

import int8fx
from int8fx import Int8Weight
from int8fx.testing.support import Mlp
from int8fx.torch_private import compile_counts

K, N = 64, 96


@pytest.fixture
def model():
    torch.manual_seed(0)
    return int8fx.quantize_(Mlp(K, N).requires_grad_(False).eval())


@pytest.fixture
def x():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def int8_weight(seed=0):
    torch.manual_seed(seed)
    return int8fx.quantize_(nn.Linear(K, N)).weight


def compiled_with(model, x, **options):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="llmint8", fullgraph=True, **options)
    with torch.no_grad():
        compiled(x)
    return compiled


# --- moved, while others refer to it -------------------------------------------------------------

# What changes nothing, and what is read in another dtype from then on.
STAYS = {
    "to": lambda m: m.to("cpu"),
    "to dtype": lambda m: m.to(torch.float32),
    "float": lambda m: m.float(),
    "cpu": lambda m: m.cpu(),
    "share_memory": lambda m: m.share_memory(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}
CHANGES = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "type": (lambda m: m.type(torch.float16), torch.float16),
}

HOLDERS = {
    "nobody": lambda model, x: None,
    "a weak reference": lambda model, x: weakref.ref(model.up.weight),
    "a weak dictionary": lambda model, x: WeakIdKeyDictionary({model.up.weight: 1}),
    "a compiled graph": compiled_with,
    "a compiled graph of another backend": lambda model, x: torch.compile(model, backend="aot_eager")(
        x
    ),
    "an optimizer": lambda model, x: torch.optim.SGD(model.parameters(), lr=0.1),
    "a graph of autograd": lambda model, x: model(x.requires_grad_()),
    "a view": lambda model, x: model.up.weight.t(),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("move", [*STAYS, *CHANGES])
def test_a_model_moves_whoever_holds_its_weights(model, x, holder, move):
    function, dtype = CHANGES.get(move) or (STAYS[move], torch.float32)
    expected = copy.deepcopy(model).to(dtype)(x.detach().to(dtype))
    weight, held = model.up.weight, HOLDERS[holder](model, x)
    for _ in range(2):
        assert function(model) is model
        assert model.up.weight is weight and isinstance(weight, nn.Parameter)
        assert weight.dtype == dtype and not weight.requires_grad
        assert torch.equal(model(x.detach().to(dtype)), expected)
    del held


def test_a_model_moves_to_meta_despite_a_weak_reference(model):
    weight, before = model.up.weight, model.up.weight.dequantize()
    reference, state = weakref.ref(weight), model.state_dict()
    assert model.to("meta").up.weight is weight is reference() and weight.is_meta
    model.load_state_dict(state, assign=True)
    assert torch.equal(model.up.weight.dequantize(), before)


def test_a_model_that_was_quantised_on_meta_is_in_int8_on_the_device_that_it_comes_to(model, x):
    with torch.device("meta"):
        other = Mlp(K, N)
    assert int8fx.quantize_(other).to_empty(device="cpu") is other
    assert type(other.up.weight) is Int8Weight
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_backward_after_a_move_uses_the_weights_of_the_forward(model, x):
    y = model(x.requires_grad_())
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    model.half()
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


def test_swapping_two_int8_weights_swaps_all_of_them():
    first, second = int8_weight(0), int8_weight(1).half()
    values = first.dequantize(), second.dequantize()
    references = weakref.ref(first), weakref.ref(second)
    first.label = "first"
    torch.utils.swap_tensors(first, second)
    assert references[0]() is first and references[1]() is second
    assert torch.equal(first.dequantize(), values[1]) and torch.equal(second.dequantize(), values[0])
    assert (first.dtype, second.dtype) == (torch.float16, torch.float32)
    assert second.label == "first" and not hasattr(first, "label")


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("move", STAYS)
def test_moving_nowhere_before_each_call_compiles_once(model, x, inference, move):
    """What SentenceTransformer.encode does."""
    compiled = compiled_with(model, x)
    with inference():
        expected = compiled(x)
        graphs = compile_counts()
        for _ in range(3):
            STAYS[move](compiled)
            assert torch.equal(compiled(x), expected)
    assert compile_counts() == graphs


def test_there_and_back_again_compiles_once_for_each_dtype(model, x):
    compiled = compiled_with(model, x)
    with torch.no_grad():
        expected = compiled(x)
        compiled.half()(x.half())
        graphs = compile_counts()
        compiled.float()(x)
        compiled.half()(x.half())
        # The bias was rounded.
        torch.testing.assert_close(compiled.float()(x), expected, rtol=0, atol=1e-2)
    assert compile_counts() == graphs


FLAGS = {
    "swap": torch.__future__.set_swap_module_params_on_conversion,
    "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
}


@pytest.fixture(params=FLAGS)
def flag(request):
    FLAGS[request.param](True)
    yield request.param
    FLAGS[request.param](False)


def test_conversions_of_the_future(flag, model, x):
    compiled = compiled_with(model, x)
    weight, expected = model.up.weight, compiled(x)
    reference = weakref.ref(weight)
    for _ in range(2):
        assert compiled.half()(x.half()).dtype == torch.float16
        compiled.float()
    assert model.up.weight is weight is reference()
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_loading_of_the_future(flag, model, x, assign, quantised):
    compiled = compiled_with(model, x)
    torch.manual_seed(1)
    other = Mlp(K, N).requires_grad_(False)
    floats = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    int8fx.quantize_(other)
    state = other.state_dict() if quantised else floats
    references = [weakref.ref(model.up.weight), weakref.ref(model.down.weight)]
    for _ in range(2):
        model.load_state_dict(state, assign=assign)
        assert type(model.up.weight) is Int8Weight and torch.equal(model(x), other(x))
        with torch.no_grad():
            assert torch.equal(compiled(x), compiled_with(other, x)(x))
    if not assign:
        assert references[0]() is model.up.weight and references[1]() is model.down.weight


def test_a_float_model_that_llmint8_compiled_is_swapped_as_well(x):
    torch.manual_seed(0)
    model = Mlp(K, N).requires_grad_(False)
    compiled = compiled_with(model, x)
    FLAGS["swap"](True)
    try:
        weight = model.up.weight
        model.half()
        assert model.up.weight is weight and weight.dtype == torch.float16
        model.float()
        model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
        expected = compiled_with(copy.deepcopy(model), x)(x)
        assert torch.equal(compiled(x), expected)
    finally:
        FLAGS["swap"](False)


@pytest.fixture
def threads_that_take_turns_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("threads_that_take_turns_often")
def test_threads_share_a_weight(model, x):
    expected = model(x)

    def call():
        return all(torch.equal(model(x.clone().requires_grad_()), expected) for _ in range(50))

    with ThreadPoolExecutor(8) as threads:
        assert all(each.result() for each in [threads.submit(call) for _ in range(8)])


# --- made where only inference is meant ----------------------------------------------------------


def _set_data(model):
    model.up.weight.data = torch.randn(N, K)
    return model


def _copied_into(model):
    model.up.weight.copy_(torch.randn(N, K))
    return model


def _loaded(model, **options):
    model.load_state_dict(model.state_dict(), **options)
    return model


IN_INFERENCE = {
    "quantize_": int8fx.quantize_,
    "to": lambda model: model.to("cpu"),
    "half": lambda model: model.half().float(),
    "share_memory": lambda model: model.share_memory(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "data": _set_data,
    "copy_": _copied_into,
    "load_state_dict": _loaded,
    "load_state_dict, assign": lambda model: _loaded(model, assign=True),
    "dequantize_": int8fx.dequantize_,
}


class Adapted(nn.Module):
    """Low-rank factors before a base: ``base(x + x Aᵀ Bᵀ)``."""

    def __init__(self, base):
        super().__init__()
        self.base, self.A, self.B = base, nn.Linear(K, 4, bias=False), nn.Linear(4, K, bias=False)

    def forward(self, x):
        return self.base(x + self.B(self.A(x)))


def gradient(base, how, x):
    """Of an adapter before a base."""
    torch._dynamo.reset()
    torch.manual_seed(2)
    adapted = Adapted(base)
    call = adapted if how == "eager" else torch.compile(adapted, backend=how)
    call(x).pow(2).sum().backward()
    return adapted.A.weight.grad


@pytest.mark.parametrize("how", ["eager", "llmint8", "aot_eager"])
@pytest.mark.parametrize("way", IN_INFERENCE)
def test_what_was_made_in_inference_mode_is_trained_through(x, way, how):
    def made(mode):
        torch.manual_seed(0)
        floats = Mlp(K, N).requires_grad_(False)
        floats.up.bias = None  # a float one is torch's affair
        with mode():
            return IN_INFERENCE[way](floats if way == "quantize_" else int8fx.quantize_(floats))

    expected = gradient(made(torch.no_grad), how, x)
    assert expected.norm() > 0 and torch.equal(gradient(made(torch.inference_mode), how, x), expected)


IN_BOTH_MODES = {
    "linear": nn.functional.linear,
    "matmul": lambda x, weight: x @ weight.t(),
    "matmul of a batch": lambda x, weight: torch.matmul(x.unsqueeze(0), weight.mT),
    "matmul of its part": lambda x, weight: x @ weight[:8].t(),
    "chunk": lambda x, weight: nn.functional.linear(x, weight.chunk(2)[1]),
    "half": lambda x, weight: weight.half().dequantize(),
    "there and back": lambda x, weight: weight.half().float().dequantize(),
    "flatten": lambda x, weight: weight.flatten().dequantize(),
    "einsum": lambda x, weight: torch.einsum("mk,nk->mn", x, weight),
    "norm": lambda x, weight: torch.linalg.norm(weight),
}


@pytest.mark.parametrize("operator", IN_BOTH_MODES)
def test_inference_mode_computes_what_no_grad_does(x, operator):
    weight = int8_weight()
    with torch.no_grad():
        expected = IN_BOTH_MODES[operator](x, weight)
    with torch.inference_mode():
        assert torch.equal(IN_BOTH_MODES[operator](x, weight), expected)


@pytest.mark.parametrize("move", [*STAYS, *CHANGES])
def test_moving_in_inference_mode_quantises_nothing_anew(model, move):
    function, _ = CHANGES.get(move) or (STAYS[move], None)
    weight = model.up.weight
    before = weight.w_int8, weight.w_scale.clone()
    with torch.inference_mode():
        function(model)
    assert model.up.weight is weight
    assert torch.equal(weight.w_int8, before[0]) and torch.equal(weight.w_scale, before[1])


def test_what_was_made_in_inference_mode_is_written_to(model):
    with torch.inference_mode():
        model.half().float()
    values = torch.randn(N, K)
    model.up.weight.copy_(values)
    assert torch.equal(
        model.up.weight, Int8Weight.from_float(values, **model.up.weight.activation_options)
    )


# --- read past the subclass ----------------------------------------------------------------------

NO_DATA = "an int8 weight has no float values in memory"

# What C++ reads from, or writes to, a tensor's storage. Each is run in a process of its own, which it
# may end.
READERS = {
    "from_dlpack": "torch.from_dlpack(w)",
    "to_dlpack": "torch.utils.dlpack.to_dlpack(w)",
    "_to_dlpack_versioned": "torch._C._to_dlpack_versioned(w)",
    "__dlpack__": "w.__dlpack__()",
    "numpy.from_dlpack": "np.from_dlpack(w)",
    "numpy": "w.numpy()",
    "numpy without a copy": "np.array(w, copy=False)",
    "__array__ without a copy": "w.__array__(copy=False)",
    "address": "torch._C._data_address(w)",
    "storage address": "w.untyped_storage().data_ptr()",
    "storage element": "w.untyped_storage()[0]",
    "storage write": "w.untyped_storage()[0] = 3",
    "storage list": "w.untyped_storage().tolist()",
    "typed storage": "w.storage()[0]",
    "storage into": "w.untyped_storage().copy_(torch.zeros(N * K).untyped_storage())",
    "storage shared": "w.untyped_storage().share_memory_()",
    "storage pickled": "pickle.dumps(w.untyped_storage())",
    "tensor on the storage": "torch.empty(0).set_(w.untyped_storage(), 0, (2,)).sum().item()",
    "plain data": "t = torch.zeros(N, K); t.data = w; t.sum().item()",
    "plain parameter's data": "p = nn.Parameter(torch.zeros(N, K)); p.data = w; p.sum().item()",
    "apply_": "w.apply_(lambda value: 0)",
    "safetensors": "safetensors.torch.save_file({'w': w}, path)",
    "safetensors in bytes": "safetensors.torch.save({'w': w})",
    "jit.trace, save": "torch.jit.save(torch.jit.trace(m, x), path)",
    "jit.trace, to a buffer": "torch.jit.save(torch.jit.trace(m, x), io.BytesIO())",
    "jit.trace of a function, save": "torch.jit.save(torch.jit.trace(lambda x: x @ w.t(), x), path)",
    "jit.script, save": "torch.jit.script(m).save(path)",
    "jit.freeze, save": "torch.jit.save(torch.jit.freeze(torch.jit.trace(m, x)), path)",
    "a view": "torch.utils.dlpack.to_dlpack(w.t())",
    "a part": "torch.utils.dlpack.to_dlpack(w[:8])",
    "a copy": "torch.utils.dlpack.to_dlpack(w.clone())",
    "moved": "torch.utils.dlpack.to_dlpack(m.half().up.weight)",
    "deep-copied": "torch.utils.dlpack.to_dlpack(copy.deepcopy(w))",
    "unpickled": "torch.utils.dlpack.to_dlpack(pickle.loads(pickle.dumps(w)))",
    "buffer": "m.register_buffer('b', w.detach()); torch.utils.dlpack.to_dlpack(m.half().b)",
}

# Where a copy is asked for.
COPIED = {
    "from_dlpack": "assert torch.equal(torch.from_dlpack(w, copy=True), w.dequantize())",
    "numpy.from_dlpack": "assert (np.from_dlpack(w, copy=True) == w.dequantize().numpy()).all()",
}

IN_A_PROCESS = """
    import copy, io, os, pickle, sys
    import numpy as np, safetensors.torch, torch
    from int8fx.testing.support import Mlp
    from torch import nn
    import int8fx, int8fx.backend

    K, N, path = 64, 96, sys.argv[1]
    torch.manual_seed(0)
    m = int8fx.quantize_(Mlp(K, N).requires_grad_(False).eval())
    w, x = m.up.weight, torch.randn(5, K)
    m(x)
    for name, code in eval(sys.stdin.read()).items():
        sys.stdout.flush()
        if os.fork() == 0:
            try:
                exec(code)
                print(repr((name, "it returned")))
            except Exception as error:
                print(repr((name, f"{type(error).__name__}: {error}")))
            sys.stdout.flush()
            os._exit(0)
        _, status = os.wait()
        if status:
            print(repr((name, f"it ended the process with status {status}")))
"""


def in_a_process(code, *arguments, **options):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def outcomes_of(codes, directory):
    return dict(map(eval, in_a_process(IN_A_PROCESS, directory / "file", input=repr(codes))))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(READERS, tmp_path_factory.mktemp("readers"))


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_past_the_subclass_gets_an_error_first(outcomes, reader):
    assert NO_DATA in outcomes[reader]


def test_dlpack_copies_the_float_values_where_it_is_asked_to(tmp_path):
    assert outcomes_of(COPIED, tmp_path) == dict.fromkeys(COPIED, "it returned")


COPIES = {
    "numpy": lambda weight: weight.numpy(force=True),
    "asarray": np.asarray,
    "array": np.array,
    "tolist": lambda weight: weight.tolist(),
    "numpy.dot": lambda weight: np.dot(np.eye(N), weight),
    "tensor": torch.tensor,
    "set_": lambda weight: torch.empty(0).set_(weight),
    "rows": lambda weight: [row.tolist() for row in weight],
    "items": lambda weight: [[value.item() for value in row] for row in weight],
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_have_the_float_values(how):
    weight = int8_weight()
    found = COPIES[how](weight)
    assert torch.equal(torch.as_tensor(found, dtype=torch.float32), weight.dequantize())


@pytest.mark.parametrize("how", ["numpy", "asarray", "tolist"])
def test_copies_of_a_released_weight_are_refused(how):
    weight = int8_weight()
    weight.released = True
    with pytest.raises(int8fx.errors.ReleasedWeightError):
        COPIES[how](weight)


def test_a_numpy_array_of_another_dtype():
    weight = int8_weight()
    assert np.asarray(weight, dtype=np.float16).dtype == np.float16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["trace", "script", "freeze"])
def test_torch_script_runs_as_long_as_it_is_not_saved(model, x, kind):
    script = torch.jit.script(model) if kind == "script" else torch.jit.trace(model, x)
    if kind == "freeze":
        script = torch.jit.freeze(script)
    assert torch.equal(script(x), model(x))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("what", ["weight", "model", "state_dict"])
def test_both_formats_of_torch_save(model, x, what, zipped):
    """The old one reads the values once all objects stand."""
    saved = {"weight": model.up.weight, "model": model, "state_dict": model.state_dict()}[what]
    file = io.BytesIO()
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    if what == "weight":
        assert torch.equal(read, model.up.weight)
        assert torch.equal(nn.functional.linear(x, read), nn.functional.linear(x, model.up.weight))
    elif what == "model":
        assert torch.equal(copy.deepcopy(read)(x), model(x)) and torch.equal(read(x), model(x))
        assert torch.equal(compiled_with(read, x)(x), compiled_with(model, x)(x))
    else:
        other = int8fx.quantize_(Mlp(K, N))
        other.load_state_dict(read)
        assert torch.equal(other.up.weight, model.up.weight)


# --- written to ----------------------------------------------------------------------------------

WRITES = {
    "_foreach_mul_": lambda w: torch._foreach_mul_([w], 2.0),
    "_foreach_add_": lambda w: torch._foreach_add_([torch.zeros(N, K), w], 1.0),
    "_foreach_copy_": lambda w: torch._foreach_copy_([w], [torch.zeros(N, K)]),
    "_foreach_zero_": lambda w: torch._foreach_zero_([w]),
    "out": lambda w: torch.mul(torch.ones(N, K), 2.0, out=w),
    "mm out": lambda w: torch.mm(torch.ones(N, 3), torch.ones(3, K), out=w),
    "out of two": lambda w: torch.sort(torch.ones(N, K), out=(w, torch.empty(N, K, dtype=torch.long))),
    "addcmul_": lambda w: w.addcmul_(torch.ones(N, K), torch.ones(N, K)),
    "lerp_": lambda w: torch.Tensor.lerp_(w, torch.ones(N, K), 0.5),
    "mul_": lambda w: w.mul_(2.0),
    "SGD": lambda w: _step(torch.optim.SGD([w], lr=1.0, momentum=0.9, foreach=True), w),
    "AdamW": lambda w: _step(torch.optim.AdamW([w], lr=1.0, foreach=False), w),
    "AdamW foreach": lambda w: _step(torch.optim.AdamW([w], lr=1.0, foreach=True), w),
    "AdamW fused": lambda w: _step(torch.optim.AdamW([w], lr=1.0, fused=True), w),
}


def _step(optimizer, weight):
    weight.grad = torch.ones(N, K)
    optimizer.step()


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_would_be_lost_is_refused(write):
    weight = int8_weight()
    before = weight.clone()
    message = r"would write to an int8 weight of shape \[96, 64\].*int8fx.dequantize_\(model\)"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        WRITES[write](weight)
    assert torch.equal(weight, before)


def test_it_is_read_by_what_writes_to_others():
    weight = int8_weight()
    values = weight.dequantize()
    assert torch.equal(torch.mul(weight, 2.0, out=torch.empty(N, K)), 2 * values)
    (total,) = totals = [torch.ones(N, K)]
    torch._foreach_add_(totals, [weight])
    assert torch.equal(total, values + 1)


def test_requires_grad_is_refused_as_an_attribute_as_well():
    weight = int8_weight()
    with pytest.raises(RuntimeError, match="cannot require grad: train an adapter"):
        weight.requires_grad = True
    weight.requires_grad = False
    assert not weight.requires_grad
    with pytest.raises(RuntimeError, match="cannot require grad"):
        nn.Parameter(weight)


# --- freed ---------------------------------------------------------------------------------------

BIG_AND_SMALL = """
    import gc
    import torch
    from torch import nn
    import int8fx

    def resident():
        gc.collect()
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024

    def linear(K):
        layer = nn.utils.skip_init(nn.Linear, K, K, bias=False)
        nn.init.ones_(layer.weight)
        return layer

    def model(K, layers):
        return int8fx.quantize_(nn.Sequential(*(linear(K) for _ in range(layers))))

    small = [model(256, 1)]
    model(1024, 20)
    before = resident()
    for _ in range(3):
        big = model(1024, 20)
        small.append(model(256, 1))
        with_big = resident()
        del big
        print(with_big - before, resident() - before)
    x = torch.randn(2, 256)
    assert all(torch.equal(each(x), small[0](x)) and each(x).abs().sum() > 0 for each in small)
"""


def test_big_models_give_their_memory_back_while_small_ones_stay():
    *_, (with_big, without) = (map(int, line.split()) for line in in_a_process(BIG_AND_SMALL))
    # 20 MiB of weights; and three of 64 KiB that stay.
    assert with_big > 18
    assert without < 15


def test_neighbours_of_a_weight_that_goes_keep_their_values():
    weights = [int8_weight(seed) for seed in range(30)]
    expected = [weight.dequantize() for weight in weights]
    del weights[::2], expected[::2]
    more = [int8_weight(seed) for seed in range(30, 40)]
    assert all(map(torch.equal, (weight.dequantize() for weight in weights), expected))
    assert len({weight.data_ptr() for weight in (*weights, *more)}) == len(weights) + len(more)
