// int8fx::rotated_linears and rotated_linear: kernels/ops/rotated_linear.py has the formula.
#pragma once

#include <array>
#include <bit>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "multiply.h"
#include "operands.h"
#include "quantize_and_run.h"

namespace int8fx {

constexpr int64_t LEAST_BLOCK = 16, LARGEST_BLOCK = 256;

// A name of kernels/ops/rotation.py.
enum class RotationKind { HADAMARD, RANDOM_SIGNS, CONVROT, NONE };

inline RotationKind rotation_kind(c10::string_view name) {
  if (name == "hadamard") return RotationKind::HADAMARD;
  if (name == "random-signs") return RotationKind::RANDOM_SIGNS;
  if (name == "convrot") return RotationKind::CONVROT;
  TORCH_CHECK(name == "none", "rotation must be hadamard, random-signs, convrot or none, and is ", name);
  return RotationKind::NONE;
}

// The size of a block of K columns, at most `most`: the largest that divides K, or else `most`.
inline int64_t block_of(int64_t K, int64_t most, RotationKind kind) {
  if (kind == RotationKind::NONE) return 1;
  const auto allowed = [kind](int64_t size) {
    const bool power_of_4 = std::countr_zero(static_cast<uint64_t>(size)) % 2 == 0;
    return size >= LEAST_BLOCK && size <= LARGEST_BLOCK && std::has_single_bit(static_cast<uint64_t>(size)) &&
           (kind != RotationKind::CONVROT || power_of_4);
  };
  TORCH_CHECK(allowed(most), "block must be a power of 2 (of convrot, a power of 4) from ", LEAST_BLOCK,
              " to ", LARGEST_BLOCK, ", and is ", most);
  for (int64_t size = most; size >= LEAST_BLOCK; size /= 2)
    if (allowed(size) && K % size == 0) return size;
  return most;
}

inline bool is_negative(int j, RotationKind kind) {
  static constexpr uint64_t RANDOM_BITS[] = {
      0x629f6fbed82c07cd, 0xe3e70682c2094cac, 0x0a5d2f346baa9455, 0xf728b4fa42485e3a};
  if (kind == RotationKind::RANDOM_SIGNS) return RANDOM_BITS[j / 64] >> (j % 64) & 1;
  return std::popcount(static_cast<unsigned>(j & (j >> 1) & 0x55)) % 2;
}

// The signs of a block's columns, times the factor of x.
struct Signs {
  std::array<float, LARGEST_BLOCK> of_columns;

  Signs(int64_t size, RotationKind kind) {
    const float factor = 1.0f / (1 << std::countr_zero(static_cast<uint64_t>(size)) / 2);
    for (int64_t j = 0; j < size; ++j) of_columns[j] = is_negative(j, kind) ? -factor : factor;
  }
};

// Each is computed once: for a row of 576 columns it would take as long as the rotation.
inline const float* signs_of(int64_t size, RotationKind kind) {
  static const auto tables = [] {
    std::vector<Signs> all;
    for (const auto each : {RotationKind::HADAMARD, RotationKind::RANDOM_SIGNS, RotationKind::CONVROT})
      for (int64_t block = LEAST_BLOCK; block <= LARGEST_BLOCK; block *= 2) all.emplace_back(block, each);
    return all;
  }();
  constexpr int SIZES = std::countr_zero(static_cast<uint64_t>(LARGEST_BLOCK / LEAST_BLOCK)) + 1;
  const int of_size = std::countr_zero(static_cast<uint64_t>(size / LEAST_BLOCK));
  return tables[static_cast<int>(kind) * SIZES + of_size].of_columns.data();
}

// Which columns of a block stay as they are, for each block of rows of K columns.
class BlockMasks {
 public:
  BlockMasks(const int32_t* columns, int64_t count, int64_t K, int64_t block) : of_block_(K / block) {
    masks_.reserve(count * block);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t*& mask = of_block_[columns[i] / block];
      if (!mask) {
        mask = masks_.data() + masks_.size();
        masks_.resize(masks_.size() + block, -1);
      }
      masks_[mask - masks_.data() + columns[i] % block] = 0;
    }
  }
  const int32_t* const* data() const { return of_block_.data(); }

 private:
  std::vector<const int32_t*> of_block_;
  std::vector<int32_t> masks_;
};

inline void check_columns(const at::Tensor& columns, const at::Tensor& w_columns, int64_t K, int64_t N) {
  const int64_t count = columns.numel();
  TORCH_CHECK(columns.scalar_type() == at::kInt && columns.dim() == 1 && columns.is_contiguous() &&
                  count <= MAX_STATIC_COLUMNS,
              "columns must be int32 [C], with C at most ", MAX_STATIC_COLUMNS);
  TORCH_CHECK(is_activation_dtype(w_columns.scalar_type()) && w_columns.dim() == 2 &&
                  w_columns.size(0) == count && w_columns.size(1) == N && w_columns.is_contiguous(),
              "w_columns must be float32, bfloat16 or float16 [", count, ", ", N, "], a row for each of the columns");
  const auto* k = columns.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK(k[i] >= 0 && k[i] < K && (i == 0 || k[i] > k[i - 1]),
                "columns must ascend from 0 to ", K - 1);
}

inline bool same_columns(const at::Tensor& left, const at::Tensor& right) {
  const auto *a = left.const_data_ptr<int32_t>(), *b = right.const_data_ptr<int32_t>();
  return left.numel() == right.numel() && std::equal(a, a + left.numel(), b);
}

// f(first, weights) for the weights of each distinct list of columns, `first` being the first of them: x is
// quantised once for all of these. Without lists, all weights are of one.
template <class F>
void by_columns(at::TensorList columns, const std::vector<Weight>& weights, const F& f) {
  std::vector<bool> done(weights.size());
  for (size_t first = 0; first < weights.size(); ++first) {
    if (done[first]) continue;
    std::vector<Weight> same;
    for (size_t i = first; i < weights.size(); ++i) {
      if (done[i] || (!columns.empty() && !same_columns(columns[first], columns[i]))) continue;
      same.push_back(weights[i]);
      done[i] = true;
    }
    f(first, same);
  }
}

// The weights whose columns are these, for which x is rotated once.
inline void rotate_and_run(
    const at::Tensor& x, const at::Tensor& columns, int64_t block, RotationKind kind,
    c10::ArrayRef<Weight> weights) {
  FloatRows in{};
  in.K = x.size(-1);
  in.M = x.numel() / std::max<int64_t>(in.K, 1);
  if (in.M == 0) return;
  const auto* const k = columns.const_data_ptr<int32_t>();
  const BlockMasks masks(k, columns.numel(), round_up(in.K, block), block);
  Rotation rotation{block, round_up(in.K, block), signs_of(block, kind), k, columns.numel(), masks.data(),
                    nullptr};
  Scratch scratch(
      Scratch::bytes_for<int8_t>(in.M * rotation.K) + Scratch::bytes_for<float>(in.M) +
      Scratch::bytes_for<float>(in.M * rotation.column_count));
  in.x = x.const_data_ptr();
  in.dtype = x.scalar_type();
  in.x_int8 = scratch.take<int8_t>(in.M * rotation.K);
  in.x_scale = scratch.take<float>(in.M);
  rotation.x_columns = scratch.take<float>(in.M * rotation.column_count);
  in.rotation = &rotation;

  Activations a{};
  a.M = in.M;
  a.K = rotation.K;
  a.x_int8 = in.x_int8;
  a.x_scale = in.x_scale;
  a.dtype = in.dtype;
  a.x_static = rotation.x_columns;
  a.static_count = rotation.column_count;
  multiply_rows(kernel_for(in.M).int8, a, weights, &in);
}

// x with 0 at some columns, which go to x_columns [M, count].
inline at::Tensor without_columns(const at::Tensor& x, const int32_t* k, int64_t count, float* x_columns) {
  if (count == 0) return x;
  const at::Tensor rest = x.clone();
  const int64_t K = x.size(-1), M = x.numel() / K;
  with_dtype(x.scalar_type(), [&]<class T>(T) {
    T* row = static_cast<T*>(rest.data_ptr());
    for (int64_t m = 0; m < M; ++m, row += K)
      for (int64_t i = 0; i < count; ++i) {
        x_columns[m * count + i] = row[k[i]];
        row[k[i]] = T(0.0f);
      }
  });
  return rest;
}

// Rows that are not rotated: without the columns, and with their outliers taken out one by one.
inline void quantize_beside_columns(
    const at::Tensor& x, float threshold, const at::Tensor& columns, c10::ArrayRef<Weight> weights) {
  const int64_t M = x.numel() / std::max<int64_t>(x.size(-1), 1), count = columns.numel();
  if (M == 0) return;
  Scratch scratch(Scratch::bytes_for<float>(M * count));
  float* const x_columns = scratch.take<float>(M * count);
  const at::Tensor rest = without_columns(x, columns.const_data_ptr<int32_t>(), count, x_columns);
  quantize_and_run(rest, threshold, false, weights, x_columns, count);
}

inline std::vector<at::Tensor> rotated_linears(
    const at::Tensor& x_any, double threshold, int64_t most, c10::string_view rotation, at::TensorList packed,
    at::TensorList w_scales, at::TensorList w_columns, at::TensorList columns, at::TensorList biases) {
  const size_t count = packed.size();
  TORCH_CHECK(w_scales.size() == count && columns.size() == count && w_columns.size() == count &&
                  (biases.empty() || biases.size() == count),
              "weights, w_scales, columns and w_columns must be as many, and biases as many or none");
  const auto x = contiguous(x_any);
  check_activation(*x);
  const RotationKind kind = rotation_kind(rotation);
  TORCH_CHECK(kind == RotationKind::NONE || threshold == 0, "rows that are rotated have no outliers: threshold must be 0, and is ", threshold);
  const int64_t K = x->size(-1), block = block_of(K, most, kind);
  std::vector<at::Tensor> converted, outputs;
  std::vector<Weight> weights;
  converted.reserve(2 * count);
  outputs.reserve(count);
  weights.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const std::optional<at::Tensor> bias =
        biases.empty() ? std::nullopt : std::optional<at::Tensor>(biases[i]);
    check_weight(round_up(K, block), packed[i], w_scales[i], bias);
    check_columns(columns[i], w_columns[i], K, w_scales[i].numel());
    converted.push_back(w_scales[i].contiguous());
    converted.push_back(float_bias(bias));
    outputs.push_back(empty_output(*x, w_scales[i].numel(), x->scalar_type()));
    weights.push_back(describe(packed[i], converted[2 * i], converted[2 * i + 1], outputs.back()));
    weights.back().w_columns = w_columns[i].const_data_ptr();
    weights.back().columns_dtype = w_columns[i].scalar_type();
  }
  by_columns(columns, weights, [&](size_t first, const std::vector<Weight>& same) {
    if (kind == RotationKind::NONE) {
      quantize_beside_columns(*x, static_cast<float>(threshold), columns[first], same);
    } else {
      rotate_and_run(*x, columns[first], block, kind, same);
    }
  });
  return outputs;
}

inline at::Tensor rotated_linear(
    const at::Tensor& x, double threshold, int64_t block, c10::string_view rotation, const at::Tensor& packed,
    const at::Tensor& w_scale, const at::Tensor& w_columns, const at::Tensor& columns,
    const std::optional<at::Tensor>& bias) {
  const at::TensorList biases = bias.has_value() ? at::TensorList(*bias) : at::TensorList();
  return rotated_linears(x, threshold, block, rotation, packed, w_scale, w_columns, columns, biases)[0];
}

}  // namespace int8fx
