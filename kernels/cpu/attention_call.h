// What an attention operator asks of the kernels.
#pragma once

#include <cstdint>

#include <c10/core/ScalarType.h>

namespace int8fx {

// One attention (attention.h). Strides are in elements, of batch, head and row; the last dimension is
// contiguous.
struct Attention {
  int64_t B, KV, G, M, L, D, DV;  // batches, key heads, query heads of each, queries, keys, widths
  const void *q, *k, *v;          // [B, KV * G, M, D], [B, KV, L, D], [B, KV, L, DV] of dtype
  void* y;                        // [B, KV * G, M, DV]
  c10::ScalarType dtype;          // fp32, bf16 or fp16
  const void* mask;               // [B, KV * G, M, L] added to the scores; bool: false hides; or null
  c10::ScalarType mask_dtype;
  bool causal;                    // key l is hidden from query m < l
  float scale;
  int64_t q_strides[3], k_strides[3], v_strides[3], y_strides[3], mask_strides[3];
};

constexpr int64_t KEYS = 64;         // in a block
constexpr int64_t ITEM_TILES = 4;    // of queries that share a block of keys, in one work item
constexpr int64_t MAX_QUERIES = 48;  // in a tile, whatever the instruction set
constexpr int64_t MAX_HEAD = 256;    // D and DV, at most
constexpr int64_t FEW_QUERIES = 16;  // rows of a key head: no more are worth a tile

// Floats of scratch memory that one work item takes.
constexpr int64_t ATTENTION_SCRATCH =
    KEYS * 2 * (MAX_HEAD + 16) + 2 * KEYS * MAX_QUERIES + ITEM_TILES * 2 * MAX_HEAD * MAX_QUERIES;

}  // namespace int8fx
