// The part of a kernel that is the same for every instruction set: outlier product, epilogue and
// the walk over tiles. No include guard: int8_linear.cpp includes it once per instruction set, in a
// namespace and under a target pragma of its own, after the types and functions it builds on:
//
//   ROW_TILE, PANEL        rows x blocks of 16 channels in one tile
//   OUTLIER_ROWS           rows that share one walk over the outlier columns
//   pack_tile              int8 rows to the order that `tile_product` reads
//   tile_product           int8 x int8 -> int32 [rows][PANEL * 16], exact
//   store_half             16 floats to fp16
//
// Vectors are GCC's and clang's: 16 lanes are one zmm, two ymm or four NEON registers.
// A row's result is the same whatever rows come with it: integer sums are exact, outliers are added
// in ascending k in fp32, and a zero outlier adds exactly nothing, so it may be there or not.

template <class V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// bf16 by round-to-nearest-even; adding could carry a NaN's mantissa away, so NaN is set apart.
inline void store_bfloat16(void* p, F32x16 v) {
  const U32x16 bits = (U32x16)v;
  const U32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32x16 result = v == v ? rounded : U32x16{} + 0x7fc0;
  store(p, __builtin_convertvector(result, U16x16));
}

template <class T>
inline void store_as(T* p, F32x16 v) {
  if constexpr (std::is_same_v<T, float>) {
    store(p, v);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    store_bfloat16(p, v);
  } else {
    store_half(p, v);
  }
}

template <class T>
inline F32x16 load_floats(const T* p, int64_t count) {
  float values[BLOCK_N] = {};
  if (count == BLOCK_N) {
    for (int64_t i = 0; i < BLOCK_N; ++i) values[i] = float(p[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = float(p[i]);
  }
  return load<F32x16>(values);
}

inline F32x16 load_bias(const Weight& weight, int64_t n, int64_t count) {
  if (!weight.bias) return F32x16{};
  switch (weight.bias_dtype) {
    case c10::ScalarType::BFloat16:
      return load_floats(static_cast<const c10::BFloat16*>(weight.bias) + n, count);
    case c10::ScalarType::Half:
      return load_floats(static_cast<const c10::Half*>(weight.bias) + n, count);
    default:
      return load_floats(static_cast<const float*>(weight.bias) + n, count);
  }
}

// One column of a packed block as 16 floats: byte k % 4 of each int32 lane, sign-extended.
inline F32x16 weight_column(const int8_t* block, int32_t k) {
  const U32x16 quad = load<U32x16>(block + (k / 4) * 64);
  return __builtin_convertvector((I32x16)(quad << (24 - 8 * (k % 4))) >> 24, F32x16);
}

// R rows that hold the same columns, times B blocks.
template <int R, int B>
inline void outlier_product(
    const Outlier* outliers, int64_t stride, int32_t count, const int8_t* w, int64_t w_stride,
    float* out) {
  F32x16 sum[R][B] = {};
  for (int32_t i = 0; i < count; ++i) {
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) {
      const F32x16 column = weight_column(w + b * w_stride, outliers[i].k);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r][b] += column * outliers[r * stride + i].value;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int b = 0; b < B; ++b) store(out + (r * PANEL + b) * BLOCK_N, sum[r][b]);
  }
}

// out [rows][PANEL * 16] = the outlier product of rows [m, m + rows), all of one tile.
template <int B>
void outlier_tile(
    const Activations& a, int64_t m, int64_t rows, const int8_t* w, int64_t w_stride, float* out) {
  const int64_t stride = a.column_count;
  const Outlier* outliers = a.outliers + m * stride;
  int64_t r = 0;
  if (a.dense[m / ROW_TILE]) {
    for (; r + OUTLIER_ROWS <= rows; r += OUTLIER_ROWS)
      for (int b = 0; b < B; ++b)
        outlier_product<OUTLIER_ROWS, 1>(
            outliers + r * stride, stride, a.outlier_count[m + r], w + b * w_stride, 0,
            out + (r * PANEL + b) * BLOCK_N);
  }
  for (; r < rows; ++r)
    outlier_product<1, B>(
        outliers + r * stride, 0, a.outlier_count[m + r], w, w_stride, out + r * PANEL * BLOCK_N);
}

// What the epilogue needs of 16 output channels.
struct Channels {
  int64_t n, count;
  F32x16 w_scale, bias;

  Channels(const Weight& weight, int64_t block)
      : n(block * BLOCK_N),
        count(std::min(BLOCK_N, weight.N - n)),
        w_scale(load_floats(weight.w_scale + n, count)),
        bias(load_bias(weight, n, count)) {}
};

// y = (acc * x_scale + outlier) * w_scale + bias for rows [m, m + rows) of 16 channels.
template <class T>
inline void finish(
    const Activations& a, const Weight& weight, int64_t m, int64_t rows, const Channels& c,
    const int32_t* acc, const float* outlier) {
  T* y = static_cast<T*>(weight.y) + m * weight.N + c.n;
  for (int64_t r = 0; r < rows; ++r) {
    const F32x16 product = __builtin_convertvector(load<I32x16>(acc + r * PANEL * BLOCK_N), F32x16);
    const F32x16 extra = outlier ? load<F32x16>(outlier + r * PANEL * BLOCK_N) : F32x16{};
    const F32x16 value = (product * a.x_scale[m + r] + extra) * c.w_scale + c.bias;
    if (c.count == BLOCK_N) {
      store_as(y + r * weight.N, value);
    } else {
      T whole[BLOCK_N];
      store_as(whole, value);
      __builtin_memcpy(y + r * weight.N, whole, c.count * sizeof(T));
    }
  }
}

template <class T, int B>
void multiply_panel(
    const Activations& a, const Weight& weight, int64_t m0, int64_t m1, int64_t block) {
  alignas(64) int32_t acc[ROW_TILE * PANEL * BLOCK_N];
  alignas(64) float outlier[ROW_TILE * PANEL * BLOCK_N];
  const int64_t stride = block_bytes(a.K_padded);
  const int8_t* w = weight.packed + block * stride;
  const Channels channels[2] = {{weight, block}, {weight, block + B - 1}};
  const int64_t tiles = (m1 - m0 + ROW_TILE - 1) / ROW_TILE;
  const int64_t lines = block + B < weight.blocks() ? (B * BLOCK_N + tiles - 1) / tiles : 0;
  Prefetch ahead{w + B * stride, lines};
  for (int64_t m = m0; m < m1; m += ROW_TILE) {
    const int64_t rows = std::min<int64_t>(ROW_TILE, m1 - m);
    tile_product<B>(a, m, rows, w, stride, acc, ahead);
    ahead.next += a.K_padded * lines;
    if (a.column_count) outlier_tile<B>(a, m, rows, w, stride, outlier);
    for (int b = 0; b < B; ++b)
      finish<T>(
          a, weight, m, rows, channels[b], acc + b * BLOCK_N,
          a.column_count ? outlier + b * BLOCK_N : nullptr);
  }
}

template <class T>
void multiply_as(
    const Activations& a, const Weight& weight, int64_t m0, int64_t m1, int64_t b0, int64_t b1) {
  for (; b0 + PANEL <= b1; b0 += PANEL) multiply_panel<T, PANEL>(a, weight, m0, m1, b0);
  if (b0 < b1) multiply_panel<T, 1>(a, weight, m0, m1, b0);
}

void multiply(
    const Activations& a, const Weight& weight, int64_t m0, int64_t m1, int64_t b0, int64_t b1) {
  switch (a.dtype) {
    case c10::ScalarType::BFloat16: return multiply_as<c10::BFloat16>(a, weight, m0, m1, b0, b1);
    case c10::ScalarType::Half: return multiply_as<c10::Half>(a, weight, m0, m1, b0, b1);
    default: return multiply_as<float>(a, weight, m0, m1, b0, b1);
  }
}
