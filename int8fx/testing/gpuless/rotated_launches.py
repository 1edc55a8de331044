"""Checks the launches of the kernels of rotated linears against their references, as they happen."""

from typing import Any

import torch
from torch import Tensor

from int8fx.kernels.gpu.norm import norm_statistics, normalized_reference
from int8fx.kernels.ops.rotated_linear import quantize_rotated_reference, rotated_linear_reference
from int8fx.testing.gpuless.int8_launches import relative_error
from int8fx.testing.nogpu.inductor import Launch


class RotatedCheck:
    """An observer for ``nogpu.inductor.retargeted``.

    Attributes:
        rotation: of all the linears.
        errors: relative, one for each linear that ran.
        without_columns: the same for a run whose static columns are left out; a check of the check.
        norms: how many norms the kernel that rotates computed.
        sets: of each product of several linears, which quantisation each of them read.
    """

    def __init__(self, rotation: str = "hadamard") -> None:
        self.rotation = rotation
        self.errors: list[float] = []
        self.without_columns: list[float] = []
        self.norms = 0
        self.sets: list[list[int]] = []

    def __call__(self, launch: Launch) -> None:
        if launch.name == "rotate_kernel":
            self._check_rows(launch.arguments)
        elif launch.name == "rotated_gemm_kernel":
            self._check_product(launch)

    def _check_rows(self, given: dict[str, Any]) -> None:
        """Bit for bit; behind a norm, whose sums are in another order, to one step."""
        x = given["x_ptr"]
        if given["ADDS"]:
            x = x + given["addend_ptr"]
            assert torch.equal(given["sum_ptr"], x)
        if given["NORM"]:
            self.norms += 1
            statistics = norm_statistics(x, given["NORM"], given["eps"])
            vectors = given["weight_ptr"], given["bias_ptr"]
            x = normalized_reference(x, *statistics, *vectors, given["NORM"])
        for index in range(given["SETS"]):
            if index and not given["sets_ptr"][index]:
                continue  # those of the first linear
            columns = given[f"columns{index}_ptr"] if given["COLUMNS"] else torch.empty(0)
            columns = columns.to(torch.int32)
            x_int8, x_scale, _, x_columns = quantize_rotated_reference(
                x, columns, 0.0, given["SIZE"], self.rotation
            )
            off = (given["x_int8_ptr"][index].int() - x_int8.int()).abs().max()
            given_columns = (
                given["x_columns_ptr"][index, :, : len(columns)] if len(columns) else x_columns
            )
            if given["NORM"]:
                assert off <= 1
                # A unit in the last place of h, of its dtype.
                close = {"rtol": 2 * torch.finfo(x.dtype).eps, "atol": 1e-5}
                torch.testing.assert_close(given["x_scale_ptr"][index], x_scale, **close)
                torch.testing.assert_close(given_columns, x_columns, **close)
            else:
                assert off == 0
                assert torch.equal(given["x_scale_ptr"][index], x_scale)
                assert torch.equal(given_columns, x_columns)

    def _check_product(self, launch: Launch) -> None:
        """Compares one launch, and a run of it without the columns' product."""
        given = launch.arguments
        groups = [index for index in range(3) if given[f"N{index}"]]
        results = [given[f"y{index}_ptr"] for index in groups]
        changed = [torch.full_like(y, torch.nan) for y in results]
        spare = [*changed, *[changed[0]] * (3 - len(changed))]
        launch.run(COLUMNS=0, y0_ptr=spare[0], y1_ptr=spare[1], y2_ptr=spare[2])
        sets = [int(given["sets_ptr"][index]) if given["SETS"] else 0 for index in groups]
        self.sets.append(sets)
        for index, own, y, broken in zip(groups, sets, results, changed, strict=True):
            expected = self._expected(given, index, own)
            self.errors.append(relative_error(y, expected))
            self.without_columns.append(relative_error(broken, expected))

    def _expected(self, given: dict[str, Any], index: int, own: int) -> Tensor:
        count, y = given["COLUMNS"], given[f"y{index}_ptr"]
        rows = given["x_int8_ptr"][own], given["x_scale_ptr"][own]
        x_columns = given["x_columns_ptr"][own, :, :count] if count else y[:, :0]
        w_columns = given[f"w_columns{index}_ptr"] if count else y[:0]
        bias = given[f"bias{index}_ptr"] if given["HAS_BIAS"] else None
        weight = given[f"w{index}_ptr"], given[f"w_scale{index}_ptr"], w_columns, bias
        return rotated_linear_reference(*rows, y.new_empty(0), x_columns.float(), *weight)
