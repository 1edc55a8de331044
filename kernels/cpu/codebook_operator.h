// int8fx::codebook_linear and its gradient: kernels/ops/codebook_linear.py has the formulas.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>

#include "kernel_choice.h"
#include "operands.h"

namespace int8fx {

// w [N, K] of a dtype.
inline at::Tensor decoded(
    const at::Tensor& packed_any, const at::Tensor& absmax_any, const at::Tensor& values, int64_t block,
    int64_t K, at::ScalarType dtype) {
  const auto packed = contiguous(packed_any), absmax = contiguous(absmax_any);
  const int64_t N = absmax->size(0), groups = absmax->size(1);
  TORCH_CHECK(block > 0 && groups == at::divup(K, block) && absmax->scalar_type() == at::kFloat,
              "absmax must be float32 [N, ", at::divup(K, std::max<int64_t>(block, 1)), "]");
  TORCH_CHECK(packed->scalar_type() == at::kByte && packed->dim() == 2 && packed->size(0) == N &&
                  packed->size(1) * 2 >= K,
              "packed must hold ", K, " codes of ", N, " rows, two in a byte");
  TORCH_CHECK(values.numel() == 16 && values.scalar_type() == at::kFloat && values.is_contiguous(),
              "a codebook of four bits has 16 values, float32");
  TORCH_CHECK(is_activation_dtype(dtype), "x must be float32, bfloat16 or float16, and is ", dtype);
  Codebook c{};
  std::copy_n(values.const_data_ptr<float>(), 16, c.values);
  c.packed = packed->const_data_ptr<uint8_t>(), c.row_bytes = packed->size(1);
  c.absmax = absmax->const_data_ptr<float>(), c.groups = groups, c.block = block, c.K = K;
  at::Tensor w(at::detail::empty_cpu({N, K}, dtype));
  c.out = w.data_ptr(), c.dtype = dtype;
  const Kernel& kernel = kernel_for(1);
  at::parallel_for(0, N, at::divup(FORK_BYTES, std::max<int64_t>(K, 1)), [&](int64_t n0, int64_t n1) {
    kernel.decode_rows(c, n0, n1);
  });
  return w;
}

inline at::Tensor codebook_linear(
    const at::Tensor& x, const at::Tensor& packed, const at::Tensor& absmax, const at::Tensor& values,
    int64_t block, const std::optional<at::Tensor>& bias) {
  const at::Tensor w = decoded(packed, absmax, values, block, x.size(-1), x.scalar_type());
  return at::linear(x, w, bias ? std::optional(bias->to(x.scalar_type())) : std::nullopt);
}

inline at::Tensor codebook_linear_backward(
    const at::Tensor& grad, const at::Tensor& packed, const at::Tensor& absmax, const at::Tensor& values,
    int64_t block, int64_t K) {
  return at::matmul(grad, decoded(packed, absmax, values, block, K, grad.scalar_type()));
}

}  // namespace int8fx
