"""Routers, indexers and codebooks of transformers' models: which linears are ranked, for both ways in.

``benchmarks/coverage.py`` asks the same of all architectures.
"""

import pytest

from int8fx.testing.routers import apart_from_quantize, backend_decisions, is_ranked
from int8fx.testing.toy_models import build

INDEXER = ("wq_b", "wk", "weights_proj")
RANKED = {
    "deepseek_v2": ("gate",),
    "deepseek_v3": ("gate",),
    "glm4_moe": ("gate",),
    "glm_moe_dsa": ("gate", *INDEXER),
    "phimoe": ("router",),
    "mixtral": ("gate",),
    "granitemoe": ("router",),
    "zaya": ("out_proj",),
    "jamba": ("router",),
    "llama": (),
}


@pytest.mark.parametrize("architecture", RANKED)
def test_what_is_ranked_stays_in_float_for_the_backend_and_for_quantize(architecture):
    toy = build(architecture)
    decisions = backend_decisions(toy.model, toy.inputs)
    ranked = {decision.path.rpartition(".")[2] for decision in decisions if is_ranked(decision)}
    assert ranked == set(RANKED[architecture])
    assert any(decision.accepted for decision in decisions)
    assert apart_from_quantize(toy.model, decisions) == []


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_toys_have_more_than_one_group_of_experts(architecture):
    config = build(architecture).model.config
    assert config.n_group == 2 and config.topk_group == 1
