"""Weights, modules and exports of other libraries: left alone with a reason, hinted at, or written."""

import warnings

import pytest
import torch
from torch import nn

import int8fx
from int8fx.testing.installed import install, run
from int8fx.testing.support import compile_once


def two() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False)
    return nn.Sequential(*layers).requires_grad_(False).eval()


@pytest.fixture
def x():
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


# --- weights that others have quantised -----------------------------------------------------------


def of_torchao() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = two()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def of_quanto() -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    model = two()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


@pytest.mark.parametrize("make", [of_torchao, of_quanto])
def test_weights_of_others_stay_theirs_with_a_reason(make, x):
    model = make()
    before = {name: (type(weight), id(weight)) for name, weight in model.named_parameters()}
    expected = model(x)
    y, report = compile_once(model, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert [decision for decision in report.decisions if decision.accepted] == []
    assert "no plain tensor" in str(report) or report.decisions == ()
    with pytest.raises(ValueError, match=r"no weight to quantise in Sequential\n  0 .*left alone: "):
        int8fx.quantize_(model)
    assert {n: (type(weight), id(weight)) for n, weight in model.named_parameters()} == before


def test_bitsandbytes_modules_without_the_import_are_hinted_at_once(tmp_path):
    pytest.importorskip("bitsandbytes")
    code = (
        "import bitsandbytes, torch\n"
        "linear = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)\n"
        "norm = torch.nn.LayerNorm(64)\n"
        "model = torch.nn.Sequential(norm, linear).half().requires_grad_(False)\n"
        "model(torch.ones(2, 64).half())\n"
        "compiled = torch.compile(model, backend='llmint8')\n"
        "for rows in (2, 3):\n"
        "    compiled(torch.ones(rows, 64).half())\n"
    )
    done = run(code, install(tmp_path))
    assert done.returncode == 0, done.stderr
    hint = "1 linears of Sequential are bitsandbytes' Linear8bitLt"
    assert done.stderr.count(hint) == 1 and "import int8fx.integrations.bitsandbytes" in done.stderr


# --- torch.export ---------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_export_of_a_compiled_model_says_that_it_is_of_the_float_model(x, in_place):
    torch._dynamo.reset()
    model = two()
    compiled = model if in_place else torch.compile(model, backend="llmint8")
    if in_place:
        model.compile(backend="llmint8")
    compiled(x)
    with pytest.warns(UserWarning, match=r"torch.export exports the float model.*int8fx.quantize_"):
        exported = torch.export.export(compiled, (x,))
    assert "int8fx" not in str(exported.graph)


def test_export_of_an_int8_model_says_nothing_and_is_int8(x):
    model = int8fx.quantize_(two())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exported = torch.export.export(model, (x,))
    decomposed = exported.run_decompositions().graph
    targets = [str(node.target) for node in decomposed.nodes]
    assert len([each for each in targets if each.startswith("int8fx.")]) == 2
    assert torch.equal(exported.module()(x), model(x))


# --- ONNX -----------------------------------------------------------------------------------------


def test_what_is_exported_to_onnx_computes_with_the_int8_weights(x):
    from int8fx.integrations.onnx import exportable

    model = int8fx.quantize_(two())
    copied = exportable(model)
    expected = int8fx.dequantize_(int8fx.quantize_(two()))(x)
    torch.testing.assert_close(copied(x), expected, rtol=1e-6, atol=1e-6)
    assert isinstance(model[0].weight, int8fx.QuantizedWeight)
    assert not any(isinstance(each, int8fx.QuantizedWeight) for each in copied.parameters())


def test_onnxruntime_gives_the_same_answer(x, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from int8fx.integrations.onnx import exportable

    copied = exportable(int8fx.quantize_(two()))
    path = tmp_path / "model.onnx"
    torch.onnx.export(copied, (x,), str(path), dynamo=True, verbose=False)
    graph = onnx.load(str(path)).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("DequantizeLinear") == 2 and {"MatMul", "Gemm"} & set(kinds)
    stored = {each.data_type for each in graph.initializer if len(each.dims) == 2}
    assert stored == {onnx.TensorProto.INT8}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), copied(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_written_to_onnx_is_named():
    from int8fx.integrations.onnx import exportable

    with pytest.raises(ValueError, match="no weight of Sequential is quantised"):
        exportable(two())
    with pytest.raises(ValueError, match=r"exportable: 0 is .*'w8a16-group'.*as llm.int8"):
        exportable(int8fx.quantize_(two(), scheme="w8a16-group", group_size=32))
