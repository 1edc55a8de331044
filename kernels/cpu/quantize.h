// Quantise: rows of floats to int8 with their outliers taken out, as kernels/ops/quantize_reference.py
// states it.
// Part of kernel.h.
//
// Two passes, because in the column decomposition a row's scale needs every row's outliers:
//
//   flag_columns    which columns hold an outlier in any row
//   quantize_rows   absmax over a row's regular elements, then the row in int8
//
// A NaN must reach its row's scale and nothing else. Magnitudes are therefore compared as the bits
// of |x|, an order in which NaN is above infinity; and |NaN| >= threshold is false, so a NaN is no
// outlier.

template <class T>
inline Floats load_row(const T* x) {
  if constexpr (std::is_same_v<T, float>) {
    return load<Floats>(x);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return (Floats)(Isa::load_words(x) << 16);
  } else {
    return Isa::load_half(x);
  }
}

// The last elements of a row, followed by zeros: neither outliers nor a larger absmax.
template <class T>
inline Floats load_row(const T* x, int64_t count) {
  if (count >= LANES) return load_row(x);
  T padded[LANES] = {};
  std::memcpy(static_cast<void*>(padded), x, count * sizeof(T));
  return load_row(padded);
}

inline Words magnitude(Floats v) { return (Words)v & 0x7fffffff; }

// Lanes of all ones where |v| >= threshold.
inline Ints is_outlier(Floats v, float threshold) {
  return (Ints)((Floats)magnitude(v) >= (Floats{} + threshold));
}

// f(k, LANES) for whole vectors of a row, then f(k, count) for what is left: with a constant count,
// loads and stores are one instruction.
template <class F>
inline void for_vectors(int64_t K, const F& f) {
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) f(k, std::integral_constant<int64_t, LANES>());
  if (k < K) f(k, K - k);
}

// R rows at once: flags are read and written once for them.
template <int R, class T>
void flag_rows(const FloatRows& in, int64_t& m, int64_t m1, int32_t* flags) {
  for (; m + R <= m1; m += R) {
    const T* x = static_cast<const T*>(in.x) + m * in.K;
    for_vectors(in.K, [&](int64_t k, auto count) {
      Ints found = load<Ints>(flags + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) found |= is_outlier(load_row(x + r * in.K + k, count), in.threshold);
      store(flags + k, found);
    });
  }
}

template <class T>
void flag_columns_of(const FloatRows& in, int64_t m0, int64_t m1, int32_t* flags) {
  flag_rows<4, T>(in, m0, m1, flags);
  flag_rows<1, T>(in, m0, m1, flags);
}

// What stays in int8: 0 where an outlier is taken out.
template <bool COLUMN>
inline Floats regular(const FloatRows& in, Floats v, int64_t k) {
  if constexpr (COLUMN) {
    return (Floats)((Ints)v & load<Ints>(in.column_mask + k));
  } else {
    return (Floats)((Ints)v & ~is_outlier(v, in.threshold));
  }
}

// x / scale, rounded correctly as a division is, in a third of its time: the product with the correctly
// rounded reciprocal is off by one unit at most, its remainder is exact in one fma, and a second one
// corrects it (Markstein, IBM J. Res. Dev. 34(1), 1990, theorem 8.3).
struct Reciprocal {
  Floats scale, reciprocal;

  explicit Reciprocal(float value) : scale(Floats{} + value), reciprocal(Floats{} + 1.0f / value) {}

  // Smaller scales have remainders that are subnormal, and not exact; infinity has no reciprocal.
  static bool serves(float value) { return value >= 0x1p-100f && value <= 0x1p126f; }

  Floats operator()(Floats x) const {
    const Floats quotient = x * reciprocal;
    return Isa::fma(Isa::fnma(quotient, scale, x), reciprocal, quotient);
  }
};

inline float largest_of(Words magnitudes) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < LANES; ++i) bits = std::max<uint32_t>(bits, magnitudes[i]);
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  return absmax;
}

// Of a row whose vectors are value(k, count).
template <class F>
inline float largest_magnitude(int64_t K, const F& value) {
  Words largest{};
  for_vectors(K, [&](int64_t k, auto count) {
    const Words bits = magnitude(value(k, count));
    largest = bits > largest ? bits : largest;
  });
  return largest_of(largest);
}

// The row in int8; returns its scale.
template <class F>
inline float write_int8(int8_t* out, int64_t K, float absmax, const F& value) {
  const float step = absmax / 127.0f;
  const float scale = step < MIN_SCALE ? MIN_SCALE : step;  // a NaN stays
  const auto write = [&](auto divide) {
    for_vectors(K, [&](int64_t k, auto count) {
      const Bytes quantized = __builtin_convertvector(Isa::to_ints(divide(value(k, count))), Bytes);
      __builtin_memcpy(out + k, &quantized, count);
    });
  };
  if (Isa::FMA_ROUNDS_ONCE && Reciprocal::serves(scale)) {
    write(Reciprocal(scale));
  } else {
    write([scale](Floats v) { return v / scale; });
  }
  return scale;
}

template <class T, bool OUTLIERS, bool COLUMN>
void quantize_row(const FloatRows& in, int64_t m) {
  const T* x = static_cast<const T*>(in.x) + m * in.K;
  const auto value = [&](int64_t k, auto count) {
    const Floats v = load_row(x + k, count);
    if constexpr (OUTLIERS) return regular<COLUMN>(in, v, k);
    return v;
  };
  in.x_scale[m] = write_int8(in.x_int8 + m * in.K, in.K, largest_magnitude(in.K, value), value);
}

template <class T>
void quantize_rows_of(const FloatRows& in, int64_t m0, int64_t m1) {
  const auto row = in.column_mask == nullptr && in.threshold == 0 ? quantize_row<T, false, false>
                   : in.column_mask == nullptr                    ? quantize_row<T, true, false>
                                                           : quantize_row<T, true, true>;
  for (int64_t m = m0; m < m1; ++m) row(in, m);
}

void flag_columns(const FloatRows& in, int64_t m0, int64_t m1, int32_t* flags) {
  with_dtype(in.dtype, [&]<class T>(T) { flag_columns_of<T>(in, m0, m1, flags); });
}

#include "rotate.h"

void quantize_rows(const FloatRows& in, int64_t m0, int64_t m1) {
  if (in.rotation) return rotate_rows(in, m0, m1);
  with_dtype(in.dtype, [&]<class T>(T) { quantize_rows_of<T>(in, m0, m1); });
}
