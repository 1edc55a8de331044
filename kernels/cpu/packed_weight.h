// Weights as the kernels read them; kernels/cpu/int8_linear.py packs them.
#pragma once

#include <cstdint>

#include <c10/core/ScalarType.h>

namespace int8fx {

// A packed weight is a row of micro-panels of NR output channels. Each is [K_padded / KR][NR][KR] int8,
// followed by the NR int32 sums of its channels. 64 bytes are one vpdpbusd operand, 1024 one AMX tile.
constexpr int64_t NR = 16;
constexpr int KR = 4;
constexpr int64_t K_MULTIPLE = 64;  // of K_padded

constexpr int64_t micro_panel_bytes(int64_t k_padded) { return k_padded * NR + NR * sizeof(int32_t); }

// What stands for 0 in a group of codes: kernels/formats/grouped.py.
enum class Zeros { MIDDLE, INTEGER, FLOAT, OFFSET };

// Of weights whose scales are by groups along K.
struct Grid {
  const void* scale;           // [N, G] of dtype
  c10::ScalarType dtype;
  Zeros zeros;
  const void* zero_point;      // [N, G]: uint8, or a float of zero_dtype; null for MIDDLE
  c10::ScalarType zero_dtype;
};

struct Weight {
  int64_t N;
  const int8_t* packed;
  const float* w_scale;        // [N]
  const void* bias;            // [N] of bias_dtype, or null
  c10::ScalarType bias_dtype;
  void* y;                     // [M, N], the output
  const void* w_columns;       // [static_count, N] of columns_dtype: of the columns of x in float
  c10::ScalarType columns_dtype;
  Grid grid;                   // in the place of w_scale

  int64_t micro_panels() const { return (N + NR - 1) / NR; }
};

}  // namespace int8fx
