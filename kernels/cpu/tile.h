// Outlier product, epilogue and the loops over micro-tiles. Part of kernel.h.
//
// A row's result is the same whatever rows come with it: integer sums are exact, outliers are added
// in ascending k in fp32, and a zero outlier adds exactly nothing, so it may be there or not.

// bf16 by round-to-nearest-even; adding could carry a NaN's mantissa away, so NaN is set apart.
inline void store_bfloat16(void* p, Floats v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words result = v == v ? rounded : Words{} + 0x7fc0;
  store(p, __builtin_convertvector(result, Halves));
}

template <class T>
inline void store_as(T* p, Floats v) {
  if constexpr (std::is_same_v<T, float>) {
    store(p, v);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    store_bfloat16(p, v);
  } else {
    Isa::store_half(p, v);
  }
}

// What the epilogue needs of 16 output channels.
struct Channels {
  int64_t n, count;
  Floats w_scale[PARTS], bias[PARTS];

  Channels(const Weight& weight, int64_t micro_panel)
      : n(micro_panel * NR), count(std::min(NR, weight.N - n)) {
    if (weight.w_scale) {
      read(weight.w_scale + n, w_scale);
    } else {
      std::memset(w_scale, 0, sizeof w_scale);
    }
    if (!weight.bias) {
      std::memset(bias, 0, sizeof bias);
    } else {
      with_dtype(weight.bias_dtype, [&]<class T>(T) {
        read(static_cast<const T*>(weight.bias) + n, bias);
      });
    }
  }

 private:
  template <class T>
  void read(const T* from, Floats* to) const {
    float values[NR] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
    std::memcpy(to, values, sizeof values);
  }
};

// One column of a micro-panel: byte k % KR of each int32 lane, sign-extended.
inline Floats weight_column(const int8_t* micro_panel, int part, uint32_t k) {
  static constexpr uint32_t SHIFTS[KR] = {24, 16, 8, 0};  // a lane-wise shift: one instruction
  const Words quad = load<Words>(micro_panel + k / KR * (KR * NR) + part * sizeof(Words));
  const Words top = quad << (Words{} + SHIFTS[k % KR]);
  return __builtin_convertvector((Ints)top >> 24, Floats);
}

// R rows x B micro-panels of the outlier product: column(i, v) is vector v of the i-th outlier column
// of the weights, and value(i, r) a row's.
template <int R, int B, class Column, class Value>
inline void outlier_product(int64_t count, const Column& column, const Value& value, float* out) {
  constexpr int WIDTH = B * PARTS;
  Floats sums[R][WIDTH] = {};
  for (int64_t i = 0; i < count; ++i) {
    Floats columns[WIDTH];
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) columns[v] = column(i, v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float factor = value(i, r);
#pragma GCC unroll 8
      for (int v = 0; v < WIDTH; ++v) sums[r][v] += columns[v] * factor;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) store(out + r * Isa::MICRO_PANELS * NR + v * LANES, sums[r][v]);
  }
}

// The outlier columns of the weights of a micro-tile.
struct OutlierColumns {
  const Lhs& a;
  const int8_t* w;
  int64_t w_stride;
  int64_t converted = 0;
  alignas(64) float floats[64 * Isa::MICRO_PANELS * NR];

  OutlierColumns(const Lhs& a, const int8_t* w, int64_t w_stride)
      : a(a), w(w), w_stride(w_stride) {}

  Floats vector(int64_t k, int v) const {
    return weight_column(w + v / PARTS * w_stride, v % PARTS, k);
  }
  // The first of them as floats, once for all tiles: as many as the L1 cache has room for.
  template <int B>
  void convert() {
    constexpr int64_t MOST = sizeof floats / sizeof(float) / (Isa::MICRO_PANELS * NR);
    for (const int64_t end = std::min(MOST, a.in.column_count); converted < end; ++converted)
      for (int v = 0; v < B * PARTS; ++v)
        store(
            floats + converted * Isa::MICRO_PANELS * NR + v * LANES,
            vector(a.in.columns[converted], v));
  }
};

// R rows at a time, of a tile whose outliers are [column][row], for as many as there are.
template <int R, int B>
inline void dense_rows(
    const OutlierColumns& weights, const float* values, int64_t rows, int64_t& r, float* out) {
  for (; r + R <= rows; r += R) {
    const auto value = [=](int64_t i, int row) { return values[i * rows + r + row]; };
    for (int b = 0; b < B; ++b) {
      const auto column = [&](int64_t i, int v) {
        if (i < weights.converted)
          return load<Floats>(weights.floats + (i * Isa::MICRO_PANELS + b) * NR + v * LANES);
        return weights.vector(weights.a.in.columns[i], b * PARTS + v);
      };
      outlier_product<R, 1>(
          weights.a.in.column_count, column, value, out + (r * Isa::MICRO_PANELS + b) * NR);
    }
  }
}

// out [rows][MICRO_PANELS * 16] = the outlier product of the tile of rows that begins at m.
template <int B>
void outlier_tile(OutlierColumns& weights, int64_t m, int64_t rows, float* out) {
  const Lhs& a = weights.a;
  const Outlier* outliers = a.packed.outliers + m * a.in.column_count;
  int64_t r = 0;
  if (a.packed.dense[m / a.tiling.rows]) {
    weights.convert<B>();
    const auto* values = reinterpret_cast<const float*>(outliers);
    dense_rows<Isa::OUTLIER_ROWS, B>(weights, values, rows, r, out);
    dense_rows<4, B>(weights, values, rows, r, out);
    dense_rows<1, B>(weights, values, rows, r, out);
  }
  for (; r < rows; ++r) {
    const int64_t count = a.packed.outlier_count[m + r];
    const auto column = [&](int64_t i, int v) { return weights.vector(outliers[i].k, v); };
    const auto value = [&](int64_t i, int) { return outliers[i].value; };
    outlier_product<1, B>(count, column, value, out + r * Isa::MICRO_PANELS * NR);
    outliers += count;
  }
}

// y = value(r, p) + bias for rows m + r of 16 channels, whose vectors are p.
template <class T, class F>
inline void finish(
    const Weight& weight, int64_t m, int64_t rows, const Channels& c, const F& value) {
  T* y = static_cast<T*>(weight.y) + m * weight.N + c.n;
  for (int64_t r = 0; r < rows; ++r, y += weight.N) {
    T part_of_micro_panel[NR];
    T* out = c.count == NR ? y : part_of_micro_panel;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p)
      store_as(out + p * LANES, value(r, p) + c.bias[p]);
    if (c.count < NR) std::memcpy(static_cast<void*>(y), out, c.count * sizeof(T));
  }
}

// The micro-panels after [micro_panel, micro_panel + count), while `rows` rows are multiplied with
// these.
inline Prefetch next_micro_panels(
    const Lhs& a, const Weight& weight, int64_t rows, int64_t micro_panel, int64_t count) {
  const int64_t tiles = (rows + a.tiling.rows - 1) / a.tiling.rows;
  const int64_t left = weight.micro_panels() - micro_panel - count;
  const int64_t lines = left > 0 ? (count * NR + tiles - 1) / tiles : 0;
  return {weight.packed + (micro_panel + count) * micro_panel_bytes(a.tiling.K_padded), lines, 0};
}

// How many micro-panels at once a call multiplies, and how far ahead it fetches them. Rows that are a
// single tile read each weight once, as fast as memory gives it. On Zen 5, beside pairs of micro-panels and the
// next pair ahead, linears of 576 columns take 0.92 of the time at 2 and 4 rows, 0.84 at 8 and 0.88 at 16,
// and those of 1600 to 14336 columns 0.9 at 4 rows, 0.85 at 8, and 0.83 at 12 and 16.
struct Reading {
  int64_t micro_panels, near;
  bool once;
};
constexpr int64_t LONG_K = 1024;

inline Reading reading(const Lhs& a, int64_t int8_rows) {
  if (!FETCHES_NEAR || a.in.M > a.tiling.rows) return {Isa::MICRO_PANELS, 0, false};
  if (a.in.K < LONG_K || int8_rows > 6) return {1, 12 << 10, true};
  // A single row of long micro-panels is what hardware prefetchers are made for.
  return {Isa::MICRO_PANELS, int8_rows > 1 ? 4 << 10 : 0, true};
}

// What the rows of a tile give: LLM.int8()'s, an integer product and an outlier product.
struct MixedRows {
  static constexpr int INT8_ROWS = 1;  // in the integer product, for a row of x
  const Lhs& a;
  OutlierColumns columns;
  alignas(64) float outlier[Isa::MR_ALONE * Isa::MICRO_PANELS * NR];

  MixedRows(const Lhs& a, const Weight&, int64_t, const int8_t* w, int64_t w_stride)
      : a(a), columns(a, w, w_stride) {}

  template <int B>
  void begin(int64_t m, int64_t rows) {
    if (a.in.column_count) outlier_tile<B>(columns, m, rows, outlier);
  }
  // Vector p of micro-panel b: of row m + r, whose integer sums are in acc.
  Floats value(const int32_t* acc, int64_t m, int64_t r, int b, int p, Floats w_scale) const {
    const int64_t at = (r * Isa::MICRO_PANELS + b) * NR + p * LANES;
    const Floats product = __builtin_convertvector(load<Ints>(acc + at), Floats);
    const Floats extra = a.in.column_count ? load<Floats>(outlier + at) : Floats{};
    return (product * a.in.x_scale[m + r] + extra) * w_scale;
  }
};

#include "static_columns.h"

// The lines of y that a tile writes: by the time it is multiplied they are in the cache.
template <class T, int B>
inline void fetch_output(const Weight& weight, int64_t m, int64_t rows, int64_t n) {
  const T* y = static_cast<const T*>(weight.y) + m * weight.N + n;
  for (int64_t r = 0; r < rows; ++r, y += weight.N)
    for (size_t i = 0; i < B * NR; i += 64 / sizeof(T)) __builtin_prefetch(y + i, 1, 3);
}

template <class Rows, class T, int B>
void multiply_micro_panels(
    const Lhs& a, const Weight& weight, int64_t m0, int64_t m1, int64_t micro_panel,
    const Reading& how) {
  alignas(64) int32_t acc[Isa::MR_ALONE * Isa::MICRO_PANELS * NR];
  const int64_t stride = micro_panel_bytes(a.tiling.K_padded);
  const int8_t* w = weight.packed + micro_panel * stride;
  const Channels channels[2] = {{weight, micro_panel}, {weight, micro_panel + B - 1}};
  Rows tile{a, weight, micro_panel, w, stride};
  Prefetch ahead =
      how.once ? Prefetch{nullptr, 0, how.near} : next_micro_panels(a, weight, m1 - m0, micro_panel, B);
  for (int64_t m = m0; m < m1; m += a.tiling.rows) {
    const int64_t rows = std::min(a.tiling.rows, m1 - m);
    fetch_output<T, B>(weight, m, rows, channels[0].n);
    tile_product<B>(a, m * Rows::INT8_ROWS, rows * Rows::INT8_ROWS, w, stride, acc, ahead);
    ahead.next += a.tiling.K_padded * ahead.lines;
    tile.template begin<B>(m, rows);
    for (int b = 0; b < B; ++b)
      finish<T>(weight, m, rows, channels[b], [&](int64_t r, int p) {
        return tile.value(acc, m, r, b, p, channels[b].w_scale[p]);
      });
  }
}

template <class Rows, class T>
void multiply_rows(
    const Lhs& a, const Weight& weight, int64_t m0, int64_t m1, int64_t begin, int64_t end) {
  const Reading how = reading(a, a.in.M * Rows::INT8_ROWS);
  if (how.micro_panels == Isa::MICRO_PANELS)
    for (; begin + Isa::MICRO_PANELS <= end; begin += Isa::MICRO_PANELS)
      multiply_micro_panels<Rows, T, Isa::MICRO_PANELS>(a, weight, m0, m1, begin, how);
  for (; begin < end; ++begin) multiply_micro_panels<Rows, T, 1>(a, weight, m0, m1, begin, how);
}

void multiply(
    const Lhs& a, const Weight& weight, int64_t m0, int64_t m1, int64_t begin, int64_t end) {
  with_dtype(a.in.dtype, [&]<class T>(T) {
    if (a.in.static_count) return multiply_rows<StaticRows, T>(a, weight, m0, m1, begin, end);
    multiply_rows<MixedRows, T>(a, weight, m0, m1, begin, end);
  });
}
