// AVX-VNNI. vpdpbusd on 8 channels, for processors without AVX512.
#pragma once

#include "avx2.h"

#ifdef INT8FX_X86

#include "unsigned_rows.h"

namespace int8fx::avx_vnni {

inline bool supported() { return avx2::supported() && __builtin_cpu_supports("avxvnni"); }

INT8FX_BEGIN_TARGET(INT8FX_AVX2 ",avxvnni")

constexpr int LANES = 8;
#include "../vectors.h"

struct Isa : avx2::VectorIsa {
  static constexpr int MR = 6, MR_ALONE = 6, MR_STEP = 1, MICRO_PANELS = 1, VECTORS = 2;
  static constexpr int OUTLIER_ROWS = 4, MIN_ROWS = 1;

  using Activation = uint8_t;
  using X = __m256i;
  using W = __m256i;
  using Sums = Ints;

  static void pack_x(const int8_t* x, Activation* out) { pack_unsigned(x, out); }
  static X load_x(const Activation* x) { return _mm256_set1_epi32(quad_of(x)); }
  static W load_w(const int8_t* w, int v) { return _mm256_loadu_si256((const __m256i*)w + v); }
  static Sums first_sums(const int8_t* channel_sums, int v) {
    return load<Ints>(channel_sums + 32 * v) * -128;
  }
  static void dot(Sums& sums, X x, W w) {
    sums = (Sums)_mm256_dpbusd_avx_epi32((__m256i)sums, x, w);
  }
  static Ints dot_codes(Ints sums, Words codes, const int8_t* x) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(quad_of(x)));
  }
  static void store_sums(int32_t* out, const Sums* sums) { std::memcpy(out, sums, 64); }
  static int64_t pack_groups(const int8_t*, int64_t, int64_t, Activation*) { return 0; }

  static void enter(const Lhs&) {}
  static void leave() {}
  static const Product& weight_only(const Activations& a) { return avx2::Isa::weight_only(a); }
};

#include "../dot.h"
#include "../kernel.h"

INT8FX_END_TARGET
}  // namespace int8fx::avx_vnni

#endif  // INT8FX_X86
