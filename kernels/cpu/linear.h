// What the instruction-set-independent half (int8_linear.cpp) and the kernels (tile.h) share.
#pragma once

#include <cstdint>

#include <c10/core/ScalarType.h>

namespace int8fx {

// The packed weight: blocks of 16 output channels, each [K_padded / 4][16 n][4 k] int8 followed by
// the 16 int32 sums of its channels. 64 bytes are one vpdpbusd operand, 1024 one AMX tile.
constexpr int64_t BLOCK_N = 16;
constexpr int64_t K_MULTIPLE = 64;
constexpr int64_t SUMS_BYTES = BLOCK_N * sizeof(int32_t);

inline int64_t block_bytes(int64_t k_padded) { return k_padded * BLOCK_N + SUMS_BYTES; }

constexpr float MIN_SCALE = 0x1p-126f;  // kernels/ops/quantize_reference.py says why

// Float rows to quantise, and where the result goes.
struct Input {
  int64_t M, K;
  const void* x;         // [M, K] of dtype
  c10::ScalarType dtype;
  float threshold;       // 0: nothing is an outlier
  const int32_t* keep;   // [K rounded up to 16]: all ones where the column stays whole, 0 where it
                         // is taken out whole; or null: only the outliers themselves are taken out
  int8_t* x_int8;        // [M, K]
  float* x_scale;        // [M]
};

struct Outlier {
  int32_t k;
  float value;
};

// The activations of one call, and their form for the kernel, which every thread reads.
struct Activations {
  int64_t M, K, K_padded;
  const int8_t* x_int8;    // [M, K]
  const float* x_scale;    // [M]
  const void* x_outlier;   // [M, K] of dtype; in a weight-only product all of x
  float threshold;         // smaller values of x_outlier count as zeros
  c10::ScalarType dtype;   // fp32, bf16 or fp16; the output's too
  const int32_t* columns;  // the flagged columns, ascending
  int64_t column_count;

  int64_t row_tile;        // rows that the kernel multiplies at once; the last tile may be shorter
  void* packed;            // tiles of rows, in the kernel's order
  float* row_scale;        // [M], of rows that become integers where they are packed
  Outlier* outliers;       // those of a tile's rows, one row after the other, in ascending k; a
                           // tile's begin at its first row * column_count
  int32_t* outlier_count;  // [M]
  bool* dense;             // per tile: its outliers are float [column_count][rows] instead
};

struct Weight {
  int64_t N;
  const int8_t* packed;
  const float* w_scale;    // [N]
  const void* bias;        // [N] of bias_dtype, or null
  c10::ScalarType bias_dtype;
  void* y;                 // [M, N]

  int64_t blocks() const { return (N + BLOCK_N - 1) / BLOCK_N; }
};

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
constexpr int64_t UNIT_TILES = 4;    // of queries that share a block of keys, in one unit of work
constexpr int64_t MAX_QUERIES = 48;  // in a tile, whatever the instruction set
constexpr int64_t MAX_HEAD = 256;    // D and DV, at most
constexpr int64_t FEW_QUERIES = 16;  // rows of a key head: no more are worth a tile

// Floats of scratch memory that one unit takes.
constexpr int64_t ATTENTION_SCRATCH =
    KEYS * 2 * (MAX_HEAD + 16) + 2 * KEYS * MAX_QUERIES + UNIT_TILES * 2 * MAX_HEAD * MAX_QUERIES;

// Weights come from memory once per call or once per run of rows, and hardware prefetchers stop at
// each page. So while one panel is multiplied the next is fetched into the L2 cache, in slices:
// every tile of rows takes some lines at each step of K_MULTIPLE. A single tile comes to a line before
// that has helped: with each line that it multiplies it fetches the one `near` bytes on, into the L1
// cache. (One by one: 16 at a time keep the loads waiting that the product wants now.)
struct Prefetch {
  const int8_t* next;
  int64_t lines;  // per step
  int64_t near;   // or 0

  void step() {
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }

  // What is fetched near step k of B blocks side by side, of which each is followed by the one B later.
  template <int B>
  const int8_t* later(const int8_t* w, int64_t stride, int64_t k) const {
    return w + near + (k * BLOCK_N + near < stride ? 0 : (B - 1) * stride);
  }
};

// Rows in one form, and how they are multiplied with weights. `multiply` computes rows [m0, m1) x
// blocks [b0, b1) of y; m0 is a multiple of the row tile.
struct Product {
  int64_t row_tile;        // at most so many rows at once,
  int64_t one_tile;        // or so many where no others follow
  int64_t row_step;        // in multiples of so many
  int64_t panel;           // blocks that are multiplied at once
  int64_t element_bytes;   // of a packed activation
  void (*pack)(const Activations&, int64_t tile);
  void (*enter)(const Activations&);  // in every thread, around its calls of `multiply`
  void (*leave)();
  void (*multiply)(const Activations&, const Weight&, int64_t m0, int64_t m1, int64_t b0, int64_t b1);
};

// One instruction set.
struct Kernel {
  const char* name;
  bool (*supported)();
  int64_t min_rows;        // with fewer, the next kernel in the table is as fast
  // Sets flags [K rounded up to 16] to all ones where a column of rows [m0, m1) holds an outlier.
  void (*flag_columns)(const Input&, int64_t m0, int64_t m1, int32_t* flags);
  void (*quantize_rows)(const Input&, int64_t m0, int64_t m1);
  Product int8;
  const Product& (*weight_only)(const Activations&);  // x as it is
  int64_t queries;         // rows of an attention's tile
  // Unit `unit` of the B * KV * ceil(G * M / (UNIT_TILES * queries)) of an attention.
  void (*attend)(const Attention&, int64_t unit, float* scratch);
  // Few rows: keys [l0, l1) of a key head, and y from the parts of all its keys (few_queries.h).
  void (*attend_part)(
      const Attention&, int64_t head, int64_t l0, int64_t l1, float* part, float* scratch);
  void (*join_parts)(
      const Attention&, int64_t head, const float* parts, int64_t count, int64_t stride);
};

}  // namespace int8fx
