"""Checks the launches of our kernels against ``int8fx/kernels``' references, as they happen."""

from typing import Any

import torch
from nogpu.inductor import Launch
from torch import Tensor

from int8fx.kernels.gpu.gemm import gemm_reference
from int8fx.kernels.quantize import quantize_reference


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


class LinearCheck:
    """An observer for ``nogpu.inductor.retargeted``.

    Attributes:
        errors: relative, one for each int8 linear that ran.
        without_outliers: the same for a run whose outlier product is left out; a check of the check.
        outliers: how many columns or elements left the int8 product, in all.
    """

    def __init__(self, threshold: float, decomposition: str) -> None:
        self.threshold, self.decomposition = threshold, decomposition
        self.errors: list[float] = []
        self.without_outliers: list[float] = []
        self.outliers = 0
        self._source: dict[str, Any] = {}

    def __call__(self, launch: Launch) -> None:
        if launch.name == "quantize_gather_kernel":
            # A copy: the generated wrapper may give x's memory to the product's result.
            self._source = launch.arguments | {"x_ptr": launch.arguments["x_ptr"].clone()}
        elif launch.name == "gemm_kernel":
            self._check(launch, *self._product_operands(launch))
        elif launch.name == "decode_kernel":
            self._check(launch, *self._decode_operands(launch))

    def _product_operands(self, launch: Launch) -> tuple[Tensor, ...]:
        """What the product should have been given, made from what the launch before it read."""
        given = launch.arguments
        if not given["HAS_OUTLIERS"]:
            empty = given["x_gathered_ptr"][:, :0]
            return given["x_int8_ptr"], given["x_scale_ptr"], empty
        source = self._source
        x = source["x_ptr"]
        if source["QUANTIZE"]:
            x_int8, x_scale, x_outlier, _ = quantize_reference(x, self.threshold, "column")
            assert torch.equal(given["x_int8_ptr"], x_int8)
            assert torch.equal(given["x_scale_ptr"], x_scale)
            return x_int8, x_scale, x_outlier
        return given["x_int8_ptr"], given["x_scale_ptr"], x

    def _decode_operands(self, launch: Launch) -> tuple[Tensor, ...]:
        given = launch.arguments
        x = given["x_ptr"]
        if not given["QUANTIZE"]:
            x_outlier = x if given["HAS_OUTLIERS"] else x[:, :0]
            return given["x_int8_ptr"], given["x_scale_ptr"], x_outlier
        x_int8, x_scale, x_outlier, _ = quantize_reference(x, self.threshold, self.decomposition)
        return x_int8, x_scale, x_outlier if self.threshold else x[:, :0]

    def _check(self, launch: Launch, x_int8: Tensor, x_scale: Tensor, x_outlier: Tensor) -> None:
        given = launch.arguments
        self.outliers += int((x_outlier != 0).sum())
        groups = [index for index in range(3) if given[f"N{index}"]]
        results = [given[f"y{index}_ptr"] for index in groups]
        changed = [torch.full_like(y, torch.nan) for y in results]
        spare = [*changed, *[changed[0]] * (3 - len(changed))]
        launch.run(HAS_OUTLIERS=False, y0_ptr=spare[0], y1_ptr=spare[1], y2_ptr=spare[2])
        for index, y, broken in zip(groups, results, changed, strict=True):
            w_int8 = given[f"w{index}_ptr"]
            expected = gemm_reference(
                x_int8,
                x_scale,
                x_outlier,
                w_int8 if x_outlier.shape[1] else w_int8[:, :0],
                w_int8,
                given[f"w_scale{index}_ptr"],
                given[f"bias{index}_ptr"] if given["HAS_BIAS"] else None,
            )
            self.errors.append(relative_error(_summed(y), expected))
            self.without_outliers.append(relative_error(_summed(broken), expected))


def _summed(y: Tensor) -> Tensor:
    return y.sum(0) if y.dim() == 3 else y
