// LLM.int8() of rows in float: outliers are found, rows quantised, and multiplied with each weight.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "multiply.h"
#include "scratch.h"

namespace int8fx {

// Given columns of x in float, which are 0 in x, with weights of their own (Weight::w_columns), their
// products are added.
inline void quantize_and_run(
    const at::Tensor& x, float threshold, bool column, c10::ArrayRef<Weight> weights,
    const float* x_static = nullptr, int64_t static_count = 0) {
  FloatRows in{};
  in.K = x.size(-1);
  in.M = x.numel() / std::max<int64_t>(in.K, 1);
  in.x = x.const_data_ptr();
  in.dtype = x.scalar_type();
  in.threshold = threshold;
  if (in.M == 0) return;
  const Kernel& kernel = kernel_for(in.M);
  std::vector<int32_t> columns;
  if (threshold > 0) columns = find_outlier_columns(kernel, in);

  Scratch scratch(Scratch::bytes_for<int8_t>(in.M * in.K) + Scratch::bytes_for<float>(in.M));
  in.x_int8 = scratch.take<int8_t>(in.M * in.K);
  in.x_scale = scratch.take<float>(in.M);
  std::vector<int32_t> mask;
  if (columns.empty()) {
    in.threshold = 0;
  } else if (column) {
    mask.assign(round_up(in.K, NR), -1);
    for (const int32_t k : columns) mask[k] = 0;
    in.column_mask = mask.data();
  }
  Activations a{};
  a.M = in.M;
  a.K = in.K;
  a.x_int8 = in.x_int8;
  a.x_scale = in.x_scale;
  a.x_outlier = in.x;
  a.threshold = column ? 0 : threshold;  // a column is taken out whole
  a.dtype = in.dtype;
  a.columns = columns.data();
  a.column_count = columns.size();
  a.x_static = x_static;
  a.static_count = static_count;
  multiply_rows(kernel.int8, a, weights, &in);
}

}  // namespace int8fx
