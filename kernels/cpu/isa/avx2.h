// AVX2. vpmaddubsw would saturate, so bytes are widened to int16 for vpmaddwd, which is exact.
#pragma once

#include "target.h"

#ifdef INT8FX_X86

#include "hooks.h"
#include "unsigned_rows.h"

namespace int8fx::avx2 {

inline bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

INT8FX_BEGIN_TARGET(INT8FX_AVX2)

constexpr int LANES = 8;
#include "../vectors.h"

struct VectorIsa : Vectors {
  static constexpr bool FMA_ROUNDS_ONCE = true;
  static constexpr bool LOOKS_UP_AT_ONCE = true;

  static Words load_words(const void* p) {
    return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  }
  static Floats load_half(const void* p) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
  static void store_half(void* p, Floats v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
  static Floats fnma(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }

  static Floats to_floats(const int8_t* p) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static Floats lowest_codes(Words codes) {
    return __builtin_convertvector((Ints)(codes & 15), Floats);
  }
  static Floats look_up(const float* values, Words index) {
    const __m256i i = (__m256i)index;
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), i);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + 8), i);
    // Bit 3 of the index, where a sign is.
    return (Floats)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(i, 28));
  }
  static Ints dot_codes(Ints sums, Words codes, const int8_t* x) {
    // Two products of at most 15 · 128 do not saturate.
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(quad_of(x)));
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static Floats repeat_quad(const float* p) { return (Floats)_mm256_broadcast_ps((const __m128*)p); }
  static Ints to_ints(Floats v) { return (Ints)_mm256_cvtps_epi32((__m256)v); }
  static Floats add_lanes(const Floats* v) {
    const auto fours = [v](int i) {  // of each half of a vector, the sums of 4 vectors
      const __m256 low = _mm256_hadd_ps((__m256)v[i], (__m256)v[i + 1]);
      return _mm256_hadd_ps(low, _mm256_hadd_ps((__m256)v[i + 2], (__m256)v[i + 3]));
    };
    const __m256 x = fours(0), y = fours(4);
    return (Floats)_mm256_permute2f128_ps(x, y, 0x20) + (Floats)_mm256_permute2f128_ps(x, y, 0x31);
  }
};

struct Isa : VectorIsa {
  static constexpr int MR = 2, MR_ALONE = 2, MR_STEP = 1, MICRO_PANELS = 1, VECTORS = 4;
  static constexpr int OUTLIER_ROWS = 4, MIN_ROWS = 1;

  using Activation = int16_t;
  using X = __m256i;
  using W = __m256i;  // 4 channels x 4 k
  using Sums = Ints;  // 4 channels x 2 pairs of k

  static void pack_x(const int8_t* x, Activation* out) {
    for (int i = 0; i < 4; ++i) out[i] = x[i];
  }
  static X load_x(const Activation* x) {
    int64_t quad;
    std::memcpy(&quad, x, 8);
    return _mm256_set1_epi64x(quad);
  }
  static W load_w(const int8_t* w, int v) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w + v));
  }
  static Sums first_sums(const int8_t*, int) { return Sums{}; }
  static void dot(Sums& sums, X x, W w) { sums += (Sums)_mm256_madd_epi16(x, w); }
  static void store_sums(int32_t* out, const Sums* sums) {
    for (int i = 0; i < 2; ++i) {
      // hadd adds the pairs but interleaves the halves of its operands: channels 0 1 4 5, 2 3 6 7.
      const __m256i pairs = _mm256_hadd_epi32((__m256i)sums[2 * i], (__m256i)sums[2 * i + 1]);
      store(out + 8 * i, _mm256_permute4x64_epi64(pairs, 0b11011000));
    }
  }
  static int64_t pack_groups(const int8_t*, int64_t, int64_t, Activation*) { return 0; }

  static void enter(const Lhs&) {}
  static void leave() {}
  static const Product& weight_only(const Activations&);
};

#include "../dot.h"
#include "../kernel.h"

namespace in_fp32 {
using FloatIsa = InFp32<2>;
#include "../weight_only.h"
}  // namespace in_fp32

inline const Product& Isa::weight_only(const Activations&) { return in_fp32::PRODUCT; }

INT8FX_END_TARGET
}  // namespace int8fx::avx2

#endif  // INT8FX_X86
