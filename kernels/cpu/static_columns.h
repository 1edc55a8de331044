// The product of the columns of x that stay in 16-bit: the same ones for every row, and known before.
// Part of kernel.h.

// The columns' weights of a micro-tile.
struct StaticColumns {
  const Lhs& a;
  const Weight& weight;
  int64_t micro_panel;
  bool converted = false;
  alignas(64) float floats[MAX_STATIC_COLUMNS * Isa::MICRO_PANELS * NR];

  StaticColumns(const Lhs& a, const Weight& weight, int64_t micro_panel)
      : a(a), weight(weight), micro_panel(micro_panel) {}

  // f(column), where column(i, v) is vector v of column i.
  template <class F>
  void as_stored(const F& f) const {
    const int64_t N = weight.N, n = micro_panel * NR;
    with_dtype(weight.columns_dtype, [&]<class T>(T) {
      const T* w = static_cast<const T*>(weight.w_columns) + n;
      f([=](int64_t i, int v) {
        const T* const at = w + i * N + v * LANES;
        // Each column is a stream of its own, and they are more than hardware prefetchers follow.
        __builtin_prefetch(at + 12 * NR, 0, 3);
        const int64_t left = N - n - v * LANES;
        return left > 0 ? load_row(at, left) : Floats{};
      });
    });
  }

  // As floats, once for all rows.
  template <int B>
  void convert() {
    if (converted) return;
    converted = true;
    as_stored([&](const auto& column) {
      for (int64_t i = 0; i < a.in.static_count; ++i)
        for (int v = 0; v < B * PARTS; ++v) store(at(i, v), column(i, v));
    });
  }
  float* at(int64_t i, int v) { return floats + i * Isa::MICRO_PANELS * NR + v * LANES; }
};

// R rows at a time of the tile that begins at m, for as many as there are, times B micro-panels.
template <int R, int B, class Column>
inline void static_rows(
    const Lhs& a, const Column& column, int64_t m, int64_t rows, int64_t& r, float* out) {
  const int64_t count = a.in.static_count;
  for (; r + R <= rows; r += R) {
    const float* x = a.in.x_static + (m + r) * count;
    const auto value = [=](int64_t i, int row) { return x[row * count + i]; };
    // As many sums as registers hold.
    constexpr int TOGETHER = LANES == 16 ? B : 1;
    for (int b = 0; b < B; b += TOGETHER) {
      const auto of_b = [&](int64_t i, int v) { return column(i, b * PARTS + v); };
      outlier_product<R, TOGETHER>(count, of_b, value, out + (r * Isa::MICRO_PANELS + b) * NR);
    }
  }
}

// The columns in 16-bit of a tile: out [rows][MICRO_PANELS * NR].
template <int B>
inline void static_tile(StaticColumns& columns, int64_t m, int64_t rows, float* out) {
  int64_t r = 0;
  if (rows == 1) {
    columns.as_stored([&](const auto& column) {
      static_rows<1, B>(columns.a, column, m, rows, r, out);
    });
    return;
  }
  columns.convert<B>();
  const auto column = [&](int64_t i, int v) { return load<Floats>(columns.at(i, v)); };
  static_rows<Isa::OUTLIER_ROWS, B>(columns.a, column, m, rows, r, out);
  static_rows<4, B>(columns.a, column, m, rows, r, out);
  static_rows<1, B>(columns.a, column, m, rows, r, out);
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
    static_tile<B>(static_columns, m, rows, of_columns);
  }
  Floats value(const int32_t* acc, int64_t m, int64_t r, int b, int p, Floats w_scale) const {
    const int64_t at = (r * Isa::MICRO_PANELS + b) * NR + p * LANES;
    return MixedRows::value(acc, m, r, b, p, w_scale) + load<Floats>(of_columns + at);
  }
};
