// Any machine: plain vectors of int32, which compilers know on every target.
#pragma once

#include "hooks.h"

namespace int8fx::portable {

inline bool supported() { return true; }

constexpr int LANES = 4;
#include "../vectors.h"

struct Isa : Vectors {
  static constexpr int MR = 4, MR_ALONE = 4, MR_STEP = 1, MICRO_PANELS = 1, VECTORS = 4;
  static constexpr int OUTLIER_ROWS = 4, MIN_ROWS = 1;
  static constexpr bool FMA_ROUNDS_ONCE = false;
  static constexpr bool LOOKS_UP_AT_ONCE = false;

  using Activation = int8_t;
  struct X {
    int32_t k[4];
  };
  struct W {
    Ints k[4];  // 4 channels each
  };
  using Sums = Ints;

  static void pack_x(const int8_t* x, Activation* out) { std::memcpy(out, x, 4); }
  static X load_x(const Activation* x) { return {x[0], x[1], x[2], x[3]}; }
  static W load_w(const int8_t* w, int v) {
    const Words quads = load<Words>(w + 16 * v);
    return {(Ints)(quads << 24) >> 24, (Ints)(quads << 16) >> 24, (Ints)(quads << 8) >> 24,
            (Ints)quads >> 24};
  }
  static Sums first_sums(const int8_t*, int) { return Sums{}; }
  static void dot(Sums& sums, const X& x, const W& w) {
    for (int i = 0; i < 4; ++i) sums += w.k[i] * x.k[i];
  }
  static void store_sums(int32_t* out, const Sums* sums) { std::memcpy(out, sums, 64); }
  static int64_t pack_groups(const int8_t*, int64_t, int64_t, Activation*) { return 0; }

  static Words load_words(const void* p) { return __builtin_convertvector(load<Halves>(p), Words); }
  static Floats load_half(const void* p) {
    Floats v;
    for (int i = 0; i < LANES; ++i) v[i] = static_cast<const c10::Half*>(p)[i];
    return v;
  }
  static void store_half(void* p, Floats v) {
    for (int i = 0; i < LANES; ++i) static_cast<c10::Half*>(p)[i] = v[i];
  }

  static Floats to_floats(const int8_t* p) {
    return __builtin_convertvector(load<Bytes>(p), Floats);
  }
  static Floats repeat_quad(const float* p) { return load<Floats>(p); }
  static Ints to_ints(Floats v) {
    // Adding 1.5 · 2^23 rounds to the nearest even integer, up to 2^22.
    constexpr float ROUND = 12582912.0f;
    return __builtin_convertvector((v + ROUND) - ROUND, Ints);
  }
  static Floats add_lanes(const Floats* v) {
    Floats sums;
    for (int i = 0; i < LANES; ++i) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    return sums;
  }

  static Floats lowest_codes(Words codes) {
    return __builtin_convertvector((Ints)(codes & 15), Floats);
  }
  static Floats look_up(const float* values, Words index) {
    Floats found;
    for (int i = 0; i < LANES; ++i) found[i] = values[index[i]];
    return found;
  }
  static Ints dot_codes(Ints sums, Words codes, const int8_t* x) {
    for (int i = 0; i < 4; ++i) sums += (Ints)((codes >> (8 * i)) & 15) * static_cast<int32_t>(x[i]);
    return sums;
  }

  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static Floats fnma(Floats a, Floats b, Floats c) { return c - a * b; }

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

}  // namespace int8fx::portable
