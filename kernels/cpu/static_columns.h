// The product of the columns of x that stay in 16-bit: the same ones for every row, and known before.
// Part of kernel.h.

// The columns' weights of a micro-tile as floats, once for all of its rows.
struct StaticColumns {
  const Lhs& a;
  alignas(64) float floats[MAX_STATIC_COLUMNS * Isa::MICRO_PANELS * NR];

  StaticColumns(const Lhs& a, const Weight& weight, int64_t micro_panel) : a(a) {
    with_dtype(weight.columns_dtype, [&]<class T>(T) {
      const auto* w = static_cast<const T*>(weight.w_columns);
      for (int64_t i = 0; i < a.in.static_count; ++i, w += weight.N) read(w, weight.N, micro_panel, i);
    });
  }

  Floats vector(int64_t i, int b, int p) const {
    return load<Floats>(floats + (i * Isa::MICRO_PANELS + b) * NR + p * LANES);
  }

 private:
  // Column i of the micro-panels from `micro_panel` on, as many of them as there are.
  template <class T>
  void read(const T* w, int64_t N, int64_t micro_panel, int64_t i) {
    float* out = floats + i * Isa::MICRO_PANELS * NR;
    const int64_t end = std::min(N, (micro_panel + Isa::MICRO_PANELS) * NR);
    for (int64_t n = micro_panel * NR; n < end; n += LANES, out += LANES)
      store(out, load_row(w + n, N - n));
  }
};

// R rows at a time of the tile that begins at m, for as many as there are, times B micro-panels.
template <int R, int B>
inline void static_rows(
    const StaticColumns& weights, int64_t m, int64_t rows, int64_t& r, float* out) {
  const int64_t count = weights.a.in.static_count;
  for (; r + R <= rows; r += R) {
    const float* x = weights.a.in.x_static + (m + r) * count;
    const auto value = [=](int64_t i, int row) { return x[row * count + i]; };
    for (int b = 0; b < B; ++b) {
      const auto column = [&](int64_t i, int v) { return weights.vector(i, b, v); };
      outlier_product<R, 1>(count, column, value, out + (r * Isa::MICRO_PANELS + b) * NR);
    }
  }
}

// What the rows of a tile give: what is left of them, and the product of the static columns, which has
// weights of its own and so no scale.
struct StaticRows : MixedRows {
  StaticColumns static_columns;
  alignas(64) float of_columns[Isa::MR_ALONE * Isa::MICRO_PANELS * NR];

  StaticRows(const Lhs& a, const Weight& weight, int64_t micro_panel, const int8_t* w, int64_t w_stride)
      : MixedRows(a, weight, micro_panel, w, w_stride), static_columns(a, weight, micro_panel) {}

  template <int B>
  void begin(int64_t m, int64_t rows) {
    MixedRows::begin<B>(m, rows);
    int64_t r = 0;
    static_rows<Isa::OUTLIER_ROWS, B>(static_columns, m, rows, r, of_columns);
    static_rows<4, B>(static_columns, m, rows, r, of_columns);
    static_rows<1, B>(static_columns, m, rows, r, of_columns);
  }
  Floats value(const int32_t* acc, int64_t m, int64_t r, int b, int p, Floats w_scale) const {
    const int64_t at = (r * Isa::MICRO_PANELS + b) * NR + p * LANES;
    return MixedRows::value(acc, m, r, b, p, w_scale) + load<Floats>(of_columns + at);
  }
};
