// AVX512-VNNI. vpdpbusd multiplies u8 with s8, so rows carry a zero point of 128, and the sums start at
// -128 times the channel's sum of weights.
#pragma once

#include "target.h"

#ifdef INT8FX_X86

#include "hooks.h"
#include "unsigned_rows.h"

namespace int8fx::avx512_vnni {

inline bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

INT8FX_BEGIN_TARGET(INT8FX_AVX512)

constexpr int LANES = 16;
#include "../vectors.h"

struct VectorIsa : Vectors {
  static constexpr bool FMA_ROUNDS_ONCE = true;
  static constexpr bool LOOKS_UP_AT_ONCE = true;

  static Words load_words(const void* p) {
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  }
  static Floats load_half(const void* p) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  static void store_half(void* p, Floats v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  static Floats fnma(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  static Floats to_floats(const int8_t* p) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static Floats lowest_codes(Words codes) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Floats)_mm512_permutexvar_ps((__m512i)codes, values);
  }
  static Floats look_up(const float* values, Words index) {
    return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(values));
  }
  static Ints dot_codes(Ints sums, Words codes, const int8_t* x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(quad_of(x)));
  }
  static Floats repeat_quad(const float* p) { return (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static Ints to_ints(Floats v) { return (Ints)_mm512_cvtps_epi32((__m512)v); }

  static Floats add_lanes(const Floats* v) {
    const auto shuffled = [](Floats a, Floats b) {
      const auto x = (__m512)a, y = (__m512)b;
      return (Floats)_mm512_shuffle_f32x4(x, y, 0x88) + (Floats)_mm512_shuffle_f32x4(x, y, 0xdd);
    };
    Floats fours[4];  // of each quarter of a vector, the sums of 4 vectors
    for (int i = 0; i < 4; ++i, v += 4) {
      const auto pairs = [v](int j) {
        const auto x = (__m512)v[j], y = (__m512)v[j + 1];
        return (__m512d)((Floats)_mm512_unpacklo_ps(x, y) + (Floats)_mm512_unpackhi_ps(x, y));
      };
      const __m512d low = pairs(0), high = pairs(2);
      fours[i] = (Floats)_mm512_unpacklo_pd(low, high) + (Floats)_mm512_unpackhi_pd(low, high);
    }
    return shuffled(shuffled(fours[0], fours[1]), shuffled(fours[2], fours[3]));
  }
};

// 16 quads of up to 16 rows: a transpose of 16 x 16 int32.
inline void pack_group(const int8_t* x, int64_t stride, int64_t rows, uint8_t* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(x + std::min<int64_t>(i, rows - 1) * stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
  // r[i + j] now holds quads j, j + 4, j + 8, j + 12 of rows i .. i + 3, a quarter each.
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
    const __m512i even2 = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    const __m512i odd2 = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    t[j + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    t[j + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  const __m512i sign = _mm512_set1_epi32(0x80808080);
  const auto lanes = static_cast<__mmask16>((1u << rows) - 1);
  for (int q = 0; q < 16; ++q)
    _mm512_mask_storeu_epi32(out + 4 * rows * q, lanes, _mm512_xor_si512(t[q], sign));
}

struct Isa : VectorIsa {
  static constexpr int MR = 12, MR_ALONE = 16, MR_STEP = 1, MICRO_PANELS = 2, VECTORS = 1;
  static constexpr int OUTLIER_ROWS = 12, MIN_ROWS = 1;

  using Activation = uint8_t;
  using X = __m512i;
  using W = __m512i;
  using Sums = Ints;

  static void pack_x(const int8_t* x, Activation* out) { pack_unsigned(x, out); }
  static X load_x(const Activation* x) { return _mm512_set1_epi32(quad_of(x)); }
  static W load_w(const int8_t* w, int) { return _mm512_loadu_si512(w); }
  static Sums first_sums(const int8_t* channel_sums, int) { return load<Ints>(channel_sums) * -128; }
  static void dot(Sums& sums, X x, W w) {
    sums = (Sums)_mm512_dpbusd_epi32((__m512i)sums, x, w);
  }
  static void store_sums(int32_t* out, const Sums* sums) { store(out, *sums); }
  static int64_t pack_groups(const int8_t* x, int64_t K, int64_t rows, Activation* out) {
    if (rows == 1) return 0;  // nothing to transpose
    int64_t k = 0;
    for (; k + 64 <= K; k += 64) pack_group(x + k, K, rows, out + k * rows);
    return k;
  }

  static Words limb_quads(Words integers) {
    const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (Words)_mm512_shuffle_epi8((__m512i)integers, _mm512_broadcast_i32x4(transpose));
  }

  static void enter(const Lhs&) {}
  static void leave() {}
  static const Product& weight_only(const Activations& a);
};

#include "../dot.h"
#include "../kernel.h"
#include "../limbs.h"

namespace in_fp32 {
using FloatIsa = InFp32<6>;
#include "../weight_only.h"
}  // namespace in_fp32

INT8FX_END_TARGET
}  // namespace int8fx::avx512_vnni

#include "avx512_bf16.h"

namespace int8fx::avx512_vnni {

INT8FX_BEGIN_TARGET(INT8FX_AVX512)

inline const Product& Isa::weight_only(const Activations& a) {
  const bool bf16 = a.dtype == c10::ScalarType::BFloat16;
  if (bf16 && avx512_bf16::supported()) return avx512_bf16::PRODUCT;
  if (a.K > MAX_K) return in_fp32::PRODUCT;
  if (bf16) return IN_LIMBS<c10::BFloat16>;
  if (a.dtype == c10::ScalarType::Half) return IN_LIMBS<c10::Half>;
  return IN_LIMBS<float>;
}

INT8FX_END_TARGET

}  // namespace int8fx::avx512_vnni

#endif  // INT8FX_X86
