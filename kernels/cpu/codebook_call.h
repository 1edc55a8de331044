// What the codebook operators ask of the kernels.
#pragma once

#include <cstdint>

#include <c10/core/ScalarType.h>

namespace int8fx {

// A weight [N, K] of four-bit codes.
struct Codebook {
  float values[16];
  const uint8_t* packed;  // [N, row_bytes]
  int64_t row_bytes;
  const float* absmax;    // [N, groups]
  int64_t groups, block, K;
  void* out;              // [N, K] of dtype
  c10::ScalarType dtype;  // fp32, bf16 or fp16
};

}  // namespace int8fx
