// A product on all threads: rows are packed once, then threads take work items of rows x channels from
// a queue. An item keeps its packed rows in the L2 cache and streams each micro-panel of weights past
// them.
#pragma once

#include "kernel_choice.h"
#include "outliers.h"
#include "plan.h"
#include "queue.h"
#include "scratch.h"

namespace int8fx {

// One tile of rows and its outliers.
inline void pack(const Product& product, const Lhs& a, int64_t tile) {
  product.pack(a, tile);
  if (a.in.column_count == 0) return;
  with_dtype(a.in.dtype, [&]<class T>(T) { collect_outliers<T>(a, tile); });
}

inline void multiply_packed(const Product& product, const Lhs& a, c10::ArrayRef<Weight> weights) {
  int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const Plan plan(product, a, weights, threads);
  threads = std::min(threads, plan.items);
  Queue queue(plan.items, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    product.enter(a);
    for (int64_t thread = begin; thread < end; ++thread)
      queue.drain(thread, [&](int64_t item) { plan.execute(product, a, item); });
    product.leave();
  });
}

// y = ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias for each of the weights;
// or, weights only, (x @ w_int8ᵀ) · w_scale + bias.
// Given `floats`, a tile's rows are quantised where they are packed, while they are in the cache. Rows are
// padded to K_MULTIPLE, or to a length that is given.
inline void multiply_rows(
    const Product& product, const Activations& in, c10::ArrayRef<Weight> weights,
    const FloatRows* floats = nullptr, int64_t padded_length = 0) {
  Lhs a{in,
        {even_tiles(product, in.M), padded_length ? padded_length : round_up(in.K, K_MULTIPLE)},
        {}};
  const auto [tile_rows, K_padded] = a.tiling;
  const int64_t tiles = at::divup(in.M, tile_rows);
  // Rows of an AMX tile are 16, and the last tile is padded where there are more.
  const int64_t packed_rows = in.M < 16 ? in.M : round_up(in.M, 16);
  const int64_t packed_bytes = packed_rows * K_padded * product.element_bytes;
  const int64_t outlier_rows = in.column_count == 0 ? 0 : in.M;
  Scratch scratch(
      packed_bytes + Scratch::bytes_for<Outlier>(outlier_rows * in.column_count) +
      Scratch::bytes_for<int32_t>(outlier_rows) + Scratch::bytes_for<bool>(tiles) +
      Scratch::bytes_for<float>(in.M));
  a.packed.x = scratch.take<char>(packed_bytes);
  a.packed.row_scale = scratch.take<float>(in.M);
  a.packed.outliers = scratch.take<Outlier>(outlier_rows * in.column_count);
  a.packed.outlier_count = scratch.take<int32_t>(outlier_rows);
  a.packed.dense = scratch.take<bool>(tiles);

  const Kernel& kernel = kernel_for(in.M);
  const int64_t grain = at::divup(FORK_BYTES / (floats ? 4 : 1), tile_rows * K_padded);
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t m = tile * a.tiling.rows;
      if (floats) kernel.quantize_rows(*floats, m, std::min(m + a.tiling.rows, a.in.M));
      pack(product, a, tile);
    }
  });
  multiply_packed(product, a, weights);
}

}  // namespace int8fx
