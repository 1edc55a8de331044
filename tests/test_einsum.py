"""einsum as a linear map: the calls around the product, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from int8fx.passes.linears.einsum import linear_map


@pytest.mark.parametrize(
    "equation",
    ["bsk,kn->bsn", "bsk,hkd->bshd", "bshd,hdn->bsn", "...k,nk->...n", "bsk,hkd->dbhs", "k,nk->n"],
)
def test_einsum_as_a_linear_map_equals_einsum(equation):
    sizes = {"b": 2, "s": 3, "k": 5, "n": 7, "h": 4, "d": 6}
    left, right = equation.split("->")[0].split(",")
    x = torch.randn([*((2, 3) if "..." in left else ()), *(sizes[i] for i in left.replace("...", ""))])
    weight = torch.randn([sizes[i] for i in right])
    form = linear_map(equation, 1, tuple(weight.shape), tuple(x.shape))
    assert not isinstance(form, str)

    def apply(value, calls):
        for name, *args in calls:
            value = getattr(value, name)(*args)
        return value

    y = apply(F.linear(apply(x, form[0]), apply(weight, form[1])), form[2])
    torch.testing.assert_close(y, torch.einsum(equation, x, weight))
