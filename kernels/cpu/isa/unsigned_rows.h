// What vpdpbusd needs of rows, whose activations are unsigned there.
#pragma once

#include <cstdint>
#include <cstring>

namespace int8fx {

// A zero point of 128 is a flipped sign bit.
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

}  // namespace int8fx
