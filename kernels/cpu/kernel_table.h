// What the operators, which know no instruction set, ask of one: the columns of isa/table.h.
#pragma once

#include "activations.h"
#include "attention_call.h"
#include "codebook_call.h"
#include "dtypes.h"
#include "packed_weight.h"

namespace int8fx {

// Rows in one form, and how they are multiplied with weights. `multiply` computes rows [m0, m1) x
// micro-panels [begin, end) of y; m0 is a multiple of the tiling's rows.
struct Product {
  int64_t mr;              // rows of a micro-tile, at most,
  int64_t mr_alone;        // or so many where no others follow,
  int64_t mr_step;         // in multiples of so many
  int64_t micro_panels;          // micro-panels of a micro-tile, at most
  int64_t element_bytes;   // of a packed activation
  void (*pack)(const Lhs&, int64_t tile);
  void (*enter)(const Lhs&);  // in every thread, around its calls of `multiply`
  void (*leave)();
  void (*multiply)(
      const Lhs&, const Weight&, int64_t m0, int64_t m1, int64_t begin, int64_t end);
};

// With weights of four bits by groups along K.
struct GroupedProducts {
  Product int8_rows, float_rows;
};

// One instruction set.
struct Kernel {
  const char* name;
  bool (*supported)();
  int64_t min_rows;        // with fewer, the next kernel in the table is as fast
  // Sets flags [K rounded up to NR] to all ones where a column of rows [m0, m1) holds an outlier.
  void (*flag_columns)(const FloatRows&, int64_t m0, int64_t m1, int32_t* flags);
  void (*quantize_rows)(const FloatRows&, int64_t m0, int64_t m1);
  Product int8;
  const Product& (*weight_only)(const Activations&);  // x as it is
  GroupedProducts grouped;
  void (*decode_rows)(const Codebook&, int64_t n0, int64_t n1);
  int64_t queries;         // rows of an attention's tile
  // Work item `item` of the B * KV * ceil(G * M / (ITEM_TILES * queries)) of an attention.
  void (*attend)(const Attention&, int64_t item, float* scratch);
  // Few rows: keys [l0, l1) of a key head, and y from the parts of all its keys (few_queries.h).
  void (*attend_part)(
      const Attention&, int64_t head, int64_t l0, int64_t l1, float* part, float* scratch);
  void (*join_parts)(
      const Attention&, int64_t head, const float* parts, int64_t count, int64_t stride);
};

}  // namespace int8fx
