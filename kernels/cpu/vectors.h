// Vectors as GCC and clang have them, of LANES 32-bit elements: the native width, because wider ones
// are kept in memory. No include guard: included once per instruction set, before everything else.

struct Vectors {
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
};

using Floats = Vectors::Floats;
using Ints = Vectors::Ints;
using Words = Vectors::Words;
using Halves = Vectors::Halves;
using Bytes = Vectors::Bytes;

constexpr int PARTS = NR / LANES;  // vectors that hold the channels of a micro-panel

template <class V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
