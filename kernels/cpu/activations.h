// The left operand of a product: rows as the operator got them, how they are cut into tiles, and what
// packing them writes.
#pragma once

#include <cstdint>
#include <cstdlib>

#include <c10/core/ScalarType.h>

namespace int8fx {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

constexpr float MIN_SCALE = 0x1p-126f;  // kernels/ops/quantize_reference.py says why

// Float rows that are rotated before they are quantised (rotate.h), but for a few columns.
struct Rotation {
  int64_t block;               // 16, 32, ..., 256 columns
  int64_t K;                   // of the rotated rows: the rows' K rounded up to the block
  const float* signs;          // [block], times the factor of x
  const int32_t* columns;      // that stay as they are, ascending
  int64_t column_count;
  const int32_t* const* masks; // [K / block] of [block]: 0 at a column, else -1; null where none is
  float* x_columns;            // [M, column_count]: where they go
};

constexpr int64_t MAX_STATIC_COLUMNS = 64;

// Float rows to quantise, and where the result goes.
struct FloatRows {
  int64_t M, K;
  const void* x;               // [M, K] of dtype
  c10::ScalarType dtype;
  float threshold;             // 0: nothing is an outlier
  const int32_t* column_mask;  // [K rounded up to NR]: all ones where the column stays whole, 0 where
                               // it is taken out whole; or null: only the outliers are taken out
  const Rotation* rotation;    // or null; with one there are no outliers
  int8_t* x_int8;              // [M, K], or [M, rotation->K]
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
  const float* x_static;       // [M, static_count]: columns that every row has in float, with weights of
  int64_t static_count;        // their own (Weight::w_columns)
  int64_t groups;              // of weights that have their scales by groups along K
  float* group_sums;           // [M, groups]: of a row, written where it is packed
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
