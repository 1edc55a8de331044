"""suggest: it finds the linear that is planted to be sensitive, keeps its budget, and says why."""

import copy
import json

import pytest
import torch
from torch import nn

import int8fx
from int8fx.analysis.metrics import token_kl
from int8fx.analysis.mixture import Mixtures
from int8fx.analysis.suggest import (
    FASTEST,
    FLOAT,
    LADDER,
    WAYS,
    Sensitivity,
    _simpler,
    _within_kl,
)
from int8fx.errors import BudgetError
from int8fx.testing.support import compile_once

K, V = 32, 24


class Classifier(nn.Module):
    """Three blocks; the input of the second has outliers just below the threshold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(K, K) for _ in range(3))
        self.head = nn.Linear(K, V)
        self.requires_grad_(False)

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if index == 1:
                scale = torch.ones(K)
                scale[5] = 5.9
                x = block(x.tanh() * scale)
            else:
                x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    return Classifier()


@pytest.fixture(scope="module")
def x():
    return torch.randn(20, K, generator=torch.Generator().manual_seed(1))


def measured_kl(model, x, options) -> float:
    y, _ = compile_once(model, x, backend_options=options)
    return token_kl(model(x), y).mean().item()


def test_a_budget_of_kl_is_kept_by_what_the_sensitive_linear_needs(model, x):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runs = []
    loose = int8fx.suggest(model, x, budget={"kl": 1.0}, on_run=lambda *run: runs.append(run))
    assert loose.options == {} and loose.kl == loose.uniform_kl["llm.int8"]
    assert runs == [(done, 8) for done in range(1, 9)]  # four linears, and four ways for all
    alone = {each.path: each.kl["llm.int8"] for each in loose.linears}
    assert max(alone, key=alone.get) == "blocks.1"

    budget = loose.kl / 3
    runs.clear()
    tight = int8fx.suggest(model, x, budget={"kl": budget}, on_run=lambda *run: runs.append(run))
    # Until it ends nothing looks as if it had: a run more is told before it runs.
    assert runs[7:10] == [(8, 8), (8, 9), (9, 9)] and runs[-1][0] == runs[-1][1]
    assert tight.kl <= budget
    assert {each.path: each.chosen for each in tight.linears}["blocks.1"] != "llm.int8"
    assert tight.kl == pytest.approx(measured_kl(model, x, tight.options), rel=0.01, abs=1e-6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_is_estimated_is_near_what_is_measured(model, x):
    mixtures = Mixtures(model, (x,), {}, WAYS, {"calibration": int8fx.calibrate(model, [x])})
    for each in int8fx.suggest(model, x, budget={"kl": 1.0}).linears:
        assert each.kl["llm.int8"] == mixtures.kl({each.path: "llm.int8"})
        for way in WAYS:
            measured = mixtures.kl({each.path: way})
            assert measured / 3 < each.kl[way] < 3 * measured


class Loud(nn.Module):
    """Every linear's input has a column that is larger in every row, but below the thresholds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.lm_head = nn.Linear(64, V)
        self.requires_grad_(False)
        self.lm_head.weight.mul_(50.0)  # so that what differs is more than rounding

    def forward(self, x):
        loud = torch.where(torch.arange(64) == 5, 2.9, 0.05)
        for block in self.blocks:
            x = block(x.tanh() * loud)
        return self.lm_head(x)


def loud_inputs():
    return torch.randn(20, 64, generator=torch.Generator().manual_seed(1))


def test_rotated_is_proposed_with_the_columns_of_the_inputs(tmp_path):
    model, x = Loud(), loud_inputs()
    uniform = int8fx.suggest(model, x, budget={"kl": 10.0}).uniform_kl
    assert uniform["int8-rotated"] < uniform["llm.int8"] / 4
    budget = {"kl": 1.2 * uniform["int8-rotated"]}
    found = int8fx.suggest(model, x, budget=budget)
    assert found.options["scheme"] == "int8-rotated" and found.kl <= budget["kl"]
    # The head stays in float, as it was where the mixtures were measured.
    assert found.options["skip"][0] == "lm_head"
    assert found.kl == pytest.approx(measured_kl(model, x, found.options), rel=0.01, abs=1e-7)
    calibration = found.options["calibration"]
    assert calibration == int8fx.calibrate(model, [x]) and found.columns_of_inputs
    shown = " ".join(str(found).split())
    assert "'calibration': 'calibration.json'" in shown and "the largest of these inputs" in shown
    found.save(tmp_path / "options.json")
    path = tmp_path / "calibration.json"
    assert json.loads(json.dumps(found.to_dict()))["options"]["calibration"] == json.loads(
        path.read_text()
    )
    options = int8fx.load_options(tmp_path / "options.json")
    assert measured_kl(model, x, options) == pytest.approx(found.kl, rel=0.01, abs=1e-7)
    given = int8fx.suggest(model, x, budget=budget, options={"calibration": path})
    assert given.options == found.options and given.kl == found.kl and not given.columns_of_inputs
    assert "the largest of these inputs" not in str(given)


def test_one_way_for_all_goes_before_a_mixture_that_costs_more():
    def linear(name: str, chosen: str) -> Sensitivity:
        return Sensitivity(name, dict.fromkeys(LADDER, 0.0), 400, 100, chosen)

    mixture = [linear("fc0", FASTEST), linear("fc1", FLOAT), linear("fc2", FLOAT)]
    uniform = {FASTEST: 0.1, "llm.int8 at 3": 0.02, "int8-rotated": 0.002, "w8a16": 0.003}
    found, kl = _simpler(mixture, 0.0025, uniform, 0.003, LADDER)
    assert {each.chosen for each in found} == {"int8-rotated"} and kl == 0.002
    assert _simpler(mixture, 0.0015, uniform, 0.0019, LADDER) == (mixture, 0.0015)
    cheap = [linear("fc0", FASTEST), linear("fc1", FASTEST), linear("fc2", "int8-rotated")]
    assert _simpler(cheap, 0.0025, uniform, 0.003, LADDER) == (cheap, 0.0025)


def test_a_calibration_of_another_model_is_an_error(model, x):
    other = int8fx.calibrate(Loud(), [loud_inputs()])
    with pytest.raises(Exception, match=r"blocks.0: N=32, K=32.*which is of a Loud"):
        int8fx.suggest(model, x, budget={"kl": 1.0}, options={"calibration": other})


def test_no_divergence_at_all_is_float(model, x):
    runs = []
    none = int8fx.suggest(model, x, budget={"kl": 1e-12}, on_run=lambda done, total: runs.append(total))
    assert none.kl <= 1e-12 and max(runs) <= 7 + 4  # twelve steps: 1 + 2 + 4 + 8 and more
    assert set(none.options["skip"]) == {"blocks.*", "head"}
    assert none.model_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_divergences_that_are_but_rounding_come_to_an_end():
    """Their sum is no more than nothing, and says of no mixture that it is too far from float."""
    kl = dict.fromkeys(WAYS, -1e-9) | {FLOAT: 0.0}
    linears = [Sensitivity(f"fc{index}", kl, 400, 100, FLOAT) for index in range(100)]

    class Runs:
        count = 0

        def kl_of_mixture(self, chosen):
            self.count += 1
            assert self.count < 50
            return 0.0 if {each.chosen for each in chosen} == {FLOAT} else 1e-8

    runs = Runs()
    chosen, divergence = _within_kl(linears, runs, {FASTEST: 1e-8}, 1e-9)
    # 300 steps: 1 + 2 + 4 + ... + 256 are more.
    assert {each.chosen for each in chosen} == {FLOAT} and divergence == 0 and runs.count <= 9


def test_a_budget_of_memory_buys_float_for_the_most_sensitive(model, x):
    whole = sum(parameter.nbytes for parameter in model.parameters())
    least = int8fx.suggest(model, x, budget={"memory": whole})
    assert {each.chosen for each in least.linears} == {"float"}
    one = least.linears[0].float_bytes - least.linears[0].kept_bytes
    bought = int8fx.suggest(model, x, budget={"memory": whole - 3 * one})
    in_float = [each for each in bought.linears if each.chosen == "float"]
    assert len(in_float) == 1 and bought.model_bytes <= whole - 3 * one
    gains = {each.path: min(each.kl[way] for way in WAYS) / each.float_bytes for each in bought.linears}
    assert in_float[0].path == max(gains, key=gains.get)


BITS = {
    "w4a8": ("w4a8-group", {"group_size": 16, "rotation": "none"}),
    "w4a16": ("w4a16-group", {"group_size": 16}),
    "rotated": ("int8-rotated", {}),
    "w8a16": ("w8a16", {}),
}


def bytes_when(model, suggestion) -> int:
    """What the model takes, by quantize_ with the options that were suggested."""
    made = int8fx.quantize_(copy.deepcopy(model), **suggestion.options)
    tensors = (*made.parameters(), *made.buffers())
    return sum(
        each.int8_bytes if isinstance(each, int8fx.QuantizedWeight) else each.nbytes for each in tensors
    )


def test_a_budget_of_memory_mixes_bits(model, x):
    sizes, chosen = {}, {}
    for memory in (1, 1e9):
        try:
            sizes[memory] = int8fx.suggest(model, x, budget={"memory": memory}, ways=BITS).model_bytes
        except BudgetError as error:
            sizes[memory] = int(str(error).partition("model takes ")[2].split()[0])
    least, of_float = sizes[1], sizes[1e9]
    assert of_float == sum(each.nbytes for each in model.parameters()) > 3 * least
    kl = []
    for part in (0, 0.25, 0.5):
        memory = least + part * (of_float - least)
        found = int8fx.suggest(model, x, budget={"memory": memory}, ways=BITS)
        assert found.model_bytes <= memory
        assert found.model_bytes == bytes_when(model, found)
        assert found.kl == pytest.approx(measured_kl(model, x, found.options), rel=0.02, abs=1e-6)
        chosen[part] = {each.path: each.chosen for each in found.linears}
        kl.append(found.kl)
    assert kl == sorted(kl, reverse=True) and kl[-1] < kl[0] / 2
    assert {way[:2] for way in chosen[0].values()} == {"w4"}
    bits = {BITS.get(way, (way,))[0][:2] for way in chosen[0.25].values()}
    assert "w4" in bits and bits & {"in", "w8"}  # of 4 bits and of 8 side by side


def test_a_budget_of_kl_mixes_bits_and_tells_the_memory(model, x):
    loose = int8fx.suggest(model, x, budget={"kl": 1.0}, ways=BITS)
    assert {each.chosen for each in loose.linears} == {"w4a8"}
    assert loose.model_bytes == bytes_when(model, loose)
    tight = int8fx.suggest(model, x, budget={"kl": loose.kl / 3}, ways=BITS)
    assert tight.kl <= loose.kl / 3
    assert len({each.chosen for each in tight.linears}) > 1
    assert tight.model_bytes == bytes_when(model, tight) > loose.model_bytes


def test_the_table_shows_every_linear_and_the_options(model, x):
    shown = int8fx.suggest(model, x, budget={"kl": 1.0})
    lines = str(shown).splitlines()
    assert max(map(len, lines)) <= 80
    for each in shown.linears:
        (line,) = [line for line in lines if line.startswith(f"{each.path} ")]
        assert f"{each.kl['w8a16'] * 1e6:,.0f}" in line
    assert json.loads(json.dumps(shown.to_dict()))["kl"] == shown.kl


def test_the_head_that_is_skipped_stays_so(x):
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lm_head = nn.Linear(K, K), nn.Linear(K, V)

        def forward(self, x):
            return self.lm_head(self.fc(x))

    shown = int8fx.suggest(WithHead().requires_grad_(False), x, budget={"kl": 1e-12})
    assert shown.options["skip"] == ["lm_head", "fc"]


def test_experts_have_no_product_with_weights_alone(x):
    class Experts(nn.Module):
        """A matrix for each row, and a head."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(3, K, K) / K**0.5)
            self.head = nn.Linear(K, V)
            self.requires_grad_(False)

        def forward(self, x, experts):
            rows = torch.bmm(x.unsqueeze(1), self.weight[experts].transpose(1, 2)).squeeze(1)
            return self.head(rows)

    model, experts = Experts(), torch.tensor([0, 2, 2, 1] * 5)
    loose = int8fx.suggest(model, (x, experts), budget={"kl": 1.0})
    routed, head = loose.linears
    with_experts = {"llm.int8", "llm.int8 at 3", "int8-rotated"}
    assert routed.kl.keys() == {*with_experts, "float"} < head.kl.keys()
    assert 0 < routed.kl["llm.int8"] < 0.1 and loose.options == {}
    assert loose.uniform_kl.keys() == with_experts
    assert loose.kl == pytest.approx(
        token_kl(model(x, experts), compile_once(model, x, experts)[0]).mean().item(), rel=0.05
    )
    none = int8fx.suggest(model, (x, experts), budget={"kl": 1e-12})
    assert {each.chosen for each in none.linears} == {"float"} and none.kl <= 1e-12
    assert str(loose)


def test_answers_that_are_not_finite_keep_no_budget(model, x):
    broken = copy.deepcopy(model)
    next(broken.parameters())[0] = float("nan")
    with pytest.raises(BudgetError, match="with every linear in float the KL is nan"):
        int8fx.suggest(broken, x, budget={"kl": 1.0})


@pytest.mark.parametrize(
    "budget", [{}, {"kl": 0}, {"kl": True}, {"speed": 3}, {"kl": 1, "memory": 2}, 0.1, {"kl": "1"}]
)
def test_a_wrong_budget_is_named(model, x, budget):
    with pytest.raises(ValueError, match=r'budget=.*allowed: \{"kl": nats\} or \{"memory": bytes\}'):
        int8fx.suggest(model, x, budget=budget)


def test_a_budget_that_cannot_be_kept_says_what_can(model, x):
    with pytest.raises(ValueError, match=r"every linear quantised the model takes \d+ bytes"):
        int8fx.suggest(model, x, budget={"memory": 100})


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_in_int8_has_nothing_to_compare_with(model, x, compiled):
    int8fx.quantize_(model)
    given = torch.compile(model) if compiled else model
    with pytest.raises(ValueError, match=r"\.weight is quantised already.*the float model: give that"):
        int8fx.suggest(given, x, budget={"kl": 1.0})


def test_a_model_without_logits(x):
    with pytest.raises(TypeError, match="answers with a tuple; needed are logits"):
        int8fx.suggest(lambda x: (x, x), x, budget={"kl": 1.0})


def test_what_it_prints_breaks_a_path_behind_a_dot():
    path = "model.decoder.layers.11.self_attention.output_projection"
    ways = dict.fromkeys(("llm.int8", "llm.int8 at 3", "int8-rotated", "w8a16"), 1e-6)
    linears = (Sensitivity(path, ways, 4096, 1024, "llm.int8"),)
    printed = str(int8fx.Suggestion({}, 0.0, ways, 1024, linears)).splitlines()
    assert printed[0].startswith("KL x 1e6 of each linear alone; llm.int8 is measured, ")
    start = next(number for number, line in enumerate(printed) if line.startswith("module "))
    end = printed.index("")
    parts = [line.split()[0] for line in printed[start + 1 : end]]
    assert "".join(parts) == path and all(part.endswith(".") for part in parts[:-1])
    assert max(map(len, printed)) <= 80


def test_its_table_has_a_line_for_each_linear_on_80_columns():
    path = "model.layers.10.self_attn.q_proj"
    kl = dict(zip(LADDER, (-1e-9, 5.4321, 3e-9, 2e-6, 0.0), strict=True))
    linears = (Sensitivity(path, kl, 400, 100, "int8-rotated"),)
    lines = str(int8fx.Suggestion({}, 0.0, {}, 0, linears)).splitlines()
    (row,) = (line.split() for line in lines if line.startswith("model."))
    assert row == [path, "0", "5,432,100", "0", "2", "int8-rotated"]
    assert max(map(len, lines)) <= 80
