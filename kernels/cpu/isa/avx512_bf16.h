// AVX512-BF16, for weight-only products of bf16 rows alone: vdpbf16ps adds the products of two k, of
// bf16, in fp32. It takes subnormal operands and sums for 0.
// Weights become bf16 by looking their bytes up (vpermi2b), which takes half the time of converting
// them by way of fp32.
#pragma once

#include "avx512_vnni.h"

#ifdef INT8FX_X86

namespace int8fx::avx512_bf16 {

inline bool supported() {
  return avx512_vnni::supported() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}

INT8FX_BEGIN_TARGET(INT8FX_AVX512 ",avx512bf16,avx512vbmi")

using namespace avx512_vnni;

// The bytes of every |w| as a bf16, which holds integers up to 256 exactly.
struct Magnitudes {
  alignas(64) uint8_t low[128], high[128];

  constexpr Magnitudes() : low(), high() {
    for (int i = 1; i < 128; ++i) {
      int exponent = 0;
      while (i >> (exponent + 1)) ++exponent;
      const int bits = (127 + exponent) << 7 | (i << (7 - exponent) & 127);
      low[i] = bits & 255;
      high[i] = bits >> 8;
    }
  }
};

inline __m512i look_up(const uint8_t* table, __m512i index) {
  return _mm512_permutex2var_epi8(
      _mm512_load_si512(table), index, _mm512_load_si512(table + 64));
}

struct FloatIsa {
  static constexpr int MR = 12;

  using Element = uint16_t;
  using X = __m512bh;
  using W = __m512bh;  // 8 channels x 4 k

  static Element element(c10::BFloat16 x) { return x.x; }
  static X load_x(const Element* x) {
    int64_t quad;
    std::memcpy(&quad, x, 8);
    return (X)_mm512_set1_epi64(quad);
  }
  static void load_w(W* out, const Element* w) {
    for (int v = 0; v < 2; ++v) out[v] = (W)_mm512_loadu_si512(w + 32 * v);
  }
  static void store_w(Element* out, const W* w) {
    for (int v = 0; v < 2; ++v) _mm512_storeu_si512(out + 32 * v, (__m512i)w[v]);
  }
  static void load_w(W* out, const int8_t* w) {
    static constexpr Magnitudes MAGNITUDES;
    const __m512i bytes = _mm512_loadu_si512(w);
    const __m512i magnitude = _mm512_abs_epi8(bytes);
    const __m512i low = look_up(MAGNITUDES.low, magnitude);
    const __m512i sign = _mm512_and_si512(bytes, _mm512_set1_epi8(-128));
    __m512i high = _mm512_or_si512(look_up(MAGNITUDES.high, magnitude), sign);
    // The tables have 7 bits, in which |-128| is 0: right for the low byte, not for the high one.
    const __m512i of_minus_128 = _mm512_set1_epi8(static_cast<char>(0xc3));
    high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitude), of_minus_128);
    out[0] = (W)_mm512_unpacklo_epi8(low, high);
    out[1] = (W)_mm512_unpackhi_epi8(low, high);
  }
  // Unpacking takes two channels of four for the first vector, and two for the second.
  static constexpr int channel_of(int i) { return i % 8 / 2 * 4 + i / 8 * 2 + i % 2; }
  static void dot(Floats& sums, X x, W w) { sums = (Floats)_mm512_dpbf16_ps((__m512)sums, x, w); }
};

#include "../weight_only.h"

INT8FX_END_TARGET
}  // namespace int8fx::avx512_bf16

#endif  // INT8FX_X86
