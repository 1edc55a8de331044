// Where the outliers of a call are.
#pragma once

#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include <ATen/Parallel.h>

#include "kernel_table.h"
#include "scratch.h"

namespace int8fx {

constexpr int64_t FORK_BYTES = 64 << 10;  // of rows: less is not worth a second thread

// Columns that hold an outlier, ascending.
inline std::vector<int32_t> flagged(const bool* columns, int64_t K) {
  std::vector<int32_t> found;
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) {
    uint64_t eight;
    std::memcpy(&eight, columns + k, 8);
    if (eight == 0) continue;
    for (int64_t i = k; i < k + 8; ++i)
      if (columns[i]) found.push_back(i);
  }
  for (; k < K; ++k)
    if (columns[k]) found.push_back(k);
  return found;
}

// Collect the outliers of one tile of rows: of each row those that are not zero, or, when most are
// not, all flagged columns of all rows, which then share one read of the weights' columns.
template <class T>
void collect_outliers(const Lhs& a, int64_t tile) {
  const int64_t M = a.in.M, K = a.in.K, column_count = a.in.column_count;
  const int32_t* const columns = a.in.columns;
  const float threshold = a.in.threshold;
  const int64_t m0 = tile * a.tiling.rows;
  const int64_t rows = std::min(a.tiling.rows, M - m0);
  Outlier* const outliers = a.packed.outliers + m0 * column_count;
  const auto outlier = [&](int64_t r, int32_t k) {
    const float value = static_cast<const T*>(a.in.x_outlier)[(m0 + r) * K + k];
    // With a threshold, a NaN is no outlier; without, everything that is not zero is.
    return threshold == 0 || std::abs(value) >= threshold ? value : 0.0f;
  };
  int64_t non_zero = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t before = non_zero;
    for (int64_t i = 0; i < column_count; ++i) {
      const float value = outlier(r, columns[i]);
      outliers[non_zero] = {columns[i], value};
      non_zero += value != 0;
    }
    a.packed.outlier_count[m0 + r] = non_zero - before;
  }
  a.packed.dense[tile] = 4 * non_zero >= rows * column_count;
  if (!a.packed.dense[tile]) return;
  auto* values = reinterpret_cast<float*>(outliers);
  for (int64_t i = 0; i < column_count; ++i)
    for (int64_t r = 0; r < rows; ++r) *values++ = outlier(r, columns[i]);
}

// The columns of x that hold an outlier. Threads share the rows, which they read from end to end.
inline std::vector<int32_t> find_outlier_columns(const Kernel& kernel, const FloatRows& in) {
  const int64_t width = round_up(in.K, NR);
  std::vector<int32_t> flags(width);
  std::mutex mutex;
  at::parallel_for(0, in.M, at::divup(FORK_BYTES, in.K), [&](int64_t m0, int64_t m1) {
    if (m1 - m0 == in.M) return kernel.flag_columns(in, m0, m1, flags.data());
    std::vector<int32_t> found(width);
    kernel.flag_columns(in, m0, m1, found.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t k = 0; k < width; ++k) flags[k] |= found[k];
  });
  std::vector<int32_t> columns;
  for (int64_t k = 0; k < in.K; ++k)
    if (flags[k]) columns.push_back(k);
  return columns;
}

}  // namespace int8fx
