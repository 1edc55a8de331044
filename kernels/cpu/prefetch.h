// Fetching weights into the caches before they are multiplied.
#pragma once

#include "packed_weight.h"

namespace int8fx {

// Weights come from memory once per call or once per range of rows, and hardware prefetchers stop at
// each page. So while one micro-panel is multiplied the next is fetched into the L2 cache, in slices:
// every tile of rows takes some lines at each step of K_MULTIPLE. A single tile comes to a line before
// that has helped: with each line that it multiplies it fetches the one `near` bytes on, into the L1
// cache. (One by one: 16 at a time keep the loads waiting that the product wants now.)
struct Prefetch {
  const int8_t* next;
  int64_t lines;  // per step
  int64_t near;   // or 0

  void step() {
    for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }

  // What is fetched near step k of B micro-panels side by side, of which each is followed by the one B
  // later.
  template <int B>
  const int8_t* later(const int8_t* w, int64_t stride, int64_t k) const {
    return w + near + (k * NR + near < stride ? 0 : (B - 1) * stride);
  }
};

}  // namespace int8fx
