// The operators of a CPU, and their registration. int8fx::attention is in attention_operator.h,
// int8fx::snapshot, joined and unchanged are in identity.h.
//
//   y = ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias

#include <string>
#include <vector>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "attention_operator.h"
#include "codebook_operator.h"
#include "grouped_operator.h"
#include "identity.h"
#include "multiply.h"
#include "operands.h"
#include "quantize_and_run.h"
#include "rotated_operator.h"
#include "storage.h"

using namespace std::string_literals;

namespace int8fx {
namespace {

void check(
    const at::Tensor& x_int8, const at::Tensor& x_scale, const at::Tensor& x_outlier,
    const std::optional<at::Tensor>& outlier_columns, const at::Tensor& weight,
    const at::Tensor& w_scale, const std::optional<at::Tensor>& bias) {
  const int64_t K = x_int8.size(-1);
  check_activation(x_outlier);
  TORCH_CHECK(x_int8.scalar_type() == at::kChar, "x_int8 must be int8");
  TORCH_CHECK(x_scale.scalar_type() == at::kFloat, "x_scale must be float32");
  TORCH_CHECK(K == 0 || x_scale.numel() * K == x_int8.numel(), "x_scale must hold one scale per row");
  TORCH_CHECK(!outlier_columns || (outlier_columns->scalar_type() == at::kBool &&
                                   outlier_columns->numel() == K &&
                                   x_outlier.numel() == x_int8.numel()),
              "outlier_columns must be bool [K], and x_outlier of x_int8's shape");
  check_weight(K, weight, w_scale, bias);
}

void run(
    const at::Tensor& x_int8_any, const at::Tensor& x_scale_any, const at::Tensor& x_outlier_any,
    const std::optional<at::Tensor>& outlier_columns, c10::ArrayRef<Weight> weights) {
  const auto x_int8 = contiguous(x_int8_any), x_scale = contiguous(x_scale_any),
             x_outlier = contiguous(x_outlier_any);
  Activations a{};
  a.M = x_scale->numel();
  a.K = x_int8->size(-1);
  a.x_int8 = x_int8->const_data_ptr<int8_t>();
  a.x_scale = x_scale->const_data_ptr<float>();
  a.x_outlier = x_outlier->const_data_ptr();
  a.dtype = x_outlier->scalar_type();
  std::vector<int32_t> columns;
  if (outlier_columns) {
    const auto flags = contiguous(*outlier_columns);
    columns = flagged(flags->const_data_ptr<bool>(), a.K);
    a.columns = columns.data();
    a.column_count = columns.size();
  }
  if (a.M > 0) multiply_rows(kernel_for(a.M).int8, a, weights);
}

void run_weight_only(const at::Tensor& x, c10::ArrayRef<Weight> weights) {
  Activations a{};
  a.K = x.size(-1);
  a.M = x.numel() / std::max<int64_t>(a.K, 1);
  a.x_outlier = x.const_data_ptr();
  a.dtype = x.scalar_type();
  if (a.M > 0) multiply_rows(kernel_for(a.M).weight_only(a), a, weights);
}

at::Tensor int8_linear(
    const at::Tensor& x_int8, const at::Tensor& x_scale, const at::Tensor& x_outlier,
    const std::optional<at::Tensor>& outlier_columns, const at::Tensor& weight,
    const at::Tensor& w_scale, const std::optional<at::Tensor>& bias) {
  check(x_int8, x_scale, x_outlier, outlier_columns, weight, w_scale, bias);
  const auto scale = contiguous(w_scale);
  const at::Tensor bias_floats = float_bias(bias);
  at::Tensor y = empty_output(x_int8, w_scale.numel(), x_outlier.scalar_type());
  run(x_int8, x_scale, x_outlier, outlier_columns, {describe(weight, *scale, bias_floats, y)});
  return y;
}

// quantize() and int8_linear() of every weight, in one call.
std::vector<at::Tensor> int8_linears(
    const at::Tensor& x_any, double threshold, c10::string_view decomposition,
    at::TensorList packed, at::TensorList w_scales, at::TensorList biases) {
  TORCH_CHECK(packed.size() == w_scales.size() && (biases.empty() || packed.size() == biases.size()),
              "weights and w_scales must be as many, and biases as many or none");
  const auto x = contiguous(x_any);
  check_activation(*x);
  std::vector<at::Tensor> converted, outputs;
  std::vector<Weight> weights;
  for (size_t i = 0; i < packed.size(); ++i) {
    const std::optional<at::Tensor> bias =
        biases.empty() ? std::nullopt : std::optional<at::Tensor>(biases[i]);
    check_weight(x->size(-1), packed[i], w_scales[i], bias);
    converted.push_back(w_scales[i].contiguous());
    converted.push_back(float_bias(bias));
    outputs.push_back(empty_output(*x, w_scales[i].numel(), x->scalar_type()));
    weights.push_back(describe(packed[i], converted[2 * i], converted[2 * i + 1], outputs.back()));
  }
  if (decomposition == "all") {
    run_weight_only(*x, weights);
  } else {
    quantize_and_run(*x, static_cast<float>(threshold), decomposition == "column", weights);
  }
  return outputs;
}

at::Tensor single_int8_linear(
    const at::Tensor& x, double threshold, c10::string_view decomposition, const at::Tensor& packed,
    const at::Tensor& w_scale, const std::optional<at::Tensor>& bias) {
  const at::TensorList biases = bias.has_value() ? at::TensorList(*bias) : at::TensorList();
  return int8_linears(x, threshold, decomposition, packed, w_scale, biases)[0];
}

at::Tensor once(const at::Tensor& x) { return x.clone(); }

TORCH_LIBRARY_FRAGMENT(int8fx, m) {
  m.def("snapshot(Tensor[] tensors) -> Tensor", snapshot);
  m.def("joined(Tensor[] snapshots) -> Tensor", joined);
  m.def("unchanged(Tensor[] tensors, Tensor snapshot, int first, int sets) -> bool", unchanged);
}

TORCH_LIBRARY_IMPL(int8fx, CPU, m) {
  m.impl("int8_linear", int8_linear);
  m.impl("once", once);  // for processes without Python's torch, see int8fx/ahead
  m.impl("attention", attention);
  m.impl("int8_linears", int8_linears);
  m.impl("int8_linears.single", single_int8_linear);
  m.impl("rotated_linears", rotated_linears);
  m.impl("rotated_linear", rotated_linear);
  m.impl("codebook_linear", codebook_linear);
  m.impl("codebook_linear_backward", codebook_linear_backward);
  m.impl("grouped_linears", grouped_linears);
  m.impl("grouped_linear", grouped_linear);
  m.impl("grouped_float_linears", grouped_float_linears);
  m.impl("grouped_float_linear", grouped_float_linear);
}

}  // namespace
}  // namespace int8fx

#define INT8FX_EXPORT extern "C" __attribute__((visibility("default")))

INT8FX_EXPORT const char* int8fx_isas() {
  static const std::string names = [] {
    std::string all;
    for (const int8fx::Kernel* kernel : int8fx::usable_kernels()) all += kernel->name + " "s;
    return all;
  }();
  return names.c_str();
}

// Use one kernel for every M, or with "auto" the best. False when this machine has no such kernel.
INT8FX_EXPORT bool int8fx_use_isa(const char* name) {
  const int8fx::Kernel* chosen = nullptr;
  for (const int8fx::Kernel* kernel : int8fx::usable_kernels())
    if (std::strcmp(kernel->name, name) == 0) chosen = kernel;
  if (!chosen && std::strcmp(name, "auto") != 0) return false;
  int8fx::forced_kernel = chosen;
  return true;
}

// Whoever asks for the data of a storage gets an error with this message; with none, the data again.
INT8FX_EXPORT void int8fx_forbid_data_access(c10::StorageImpl* storage, const char* message) {
  if (message)
    storage->release_data_and_set_meta_custom_data_ptr_error_msg_(std::string(message));
  else
    int8fx::allow_data_access(storage);
}
