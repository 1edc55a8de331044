"""Checks the launches of our kernels against ``int8fx/kernels``' references, as they happen."""

from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.gpu.gemm import gemm_reference
from int8fx.kernels.gpu.norm import norm_statistics, normalized_reference
from int8fx.kernels.gpu.residues import residues_reference
from int8fx.kernels.gpu.rounding import quantize_rows
from int8fx.kernels.ops.quantize_reference import quantize_reference
from int8fx.testing.nogpu.inductor import Launch


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


class LinearCheck:
    """An observer for ``nogpu.inductor.retargeted``.

    Attributes:
        errors: relative, one for each int8 linear that ran.
        without_outliers: the same for a run whose outlier product is left out; a check of the check.
        outliers: how many columns or elements left the int8 product, in all.
        norms: how many were computed by our kernel.
    """

    def __init__(self, threshold: float, decomposition: str) -> None:
        self.threshold, self.decomposition = threshold, decomposition
        self.errors: list[float] = []
        self.without_outliers: list[float] = []
        self.outliers = self.norms = 0
        self._source: dict[str, Any] = {}

    def __call__(self, launch: Launch) -> None:
        if launch.name in ("quantize_gather_kernel", "quantize_experts_kernel"):
            # A copy: the generated wrapper may give x's memory to the product's result.
            self._source = launch.arguments | {"x_ptr": launch.arguments["x_ptr"].clone()}
        elif launch.name == "norm_kernel":
            self._check_norm(launch.arguments)
        elif launch.name == "gemm_kernel":
            self._check(launch, *self._product_operands(launch), HAS_OUTLIERS=False)
        elif launch.name == "decode_kernel" and launch.arguments["QUANTIZE"]:
            x_int8, x_scale, x_outlier = self._quantized(launch)
            self._check(launch, x_int8, x_scale, x_outlier, QUANTIZE=False)
        elif launch.name == "decode_kernel":
            residues = self._residues(launch)
            zero = {f"residue{i}_ptr": torch.zeros_like(residue) for i, residue in enumerate(residues)}
            self._check(launch, *self._residue_operands(launch), **zero)
        elif launch.name == "expert_gemm_kernel":
            self._check_experts(launch)

    def _check_norm(self, given: dict[str, Any]) -> None:
        """The statistics to fp32's rounding; what follows from them to the last bit."""
        self.norms += 1
        x = given["x_ptr"]
        if given["ADDS"]:
            x = x + given["addend_ptr"]
            assert torch.equal(given["sum_ptr"], x)
        mean, rstd = norm_statistics(x, given["NORM"], given["eps"])
        statistics = given["statistics_ptr"]
        torch.testing.assert_close(statistics[0], rstd[:, 0], rtol=1e-5, atol=0)
        if given["NORM"].startswith("layer"):
            torch.testing.assert_close(statistics[1], mean[:, 0], rtol=1e-5, atol=1e-6)
        if given["QUANTIZE"]:
            h = _normalized(x, statistics, given["weight_ptr"], given["bias_ptr"], given["NORM"])
            x_int8, x_scale, _ = quantize_rows(h, self.threshold)
            assert torch.equal(given["x_int8_ptr"], x_int8)
            assert torch.equal(given["x_scale_ptr"], x_scale)

    def _product_operands(self, launch: Launch) -> tuple[Tensor, ...]:
        """What the product should have been given, made from what the launch before it read."""
        given = launch.arguments
        if not given["HAS_OUTLIERS"]:
            empty = given["x_gathered_ptr"][:, :0]
            return given["x_int8_ptr"], given["x_scale_ptr"], empty
        source = self._source
        x = source["x_ptr"]
        if source["NORM"]:
            norm = source["statistics_ptr"], source["norm_weight_ptr"], source["norm_bias_ptr"]
            x = _normalized(x, *norm, source["NORM"])
            if not source["QUANTIZE"]:
                x = torch.where(x.float().abs() >= self.threshold, x, 0.0)
        if source["QUANTIZE"]:
            x_int8, x_scale, x_outlier, _ = quantize_reference(x, self.threshold, "column")
            assert torch.equal(given["x_int8_ptr"], x_int8)
            assert torch.equal(given["x_scale_ptr"], x_scale)
            return x_int8, x_scale, x_outlier
        return given["x_int8_ptr"], given["x_scale_ptr"], x

    def _quantized(self, launch: Launch) -> tuple[Tensor, ...]:
        """What a decode kernel that quantises should have multiplied."""
        given = launch.arguments
        x_int8, x_scale, x_outlier, _ = quantize_reference(
            given["x_ptr"], self.threshold, self.decomposition
        )
        assert torch.equal(given["x_int8_ptr"], x_int8)
        assert torch.equal(given["x_scale_ptr"], x_scale)
        return x_int8, x_scale, x_outlier

    def _residues(self, launch: Launch) -> list[Tensor]:
        return [launch.arguments[f"residue{i}_ptr"] for i in range(launch.arguments["RESIDUES"])]

    def _residue_operands(self, launch: Launch) -> tuple[Tensor, ...]:
        """The same for a decode kernel that is given rows: outliers from their residues."""
        given, residues = launch.arguments, self._residues(launch)
        x_int8 = given["x_int8_ptr"]
        scale = given["residue_scale_ptr"]
        x_outlier = residues_reference(residues, scale) if residues else x_int8[:, :0]
        return x_int8, given["x_scale_ptr"], x_outlier

    def _check(
        self, launch: Launch, x_int8: Tensor, x_scale: Tensor, x_outlier: Tensor, **without: Any
    ) -> None:
        """Compares one launch, and a run of it whose changes leave the outlier product out."""
        given = launch.arguments
        self.outliers += int((x_outlier != 0).sum())
        groups = [index for index in range(3) if given[f"N{index}"]]
        results = [given[f"y{index}_ptr"] for index in groups]
        changed = [torch.full_like(y, torch.nan) for y in results]
        spare = [*changed, *[changed[0]] * (3 - len(changed))]
        launch.run(**without, y0_ptr=spare[0], y1_ptr=spare[1], y2_ptr=spare[2])
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

    def _check_experts(self, launch: Launch) -> None:
        """The same for a launch whose rows each meet the matrix of their expert."""
        given, y = launch.arguments, launch.arguments["y_ptr"]
        broken = torch.full_like(y, torch.nan)
        launch.run(HAS_OUTLIERS=False, y_ptr=broken)
        expected = torch.zeros(y.shape, dtype=torch.float64)
        first = 0
        for expert, last in enumerate(given["ends_ptr"].tolist()):
            rows, first = slice(first, last), last
            if rows.start == last:
                continue
            x_int8, x_scale, x_outlier = self._of_expert(given, rows)
            self.outliers += int((x_outlier != 0).sum())
            w_int8, w_scale = given["w_ptr"][expert], given["w_scale_ptr"][expert]
            w_outlier = w_int8[:, : x_outlier.shape[1]]
            expected[rows] = gemm_reference(
                x_int8, x_scale, x_outlier, w_outlier, w_int8, w_scale, None
            )
        if given["ORDERED"]:
            y, broken = y[given["order_ptr"]], broken[given["order_ptr"]]
        assert not y[first:].any()  # rows without an expert
        self.errors.append(relative_error(y, expected))
        self.without_outliers.append(relative_error(broken, expected))

    def _of_expert(self, given: dict[str, Any], rows: slice) -> tuple[Tensor, ...]:
        """What the product should have been given for the rows of one expert."""
        x_int8, x_scale = given["x_int8_ptr"][rows], given["x_scale_ptr"][rows]
        if not given["HAS_OUTLIERS"]:
            return x_int8, x_scale, x_int8[:, :0]
        x = self._source["x_ptr"][rows]
        if not self._source["QUANTIZE"]:
            return x_int8, x_scale, x  # what was left out of the rows
        expected = quantize_reference(x, self.threshold, "column")
        assert torch.equal(x_int8, expected[0])
        assert torch.equal(x_scale, expected[1])
        return expected[:3]


def _normalized(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, norm: str
) -> Tensor:
    rstd, mean = statistics.unsqueeze(-1)
    return normalized_reference(x, mean, rstd, weight, bias, norm)


def _summed(y: Tensor) -> Tensor:
    return y.sum(0) if y.dim() == 3 else y
