// int8fx::grouped_linears and grouped_float_linears, and each for one weight: kernels/ops/grouped_linear.py
// has the formulas.
#pragma once

#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "multiply.h"
#include "operands.h"
#include "rotated_operator.h"

namespace int8fx {

inline Zeros zeros_named(c10::string_view name) {
  if (name == "middle") return Zeros::MIDDLE;
  if (name == "integer") return Zeros::INTEGER;
  if (name == "float") return Zeros::FLOAT;
  TORCH_CHECK(name == "offset", "zeros must be middle, integer, float or offset, and is ", name);
  return Zeros::OFFSET;
}

// How K columns are cut into groups.
struct Grouping {
  int64_t groups, K_padded;

  // `group` -1 is all of K.
  Grouping(int64_t K, int64_t group) {
    TORCH_CHECK(group == -1 || (group > 0 && group % 16 == 0),
                "group must be a multiple of 16, or -1, and is ", group);
    groups = group == -1 ? 1 : at::divup(K, group);
    K_padded = group == -1 ? round_up(K, 8) : groups * group;
  }
};

inline Grid describe_grid(
    const at::Tensor& scale, Zeros zeros, const std::optional<at::Tensor>& zero_point, int64_t groups) {
  const auto fits = [&](const at::Tensor& part) {
    return part.dim() == 2 && part.size(0) == scale.size(0) && part.size(1) == groups && part.is_contiguous();
  };
  TORCH_CHECK(is_activation_dtype(scale.scalar_type()) && fits(scale),
              "scale must be float32, bfloat16 or float16 [N, ", groups, "]");
  Grid grid{scale.const_data_ptr(), scale.scalar_type(), zeros, nullptr, scale.scalar_type()};
  TORCH_CHECK(zero_point.has_value() == (zeros != Zeros::MIDDLE),
              "zero_point must be given but where zeros is middle");
  if (!zero_point) return grid;
  const auto dtype = zero_point->scalar_type();
  TORCH_CHECK(fits(*zero_point) && (zeros == Zeros::INTEGER ? dtype == at::kByte : is_activation_dtype(dtype)),
              "zero_point must be [N, ", groups, "], of uint8 or with float zeros and offsets of a float");
  grid.zero_point = zero_point->const_data_ptr();
  grid.zero_dtype = dtype;
  return grid;
}

// What the operators take of one linear.
struct GroupedOperands {
  at::Tensor packed, scale;
  std::optional<at::Tensor> zero_point, w_columns, columns, bias;
};

inline std::optional<at::Tensor> at_index(at::TensorList tensors, size_t i, size_t count, const char* name) {
  TORCH_CHECK(tensors.empty() || tensors.size() == count, name, " must be as many as weights, or none");
  return tensors.empty() ? std::nullopt : std::optional<at::Tensor>(tensors[i]);
}

// A weight as the kernels see it, and the tensors that it points into.
struct DescribedWeight {
  at::Tensor bias, y;
  Weight weight;

  DescribedWeight(const at::Tensor& x, const Grouping& grouping, Zeros zeros, const GroupedOperands& given)
      : bias(float_bias(given.bias)), weight{} {
    const int64_t N = given.scale.size(0);
    TORCH_CHECK(given.packed.scalar_type() == at::kByte && given.packed.dim() == 2 &&
                    given.packed.size(0) == at::divup(N, NR) &&
                    given.packed.size(1) == grouping.K_padded * NR / 2 && given.packed.is_contiguous(),
                "weight must be packed from 4-bit codes [", N, ", ", grouping.K_padded, "]");
    TORCH_CHECK(!given.bias || given.bias->numel() == N, "bias must hold one value per output channel");
    y = empty_output(x, N, x.scalar_type());
    weight.N = N;
    weight.packed = static_cast<const int8_t*>(given.packed.const_data_ptr());
    weight.grid = describe_grid(given.scale, zeros, given.zero_point, grouping.groups);
    weight.y = y.data_ptr();
    weight.columns_dtype = at::kFloat;
    if (bias.defined()) {
      weight.bias = bias.const_data_ptr();
      weight.bias_dtype = bias.scalar_type();
    }
    if (!given.columns) return;
    TORCH_CHECK(given.w_columns, "w_columns must be given with columns");
    check_columns(*given.columns, *given.w_columns, x.size(-1), N);
    weight.w_columns = given.w_columns->const_data_ptr();
    weight.columns_dtype = given.w_columns->scalar_type();
  }
};

// The weights whose columns are these, for which x is rotated and quantised once.
inline void quantize_and_multiply_groups(
    const at::Tensor& x, const int32_t* columns, int64_t count, int64_t block, RotationKind kind,
    const Grouping& grouping, c10::ArrayRef<Weight> weights) {
  FloatRows in{};
  in.K = x.size(-1);
  in.M = x.numel() / std::max<int64_t>(in.K, 1);
  if (in.M == 0) return;
  const bool rotated = kind != RotationKind::NONE;
  const float* const signs = rotated ? signs_of(block, kind) : nullptr;
  const int64_t K = rotated ? round_up(in.K, block) : in.K;
  Scratch scratch(
      Scratch::bytes_for<int8_t>(in.M * K) + Scratch::bytes_for<float>(in.M) +
      Scratch::bytes_for<float>(in.M * count) + Scratch::bytes_for<float>(in.M * grouping.groups));
  in.dtype = x.scalar_type();
  in.x_int8 = scratch.take<int8_t>(in.M * K);
  in.x_scale = scratch.take<float>(in.M);
  float* const x_columns = scratch.take<float>(in.M * count);
  const BlockMasks masks(columns, rotated ? count : 0, K, rotated ? block : K);
  const Rotation rotation{block, K, signs, columns, count, masks.data(), x_columns};
  const at::Tensor rest = rotated ? x : without_columns(x, columns, count, x_columns);
  in.x = rest.const_data_ptr();
  if (rotated) in.rotation = &rotation;

  Activations a{};
  a.M = in.M;
  a.K = K;
  a.x_int8 = in.x_int8;
  a.x_scale = in.x_scale;
  a.dtype = in.dtype;
  a.x_static = x_columns;
  a.static_count = count;
  a.groups = grouping.groups;
  a.group_sums = scratch.take<float>(in.M * grouping.groups);
  multiply_rows(kernel_for(in.M).grouped.int8_rows, a, weights, &in, grouping.K_padded);
}

inline void multiply_float_groups(
    const at::Tensor& x, const Grouping& grouping, c10::ArrayRef<Weight> weights) {
  Activations a{};
  a.K = x.size(-1);
  a.M = x.numel() / std::max<int64_t>(a.K, 1);
  if (a.M == 0) return;
  a.x_outlier = x.const_data_ptr();
  a.dtype = x.scalar_type();
  a.groups = grouping.groups;
  Scratch scratch(Scratch::bytes_for<float>(a.M * a.groups));
  a.group_sums = scratch.take<float>(a.M * a.groups);
  multiply_rows(kernel_for(a.M).grouped.float_rows, a, weights, nullptr, grouping.K_padded);
}

inline std::vector<at::Tensor> outputs_of(std::vector<DescribedWeight>& described) {
  std::vector<at::Tensor> outputs;
  for (auto& each : described) outputs.push_back(std::move(each.y));
  return outputs;
}

inline std::vector<at::Tensor> grouped_linears(
    const at::Tensor& x_any, int64_t group, c10::string_view zeros, int64_t most, c10::string_view rotation,
    at::TensorList packed, at::TensorList scales, at::TensorList zero_points, at::TensorList w_columns,
    at::TensorList columns, at::TensorList biases) {
  const auto x = contiguous(x_any);
  check_activation(*x);
  const RotationKind kind = rotation_kind(rotation);
  const int64_t K = x->size(-1), block = block_of(K, most, kind), count = packed.size();
  TORCH_CHECK(scales.size() == packed.size(), "scales must be as many as weights");
  const Grouping grouping(round_up(K, block), group);
  std::vector<DescribedWeight> described;
  for (int64_t i = 0; i < count; ++i)
    described.emplace_back(
        *x, grouping, zeros_named(zeros),
        GroupedOperands{packed[i], scales[i], at_index(zero_points, i, count, "zero_points"),
                        at_index(w_columns, i, count, "w_columns"), at_index(columns, i, count, "columns"),
                        at_index(biases, i, count, "biases")});
  std::vector<Weight> weights;
  for (const auto& each : described) weights.push_back(each.weight);
  by_columns(columns, weights, [&](size_t first, const std::vector<Weight>& same) {
    const int32_t* const k = columns.empty() ? nullptr : columns[first].const_data_ptr<int32_t>();
    quantize_and_multiply_groups(
        *x, k, columns.empty() ? 0 : columns[first].numel(), block, kind, grouping, same);
  });
  return outputs_of(described);
}

inline std::vector<at::Tensor> grouped_float_linears(
    const at::Tensor& x_any, int64_t group, c10::string_view zeros, at::TensorList packed,
    at::TensorList scales, at::TensorList zero_points, at::TensorList biases) {
  const auto x = contiguous(x_any);
  check_activation(*x);
  const size_t count = packed.size();
  TORCH_CHECK(scales.size() == count, "scales must be as many as weights");
  const Grouping grouping(x->size(-1), group);
  std::vector<DescribedWeight> described;
  std::vector<Weight> weights;
  for (size_t i = 0; i < count; ++i) {
    described.emplace_back(
        *x, grouping, zeros_named(zeros),
        GroupedOperands{packed[i], scales[i], at_index(zero_points, i, count, "zero_points"), std::nullopt,
                        std::nullopt, at_index(biases, i, count, "biases")});
    weights.push_back(described.back().weight);
  }
  multiply_float_groups(*x, grouping, weights);
  return outputs_of(described);
}

inline at::TensorList one_or_none(const std::optional<at::Tensor>& tensor) {
  return tensor ? at::TensorList(*tensor) : at::TensorList();
}

inline at::Tensor grouped_linear(
    const at::Tensor& x, int64_t group, c10::string_view zeros, int64_t block, c10::string_view rotation,
    const at::Tensor& packed, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
    const std::optional<at::Tensor>& w_columns, const std::optional<at::Tensor>& columns,
    const std::optional<at::Tensor>& bias) {
  return grouped_linears(
      x, group, zeros, block, rotation, packed, scale, one_or_none(zero_point), one_or_none(w_columns),
      one_or_none(columns), one_or_none(bias))[0];
}

inline at::Tensor grouped_float_linear(
    const at::Tensor& x, int64_t group, c10::string_view zeros, const at::Tensor& packed,
    const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
    const std::optional<at::Tensor>& bias) {
  return grouped_float_linears(
      x, group, zeros, packed, scale, one_or_none(zero_point), one_or_none(bias))[0];
}

}  // namespace int8fx
