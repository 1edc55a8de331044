// One kernel per instruction set: what differs between them, and their table, best first.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "linear.h"

#if defined(__x86_64__) && defined(__linux__)
#define INT8FX_X86 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Everything between BEGIN and END is compiled for these instructions, whatever the flags say, so
// that one shared object serves every machine.
#define INT8FX_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define INT8FX_BEGIN_TARGET(isa) \
  INT8FX_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define INT8FX_END_TARGET INT8FX_PRAGMA(clang attribute pop)
#else
#define INT8FX_BEGIN_TARGET(isa) INT8FX_PRAGMA(GCC push_options) INT8FX_PRAGMA(GCC target(isa))
#define INT8FX_END_TARGET INT8FX_PRAGMA(GCC pop_options)
#endif

namespace int8fx {

// Rows for vpdpbusd, whose activations are unsigned: a zero point of 128 is a flipped sign bit.
inline void pack_unsigned(const int8_t* x, uint8_t* out) {
  uint32_t quad;
  std::memcpy(&quad, x, 4);
  quad ^= 0x80808080;
  std::memcpy(out, &quad, 4);
}

inline int32_t quad_of(const void* x) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  return quad;
}

#ifdef INT8FX_X86

#define INT8FX_AVX2 "avx2,fma,f16c"
#define INT8FX_AVX512 INT8FX_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"

// Asked of every processor, so compiled for any.
namespace amx_int8 { bool supported(); }
namespace avx512_vnni { bool supported(); }
namespace avx512_bf16 { bool supported(); }
namespace avx_vnni { bool supported(); }
namespace avx2 { bool supported(); }

// ---- AVX512-VNNI: vpdpbusd multiplies u8 with s8, so rows carry a zero point of 128, and the sums
// start at -128 times the channel's sum of weights.

INT8FX_BEGIN_TARGET(INT8FX_AVX512)
namespace avx512_vnni {

constexpr int LANES = 16;
#include "vectors.h"

constexpr int ROW_TILE = 12, ONE_TILE = 16, ROW_STEP = 1, PANEL = 2, VECTORS = 1, OUTLIER_ROWS = 12;

using Activation = uint8_t;
using X = __m512i;
using W = __m512i;
using Sums = Ints;

inline void pack_x(const int8_t* x, Activation* out) { pack_unsigned(x, out); }
inline X load_x(const Activation* x) { return _mm512_set1_epi32(quad_of(x)); }
inline W load_w(const int8_t* w, int) { return _mm512_loadu_si512(w); }
inline Sums first_sums(const int8_t* channel_sums, int) { return load<Ints>(channel_sums) * -128; }
inline void dot(Sums& sums, X x, W w) {
  sums = (Sums)_mm512_dpbusd_epi32((__m512i)sums, x, w);
}
inline void store_sums(int32_t* out, const Sums* sums) { store(out, *sums); }

inline Words load_words(const void* p) {
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
inline Floats load_half(const void* p) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline void store_half(void* p, Floats v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

inline Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#define INT8FX_FMA
inline Floats to_floats(const int8_t* p) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline Floats repeat_quad(const float* p) { return (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
inline Ints to_ints(Floats v) { return (Ints)_mm512_cvtps_epi32((__m512)v); }
inline Words digit_quads(Words integers) {
  const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (Words)_mm512_shuffle_epi8((__m512i)integers, _mm512_broadcast_i32x4(transpose));
}

inline Floats add_lanes(const Floats* v) {
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

// 16 quads of up to 16 rows: a transpose of 16 x 16 int32.
inline void pack_block(const int8_t* x, int64_t stride, int64_t rows, Activation* out) {
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

#define INT8FX_PACK_BLOCKS
inline int64_t pack_blocks(const int8_t* x, int64_t K, int64_t rows, Activation* out) {
  if (rows == 1) return 0;  // nothing to transpose
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) pack_block(x + k, K, rows, out + k * rows);
  return k;
}

#include "dot.h"
#include "tile.h"
#include "quantize.h"
#include "attention.h"
#include "few_queries.h"
#include "digits.h"

#undef INT8FX_PACK_BLOCKS

namespace in_fp32 {
constexpr int ROW_TILE = 6;
#include "in_fp32.h"
#include "weight_only.h"
}  // namespace in_fp32

}  // namespace avx512_vnni
INT8FX_END_TARGET

bool avx512_vnni::supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

// ---- AVX512-BF16, for weight-only products: vdpbf16ps adds the products of two k, of bf16, in fp32. It
// takes subnormal operands and sums for 0.
// Weights become bf16 by looking their bytes up (vpermi2b), which takes half the time of converting
// them by way of fp32.

INT8FX_BEGIN_TARGET(INT8FX_AVX512 ",avx512bf16,avx512vbmi")
namespace avx512_bf16 {

using namespace avx512_vnni;

constexpr int ROW_TILE = 12;

using Element = uint16_t;
using X = __m512bh;
using W = __m512bh;  // 8 channels x 4 k

inline Element element(c10::BFloat16 x) { return x.x; }
inline X load_x(const Element* x) {
  int64_t quad;
  std::memcpy(&quad, x, 8);
  return (X)_mm512_set1_epi64(quad);
}
inline void load_w(W* out, const Element* w) {
  for (int v = 0; v < 2; ++v) out[v] = (W)_mm512_loadu_si512(w + 32 * v);
}
inline void store_w(Element* out, const W* w) {
  for (int v = 0; v < 2; ++v) _mm512_storeu_si512(out + 32 * v, (__m512i)w[v]);
}

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

inline void load_w(W* out, const int8_t* w) {
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
constexpr int channel_of(int i) { return i % 8 / 2 * 4 + i / 8 * 2 + i % 2; }
inline void dot(Floats& sums, X x, W w) { sums = (Floats)_mm512_dpbf16_ps((__m512)sums, x, w); }

#include "weight_only.h"

}  // namespace avx512_bf16
INT8FX_END_TARGET

bool avx512_bf16::supported() {
  return avx512_vnni::supported() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}

inline const Product& avx512_weight_only(const Activations& a) {
  const bool bf16 = a.dtype == c10::ScalarType::BFloat16;
  if (bf16 && avx512_bf16::supported()) return avx512_bf16::PRODUCT;
  if (a.K > avx512_vnni::MAX_K) return avx512_vnni::in_fp32::PRODUCT;
  if (bf16) return avx512_vnni::IN_DIGITS<c10::BFloat16>;
  if (a.dtype == c10::ScalarType::Half) return avx512_vnni::IN_DIGITS<c10::Half>;
  return avx512_vnni::IN_DIGITS<float>;
}

// ---- AMX: tdpbssd multiplies tiles of 16 rows x 64 k with 64 k x 16 channels, both signed.

INT8FX_BEGIN_TARGET(INT8FX_AVX512 ",amx-tile,amx-int8")
namespace amx_int8 {

constexpr int LANES = 16;
#include "vectors.h"

constexpr int ROW_TILE = 32, ONE_TILE = 32, ROW_STEP = 16, PANEL = 2, OUTLIER_ROWS = 16;
constexpr int TILE_ROWS = ROW_STEP, TILE_K = 64;
constexpr bool FETCHES_NEAR = false;

using Activation = int8_t;

using avx512_vnni::add_lanes;
using avx512_vnni::fma;
using avx512_vnni::fnma;
using avx512_vnni::load_half;
using avx512_vnni::load_words;
using avx512_vnni::store_half;
using avx512_vnni::to_ints;

// Fewer than 16 rows make shorter tiles; otherwise the last tile is padded with rows of zeros.
inline int64_t tile_rows(const Activations& a) { return std::min<int64_t>(TILE_ROWS, a.M); }

// Rows are packed as the tiles are: [M / 16][K_padded / 64][16][64].
void pack_tile(const Activations& a, int64_t tile) {
  const int64_t height = tile_rows(a);
  const int64_t end = std::min((tile + 1) * a.row_tile, a.M);
  for (int64_t m = tile * a.row_tile; m < end; m += TILE_ROWS) {
    auto* out = static_cast<int8_t*>(a.packed) + m * a.K_padded;
    for (int64_t r = 0; r < height; ++r) {
      const int8_t* x = a.x_int8 + (m + r) * a.K;
      const int64_t K = m + r < a.M ? a.K : 0;
      for (int64_t k = 0; k < a.K_padded; k += TILE_K) {
        int8_t* to = out + k * height + r * TILE_K;
        const int64_t count = std::clamp<int64_t>(K - k, 0, TILE_K);
        if (count == TILE_K) {
          std::memcpy(to, x + k, TILE_K);
        } else {
          std::memset(to, 0, TILE_K);
          std::memcpy(to, x + k, count);
        }
      }
    }
  }
}

void enter(const Activations& a) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = t < 6 ? tile_rows(a) : TILE_ROWS;  // 0-3 sums, 4-5 rows, 6-7 weights
  }
  // GCC's _tile_loadconfig does not tell the compiler that it reads memory.
  asm volatile("ldtilecfg %0" ::"m"(config));
}

void leave() { _tile_release(); }

// TALL x WIDE tiles of sums; 2 x 2 needs one load per multiply, the least that 8 tiles allow.
template <bool TALL, bool WIDE>
void dot_tiles(
    const int8_t* x, int64_t height, const int8_t* w, int64_t w_stride, int64_t k_padded,
    int32_t* acc, Prefetch ahead) {
  asm volatile("" ::: "memory");  // the tile loads below do not say that they read memory
  _tile_zero(0);
  if constexpr (WIDE) _tile_zero(1);
  if constexpr (TALL) _tile_zero(2);
  if constexpr (TALL && WIDE) _tile_zero(3);
  const int8_t* x2 = x + TILE_ROWS * k_padded;
  const int8_t* w2 = w + w_stride;
  for (int64_t k = 0; k < k_padded; k += TILE_K) {
    ahead.step();
    _tile_loadd(4, x + k * height, TILE_K);
    _tile_loadd(6, w + k * BLOCK_N, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (WIDE) {
      _tile_loadd(7, w2 + k * BLOCK_N, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (TALL) {
      _tile_loadd(5, x2 + k * height, TILE_K);
      _tile_dpbssd(2, 5, 6);
      if constexpr (WIDE) _tile_dpbssd(3, 5, 7);
    }
  }
  constexpr int64_t ROW = PANEL * BLOCK_N;
  _tile_stored(0, acc, ROW * 4);
  if constexpr (WIDE) _tile_stored(1, acc + BLOCK_N, ROW * 4);
  if constexpr (TALL) _tile_stored(2, acc + TILE_ROWS * ROW, ROW * 4);
  if constexpr (TALL && WIDE) _tile_stored(3, acc + TILE_ROWS * ROW + BLOCK_N, ROW * 4);
}

template <int B>
inline void tile_product(
    const Activations& a, int64_t m, int64_t rows, const int8_t* w, int64_t w_stride,
    int32_t* acc, Prefetch ahead) {
  const auto* x = static_cast<const int8_t*>(a.packed) + m * a.K_padded;
  const auto tiles = rows > TILE_ROWS ? dot_tiles<true, B == 2> : dot_tiles<false, B == 2>;
  tiles(x, tile_rows(a), w, w_stride, a.K_padded, acc, ahead);
}

#include "tile.h"
#include "quantize.h"
#include "attention.h"
#include "few_queries.h"

}  // namespace amx_int8
INT8FX_END_TARGET

// Linux grants a process the tiles' 8 KiB of state only when asked.
bool amx_int8::supported() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return avx512_vnni::supported() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// ---- AVX2: vpmaddubsw would saturate, so bytes are widened to int16 for vpmaddwd, which is exact.

INT8FX_BEGIN_TARGET(INT8FX_AVX2)
namespace avx2 {

constexpr int LANES = 8;
#include "vectors.h"

constexpr int ROW_TILE = 2, ONE_TILE = 2, ROW_STEP = 1, PANEL = 1, VECTORS = 4, OUTLIER_ROWS = 4;

using Activation = int16_t;
using X = __m256i;
using W = __m256i;  // 4 channels x 4 k
using Sums = Ints;  // 4 channels x 2 pairs of k

inline void pack_x(const int8_t* x, Activation* out) {
  for (int i = 0; i < 4; ++i) out[i] = x[i];
}
inline X load_x(const Activation* x) {
  int64_t quad;
  std::memcpy(&quad, x, 8);
  return _mm256_set1_epi64x(quad);
}
inline W load_w(const int8_t* w, int v) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w + v));
}
inline Sums first_sums(const int8_t*, int) { return Sums{}; }
inline void dot(Sums& sums, X x, W w) { sums += (Sums)_mm256_madd_epi16(x, w); }
inline void store_sums(int32_t* out, const Sums* sums) {
  for (int i = 0; i < 2; ++i) {
    // hadd adds the pairs but interleaves the halves of its operands: channels 0 1 4 5, 2 3 6 7.
    const __m256i pairs = _mm256_hadd_epi32((__m256i)sums[2 * i], (__m256i)sums[2 * i + 1]);
    store(out + 8 * i, _mm256_permute4x64_epi64(pairs, 0b11011000));
  }
}

inline Words load_words(const void* p) {
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
inline Floats load_half(const void* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline void store_half(void* p, Floats v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}

inline Floats fma(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

inline Floats to_floats(const int8_t* p) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Floats repeat_quad(const float* p) { return (Floats)_mm256_broadcast_ps((const __m128*)p); }
inline Ints to_ints(Floats v) { return (Ints)_mm256_cvtps_epi32((__m256)v); }
inline Floats add_lanes(const Floats* v) {
  const auto fours = [v](int i) {  // of each half of a vector, the sums of 4 vectors
    const __m256 low = _mm256_hadd_ps((__m256)v[i], (__m256)v[i + 1]);
    return _mm256_hadd_ps(low, _mm256_hadd_ps((__m256)v[i + 2], (__m256)v[i + 3]));
  };
  const __m256 x = fours(0), y = fours(4);
  return (Floats)_mm256_permute2f128_ps(x, y, 0x20) + (Floats)_mm256_permute2f128_ps(x, y, 0x31);
}

#include "dot.h"
#include "tile.h"
#include "quantize.h"
#include "attention.h"
#include "few_queries.h"

namespace in_fp32 {
constexpr int ROW_TILE = 2;
#include "in_fp32.h"
#include "weight_only.h"
}  // namespace in_fp32

inline const Product& weight_only(const Activations&) { return in_fp32::PRODUCT; }

}  // namespace avx2
INT8FX_END_TARGET

bool avx2::supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

// ---- AVX-VNNI: vpdpbusd on 8 channels, for processors without AVX512.

INT8FX_BEGIN_TARGET(INT8FX_AVX2 ",avxvnni")
namespace avx_vnni {

constexpr int LANES = 8;
#include "vectors.h"

constexpr int ROW_TILE = 6, ONE_TILE = 6, ROW_STEP = 1, PANEL = 1, VECTORS = 2, OUTLIER_ROWS = 4;

using Activation = uint8_t;
using X = __m256i;
using W = __m256i;
using Sums = Ints;

inline void pack_x(const int8_t* x, Activation* out) { pack_unsigned(x, out); }
inline X load_x(const Activation* x) { return _mm256_set1_epi32(quad_of(x)); }
inline W load_w(const int8_t* w, int v) { return _mm256_loadu_si256((const __m256i*)w + v); }
inline Sums first_sums(const int8_t* channel_sums, int v) {
  return load<Ints>(channel_sums + 32 * v) * -128;
}
inline void dot(Sums& sums, X x, W w) {
  sums = (Sums)_mm256_dpbusd_avx_epi32((__m256i)sums, x, w);
}
inline void store_sums(int32_t* out, const Sums* sums) { std::memcpy(out, sums, 64); }

using avx2::add_lanes;
using avx2::fma;
using avx2::fnma;
using avx2::load_half;
using avx2::load_words;
using avx2::store_half;
using avx2::to_ints;

#include "dot.h"
#include "tile.h"
#include "quantize.h"
#include "attention.h"
#include "few_queries.h"

}  // namespace avx_vnni
INT8FX_END_TARGET

bool avx_vnni::supported() { return avx2::supported() && __builtin_cpu_supports("avxvnni"); }

#endif  // INT8FX_X86

// ---- Any machine: plain vectors of int32, which compilers know on every target.

#undef INT8FX_FMA
namespace portable {

constexpr int LANES = 4;
#include "vectors.h"

constexpr int ROW_TILE = 4, ONE_TILE = 4, ROW_STEP = 1, PANEL = 1, VECTORS = 4, OUTLIER_ROWS = 4;

using Activation = int8_t;
struct X {
  int32_t k[4];
};
struct W {
  Ints k[4];  // 4 channels each
};
using Sums = Ints;

inline void pack_x(const int8_t* x, Activation* out) { std::memcpy(out, x, 4); }
inline X load_x(const Activation* x) { return {x[0], x[1], x[2], x[3]}; }
inline W load_w(const int8_t* w, int v) {
  const Words quads = load<Words>(w + 16 * v);
  return {(Ints)(quads << 24) >> 24, (Ints)(quads << 16) >> 24, (Ints)(quads << 8) >> 24,
          (Ints)quads >> 24};
}
inline Sums first_sums(const int8_t*, int) { return Sums{}; }
inline void dot(Sums& sums, const X& x, const W& w) {
  for (int i = 0; i < 4; ++i) sums += w.k[i] * x.k[i];
}
inline void store_sums(int32_t* out, const Sums* sums) { std::memcpy(out, sums, 64); }

inline Words load_words(const void* p) { return __builtin_convertvector(load<Halves>(p), Words); }
inline Floats load_half(const void* p) {
  Floats v;
  for (int i = 0; i < LANES; ++i) v[i] = static_cast<const c10::Half*>(p)[i];
  return v;
}
inline void store_half(void* p, Floats v) {
  for (int i = 0; i < LANES; ++i) static_cast<c10::Half*>(p)[i] = v[i];
}

inline Floats to_floats(const int8_t* p) {
  return __builtin_convertvector(load<Bytes>(p), Floats);
}
inline Floats repeat_quad(const float* p) { return load<Floats>(p); }
inline Ints to_ints(Floats v) {
  // Adding 1.5 · 2^23 rounds to the nearest even integer, up to 2^22.
  constexpr float ROUND = 12582912.0f;
  return __builtin_convertvector((v + ROUND) - ROUND, Ints);
}
inline Floats add_lanes(const Floats* v) {
  Floats sums;
  for (int i = 0; i < LANES; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
  return sums;
}

#include "dot.h"
#include "tile.h"
#include "quantize.h"
#include "attention.h"
#include "few_queries.h"

namespace in_fp32 {
constexpr int ROW_TILE = 2;
#include "in_fp32.h"
#include "weight_only.h"
}  // namespace in_fp32

inline const Product& weight_only(const Activations&) { return in_fp32::PRODUCT; }

bool supported() { return true; }

}  // namespace portable

#define INT8FX_KERNEL(isa, min_rows, enter, leave, weight_only)                                \
  Kernel {                                                                                     \
    #isa, isa::supported, min_rows, isa::flag_columns, isa::quantize_rows,                      \
        Product{isa::ROW_TILE, isa::ONE_TILE, isa::ROW_STEP, isa::PANEL,                        \
                sizeof(isa::Activation), isa::pack_tile, enter, leave, isa::multiply},          \
        weight_only, isa::QUERIES, isa::attend, isa::attend_part, isa::join_parts               \
  }

inline constexpr Kernel KERNELS[] = {
#ifdef INT8FX_X86
    INT8FX_KERNEL(amx_int8, 2, amx_int8::enter, amx_int8::leave, avx512_weight_only),
    INT8FX_KERNEL(avx512_vnni, 1, nullptr, nullptr, avx512_weight_only),
    INT8FX_KERNEL(avx_vnni, 1, nullptr, nullptr, avx2::weight_only),
    INT8FX_KERNEL(avx2, 1, nullptr, nullptr, avx2::weight_only),
#endif
    INT8FX_KERNEL(portable, 1, nullptr, nullptr, portable::weight_only),
};

}  // namespace int8fx
