// The left operand of a product: rows as the operator got them, how they are cut into tiles, and what
// packing them writes.
#pragma once

#include <cstdint>

#include <c10/core/ScalarType.h>

namespace int8fx {

constexpr float MIN_SCALE = 0x1p-126f;  // kernels/ops/quantize_reference.py says why

// Float rows to quantise, and where the result goes.
struct FloatRows {
  int64_t M, K;
  const void* x;               // [M, K] of dtype
  c10::ScalarType dtype;
  float threshold;             // 0: nothing is an outlier
  const int32_t* column_mask;  // [K rounded up to NR]: all ones where the column stays whole, 0 where
                               // it is taken out whole; or null: only the outliers are taken out
  int8_t* x_int8;              // [M, K]
  float* x_scale;              // [M]
};

// What a call multiplies.
struct Activations {
  int64_t M, K;
  const int8_t* x_int8;        // [M, K]
  const float* x_scale;        // [M]
  const void* x_outlier;       // [M, K] of dtype; in a weight-only product all of x
  float threshold;             // smaller values of x_outlier count as zeros
  c10::ScalarType dtype;       // fp32, bf16 or fp16; the output's too
  const int32_t* columns;      // those that may hold an outlier, ascending
  int64_t column_count;
};

// How its rows are cut.
struct Tiling {
  int64_t rows;                // of a tile, at most MR; the last tile may be shorter
  int64_t K_padded;
};

struct Outlier {
  int32_t k;
  float value;
};

// Scratch memory of one call, written while rows are packed and then read by every thread.
struct PackedRows {
  void* x;                     // tiles of rows, in the order that the product reads them
  float* row_scale;            // [M], of rows that become integers where they are packed
  Outlier* outliers;           // those of a tile's rows, one row after the other, in ascending k; a
                               // tile's begin at its first row * column_count
  int32_t* outlier_count;      // [M]
  bool* dense;                 // per tile: its outliers are float [column_count][rows] instead
};

struct Lhs {
  Activations in;
  Tiling tiling;
  PackedRows packed;
};

}  // namespace int8fx
