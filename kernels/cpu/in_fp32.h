// What weight_only.h needs to multiply in fp32, for any instruction set. Included before it, after
// tile.h, quantize.h and
//
//   repeat_quad            4 floats, repeated over a vector
//   to_floats              LANES int8

using Element = float;
using X = Floats;  // 4 consecutive k of a row, again and again
using W = Floats;  // LANES / 4 channels x 4 k

template <class T>
inline Element element(T x) { return x; }
inline X load_x(const Element* x) { return repeat_quad(x); }
inline void load_w(W* out, const Element* w) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) out[v] = load<Floats>(w + v * LANES);
}
inline void load_w(W* out, const int8_t* w) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) out[v] = to_floats(w + v * LANES);
}
inline void store_w(Element* out, const W* w) {
  for (int v = 0; v < 4; ++v) store(out + v * LANES, w[v]);
}
constexpr int channel_of(int i) { return i; }
inline void dot(Floats& sums, X x, W w) { sums += x * w; }
