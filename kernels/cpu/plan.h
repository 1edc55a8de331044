// How a product is cut into work items.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <c10/util/ArrayRef.h>

#include "kernel_table.h"
#include "scratch.h"

namespace int8fx {

constexpr int64_t MIN_ITEM_BYTES = 16 << 10;  // of weights, times tiles of rows: a microsecond of work
constexpr int64_t ITEMS_PER_THREAD = 32;      // so that no thread waits long for the last

inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

// Rows of a tile: as many as the product likes, or fewer, so that the last tile is not much shorter.
inline int64_t even_tiles(const Product& product, int64_t M) {
  const int64_t tiles = M <= product.mr_alone ? 1 : at::divup(M, product.mr);
  return round_up(at::divup(M, tiles), product.mr_step);
}

// What dense outliers take in the cache, for each row on average.
inline int64_t dense_outlier_bytes(const Lhs& a) {
  if (a.in.column_count == 0) return 0;
  const int64_t tiles = at::divup(a.in.M, a.tiling.rows);
  const bool* dense = a.packed.dense;
  return std::count(dense, dense + tiles, true) * a.in.column_count * sizeof(float) / tiles;
}

// Micro-panels [begin, end) of a weight.
struct PanelRange {
  const Weight* weight;
  int64_t begin, end;
};

// Every weight is cut into ranges of micro-panels, and rows into as many as half of an L2 cache holds.
// An item is a range of each.
struct Plan {
  std::vector<PanelRange> ranges;
  int64_t rows, items;

  Plan(const Product& product, const Lhs& a, c10::ArrayRef<Weight> weights, int64_t threads) {
    const auto [tile_rows, K_padded] = a.tiling;
    const int64_t row_bytes =
        std::max(K_padded, K_MULTIPLE) * product.element_bytes + dense_outlier_bytes(a);
    const int64_t cached_tiles = l2_bytes() / 2 / (row_bytes * tile_rows);
    rows = std::max<int64_t>(cached_tiles, 1) * tile_rows;
    const int64_t row_ranges = at::divup(a.in.M, rows);
    rows = round_up(at::divup(a.in.M, row_ranges), tile_rows);

    int64_t micro_panels = 0;
    for (const Weight& weight : weights) micro_panels += weight.micro_panels();
    const int64_t wanted = at::divup(micro_panels * row_ranges, threads * ITEMS_PER_THREAD);
    const int64_t tiles = at::divup(std::min(rows, a.in.M), tile_rows);
    const int64_t least = at::divup(MIN_ITEM_BYTES, micro_panel_bytes(K_padded) * tiles);
    const int64_t count = round_up(std::max(wanted, least), product.micro_panels);
    for (const Weight& weight : weights) {
      const int64_t end = weight.micro_panels();
      for (int64_t micro_panel = 0; micro_panel < end; micro_panel += count)
        ranges.push_back({&weight, micro_panel, std::min(micro_panel + count, end)});
    }
    items = row_ranges * ranges.size();
  }

  void execute(const Product& product, const Lhs& a, int64_t item) const {
    const int64_t m0 = item / ranges.size() * rows;
    const auto& [weight, begin, end] = ranges[item % ranges.size()];
    product.multiply(a, *weight, m0, std::min(m0 + rows, a.in.M), begin, end);
  }
};

}  // namespace int8fx
