// AMX. tdpbssd multiplies tiles of 16 rows x 64 k with 64 k x 16 channels, both signed.
#pragma once

#include "avx512_vnni.h"

#ifdef INT8FX_X86

#include <sys/syscall.h>
#include <unistd.h>

namespace int8fx::amx_int8 {

// Linux grants a process the tiles' 8 KiB of state only when asked.
inline bool supported() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return avx512_vnni::supported() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

INT8FX_BEGIN_TARGET(INT8FX_AVX512 ",amx-tile,amx-int8")

constexpr int LANES = 16;
#include "../vectors.h"

constexpr int TILE_ROWS = 16, TILE_K = 64;
constexpr bool FETCHES_NEAR = false;

// Fewer than 16 rows make shorter tiles; otherwise the last tile is padded with rows of zeros.
inline int64_t tile_rows(const Lhs& a) { return std::min<int64_t>(TILE_ROWS, a.in.M); }

struct Isa : avx512_vnni::VectorIsa {
  static constexpr int MR = 32, MR_ALONE = 32, MR_STEP = TILE_ROWS, MICRO_PANELS = 2;
  static constexpr int OUTLIER_ROWS = 16, MIN_ROWS = 2;

  using Activation = int8_t;

  static void enter(const Lhs& a) {
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

  static void leave() { _tile_release(); }

  static const Product& weight_only(const Activations& a) { return avx512_vnni::Isa::weight_only(a); }
};

// Rows are packed as the tiles are: [M / 16][K_padded / 64][16][64].
inline void pack_tile(const Lhs& a, int64_t tile) {
  const int64_t height = tile_rows(a);
  const int64_t end = std::min((tile + 1) * a.tiling.rows, a.in.M);
  for (int64_t m = tile * a.tiling.rows; m < end; m += TILE_ROWS) {
    auto* out = static_cast<int8_t*>(a.packed.x) + m * a.tiling.K_padded;
    for (int64_t r = 0; r < height; ++r) {
      const int8_t* x = a.in.x_int8 + (m + r) * a.in.K;
      const int64_t K = m + r < a.in.M ? a.in.K : 0;
      for (int64_t k = 0; k < a.tiling.K_padded; k += TILE_K) {
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

// M_TILES x N_TILES tiles of sums; 2 x 2 needs one load per multiply, the least that 8 tiles allow.
template <int M_TILES, int N_TILES>
void dot_tiles(
    const int8_t* x, int64_t height, const int8_t* w, int64_t w_stride, int64_t k_padded,
    int32_t* acc, Prefetch ahead) {
  asm volatile("" ::: "memory");  // the tile loads below do not say that they read memory
  _tile_zero(0);
  if constexpr (N_TILES == 2) _tile_zero(1);
  if constexpr (M_TILES == 2) _tile_zero(2);
  if constexpr (M_TILES == 2 && N_TILES == 2) _tile_zero(3);
  const int8_t* x2 = x + TILE_ROWS * k_padded;
  const int8_t* w2 = w + w_stride;
  for (int64_t k = 0; k < k_padded; k += TILE_K) {
    ahead.step();
    _tile_loadd(4, x + k * height, TILE_K);
    _tile_loadd(6, w + k * NR, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (N_TILES == 2) {
      _tile_loadd(7, w2 + k * NR, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (M_TILES == 2) {
      _tile_loadd(5, x2 + k * height, TILE_K);
      _tile_dpbssd(2, 5, 6);
      if constexpr (N_TILES == 2) _tile_dpbssd(3, 5, 7);
    }
  }
  constexpr int64_t ROW = Isa::MICRO_PANELS * NR;
  _tile_stored(0, acc, ROW * 4);
  if constexpr (N_TILES == 2) _tile_stored(1, acc + NR, ROW * 4);
  if constexpr (M_TILES == 2) _tile_stored(2, acc + TILE_ROWS * ROW, ROW * 4);
  if constexpr (M_TILES == 2 && N_TILES == 2) _tile_stored(3, acc + TILE_ROWS * ROW + NR, ROW * 4);
}

template <int B>
void tile_product(
    const Lhs& a, int64_t m, int64_t rows, const int8_t* w, int64_t w_stride,
    int32_t* acc, Prefetch ahead) {
  const auto* x = static_cast<const int8_t*>(a.packed.x) + m * a.tiling.K_padded;
  const auto tiles = rows > TILE_ROWS ? dot_tiles<2, B> : dot_tiles<1, B>;
  tiles(x, tile_rows(a), w, w_stride, a.tiling.K_padded, acc, ahead);
}

#include "../kernel.h"

INT8FX_END_TARGET
}  // namespace int8fx::amx_int8

#endif  // INT8FX_X86
