// The hooks of weight_only.h for a product in fp32, with any instruction set. Part of kernel.h.

template <int ROWS>
struct InFp32 {
  static constexpr int MR = ROWS;

  using Element = float;
  using X = Floats;  // 4 consecutive k of a row, again and again
  using W = Floats;  // LANES / 4 channels x 4 k

  template <class T>
  static Element element(T x) { return x; }
  static X load_x(const Element* x) { return Isa::repeat_quad(x); }
  static void load_w(W* out, const Element* w) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) out[v] = load<Floats>(w + v * LANES);
  }
  static void load_w(W* out, const int8_t* w) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) out[v] = Isa::to_floats(w + v * LANES);
  }
  static void store_w(Element* out, const W* w) {
    for (int v = 0; v < 4; ++v) store(out + v * LANES, w[v]);
  }
  static constexpr int channel_of(int i) { return i; }
  static void dot(Floats& sums, X x, W w) { sums += x * w; }
};
