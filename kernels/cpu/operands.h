// Tensors of the operators: what they must be, and how kernels see them.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "dtypes.h"
#include "packed_weight.h"
#include "scratch.h"

namespace int8fx {

inline c10::MaybeOwned<at::Tensor> contiguous(const at::Tensor& tensor) {
  return tensor.expect_contiguous();
}

inline void check_activation(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(is_activation_dtype(dtype), "x must be float32, bfloat16 or float16, and is ", dtype);
  TORCH_CHECK(x.dim() > 0, "x must have a last dimension");
}

inline void check_weight(
    int64_t K, const at::Tensor& weight, const at::Tensor& w_scale,
    const std::optional<at::Tensor>& bias) {
  const int64_t N = w_scale.numel();
  TORCH_CHECK(w_scale.scalar_type() == at::kFloat, "w_scale must be float32");
  TORCH_CHECK(weight.scalar_type() == at::kChar && weight.dim() == 2 &&
                  weight.size(0) == at::divup(N, NR) &&
                  weight.size(1) == micro_panel_bytes(round_up(K, K_MULTIPLE)) && weight.is_contiguous(),
              "weight must be packed from int8 [", N, ", ", K, "]");
  TORCH_CHECK(!bias || bias->numel() == N, "bias must hold one value per output channel");
}

inline at::Tensor float_bias(const std::optional<at::Tensor>& bias) {
  if (!bias) return {};
  if (is_activation_dtype(bias->scalar_type())) return bias->contiguous();
  return bias->to(at::kFloat).contiguous();
}

inline at::Tensor empty_output(const at::Tensor& x_int8, int64_t N, at::ScalarType dtype) {
  at::DimVector sizes(x_int8.sizes());
  sizes.back() = N;
  return at::Tensor(at::detail::empty_cpu(sizes, dtype));
}

inline Weight describe(
    const at::Tensor& packed, const at::Tensor& w_scale, const at::Tensor& bias, at::Tensor& y) {
  Weight weight{};
  weight.N = w_scale.numel();
  weight.packed = packed.const_data_ptr<int8_t>();
  weight.w_scale = w_scale.const_data_ptr<float>();
  if (bias.defined()) {
    weight.bias = bias.const_data_ptr();
    weight.bias_dtype = bias.scalar_type();
  }
  weight.y = y.data_ptr();
  return weight;
}

}  // namespace int8fx
