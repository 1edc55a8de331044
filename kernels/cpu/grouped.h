// Weights of four bits by groups along K. Part of kernel.h.
//
//   y = Σ_g (acc_g · scale_g + Σ_{k in g} x[k] · offset_g) [· x_scale] + x_static @ w_columns + bias
//   acc_g = Σ_{k in g} x[k] · code[k],   offset_g = -zero_g · scale_g
//
// Codes are unsigned, so that rows in int8 are the signed operand of an instruction that multiplies
// unsigned with signed bytes: they need no zero point, and the sums no correction. A group's sum is exact
// in int32, or with rows in float in fp32, and meets its scale once. A row's sums are in the same order
// whatever rows come with it.
//
// A micro-panel is [K_padded / 8][NR] words: byte i of a word has code k + i in its low half and code
// k + 4 + i in its high half.

constexpr int64_t CODES_IN_A_WORD = 8;
constexpr int GROUPED_ROWS = LANES == 16 ? 12 : 2;

// Micro-panels that R rows meet at once: enough independent sums to hide an instruction's latency, and no
// more than registers hold.
constexpr int grouped_micro_panels(int R) {
  if (LANES == 16) return R <= 3 ? 4 : 2;
  return LANES == 8 && R == 1 ? 2 : 1;
}
constexpr int MOST_GROUPED_MICRO_PANELS = grouped_micro_panels(1);

// --- scales and offsets -------------------------------------------------------------------------------

// Lanes i of b and i ^ STRIDE of a change places, for the i that have no bit STRIDE.
template <int STRIDE, int... I>
inline void exchange(Floats& a, Floats& b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  const Floats left = __builtin_shufflevector(a, b, (I & STRIDE ? LANES + (I ^ STRIDE) : I)...);
  const Floats right = __builtin_shufflevector(a, b, (I & STRIDE ? LANES + I : I ^ STRIDE)...);
#else
  const Floats left = __builtin_shuffle(a, b, Ints{(I & STRIDE ? LANES + (I ^ STRIDE) : I)...});
  const Floats right = __builtin_shuffle(a, b, Ints{(I & STRIDE ? LANES + I : I ^ STRIDE)...});
#endif
  a = left;
  b = right;
}

template <int STRIDE = 1>
inline void transpose(Floats* v) {
  if constexpr (STRIDE < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (!(i & STRIDE)) exchange<STRIDE>(v[i], v[i + STRIDE], std::make_integer_sequence<int, LANES>());
    transpose<STRIDE * 2>(v);
  }
}

inline Floats load_grid(const float* p, int64_t count) { return load_row(p, count); }
inline Floats load_grid(const c10::BFloat16* p, int64_t count) { return load_row(p, count); }
inline Floats load_grid(const c10::Half* p, int64_t count) { return load_row(p, count); }
inline Floats load_grid(const uint8_t* p, int64_t count) {
  int8_t bytes[LANES] = {};
  if (count < LANES) std::memcpy(bytes, p, count);
  const Floats v = Isa::to_floats(count < LANES ? bytes : reinterpret_cast<const int8_t*>(p));
  return v < 0.0f ? v + 256.0f : v;
}

// out [G][NR] = values [N, G] of the channels of a micro-panel; zeros for those that are not there.
template <class T>
inline void transpose_grid(const T* values, int64_t N, int64_t micro_panel, int64_t G, float* out) {
  for (int64_t c = 0; c < NR; c += LANES) {
    const int64_t n = micro_panel * NR + c;
    for (int64_t g = 0; g < G; g += LANES) {
      Floats v[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        v[i] = n + i < N ? load_grid(values + (n + i) * G + g, G - g) : Floats{};
      transpose(v);
      for (int i = 0; i < LANES && g + i < G; ++i) store(out + (g + i) * NR + c, v[i]);
    }
  }
}

// scale and offset [G][NR] of a micro-panel.
inline void read_grid(
    const Weight& weight, int64_t micro_panel, int64_t G, float* scale, float* offset) {
  const Grid& grid = weight.grid;
  with_dtype(grid.dtype, [&]<class T>(T) {
    transpose_grid(static_cast<const T*>(grid.scale), weight.N, micro_panel, G, scale);
  });
  if (grid.zeros != Zeros::MIDDLE) {
    const auto read = [&]<class T>(T) {
      transpose_grid(static_cast<const T*>(grid.zero_point), weight.N, micro_panel, G, offset);
    };
    if (grid.zeros == Zeros::INTEGER) {
      read(uint8_t());
    } else {
      with_dtype(grid.zero_dtype, read);
    }
  }
  if (grid.zeros == Zeros::OFFSET) return;
  for (int64_t i = 0; i < G * NR; i += LANES) {
    const Floats zero = grid.zeros == Zeros::MIDDLE ? Floats{} + 8.0f : load<Floats>(offset + i);
    store(offset + i, -zero * load<Floats>(scale + i));
  }
}

// --- products -----------------------------------------------------------------------------------------

constexpr int64_t PACKED_BYTES = NR * sizeof(int32_t);  // of a micro-panel, at 8 k

// Rows in int8. (Unpacking a micro-panel once for all tiles of rows gains nothing: it has twice the bytes,
// and leaves the L1 cache.)
struct Int8Rows {
  using Element = int8_t;
  using Sums = Ints;

  // R rows times 8 k of V vectors of channels, of which v begins at w(v).
  template <int R, int V, class W>
  static void add(Sums (&sums)[R][V], const W& w, const Element* x) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, x += 4 * R) {
      Words quads[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) quads[v] = (load<Words>(w(v)) >> (4 * half)) & 0x0f0f0f0f;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = Isa::dot_codes(sums[r][v], quads[v], x + 4 * r);
      }
    }
  }
  static Floats to_floats(Sums sums) { return __builtin_convertvector(sums, Floats); }
  static Floats row_scale(const Lhs& a, int64_t m) { return Floats{} + a.in.x_scale[m]; }
};

// Rows as they are, in fp32.
struct RowsAsTheyAre {
  using Element = float;
  using Sums = Floats;

  template <int R, int V, class W>
  static void add(Sums (&sums)[R][V], const W& at, const Element* x) {
    static constexpr uint32_t SHIFTS[CODES_IN_A_WORD] = {0, 8, 16, 24, 4, 12, 20, 28};
#pragma GCC unroll 8
    for (int i = 0; i < CODES_IN_A_WORD; ++i) {
      Floats w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        w[v] = Isa::lowest_codes(load<Words>(at(v)) >> (Words{} + SHIFTS[i]));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats value = Floats{} + x[4 * (i / 4 * R + r) + i % 4];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = Isa::fma(value, w[v], sums[r][v]);
      }
    }
  }
  static Floats to_floats(Sums sums) { return sums; }
  static Floats row_scale(const Lhs&, int64_t) { return Floats{} + 1.0f; }
};

// Some micro-panels side by side, and their scales and offsets, [G][NR] each.
struct GroupedMicroPanels {
  const int8_t* w;
  int64_t stride;              // of w, in bytes
  const float *scale, *offset;
  int64_t grid_stride;         // of both, in floats
  int64_t near;                // how far ahead codes are fetched, in bytes; or 0
};
constexpr int64_t GROUPED_NEAR = 2 << 10;

// out [R][B * NR] = R rows, packed [K_padded / 4][R][4], times B micro-panels.
template <class Rows, int R, int B>
void grouped_rows(
    const typename Rows::Element* x, const GroupedMicroPanels& micro_panels, int64_t group, int64_t G,
    const float* x_sums, float* out) {
  constexpr int V = B * PARTS;
  // Beside as many sums of a group, registers have no room for more: they are added to in the L1 cache.
  constexpr bool IN_MEMORY = R * V > 12;
  Floats totals[IN_MEMORY ? 1 : R][V] = {};
  if (IN_MEMORY) std::memset(out, 0, R * B * NR * sizeof(float));
  const int8_t* w = micro_panels.w;
  for (int64_t g = 0; g < G; ++g, ++x_sums) {
    typename Rows::Sums acc[R][V] = {};
    for (int64_t k = 0; k < group; k += CODES_IN_A_WORD, w += PACKED_BYTES, x += CODES_IN_A_WORD * R) {
      if (micro_panels.near) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
          __builtin_prefetch(w + b * micro_panels.stride + micro_panels.near, 0, 3);
      }
      Rows::add(acc, [&](int v) {
        return w + v / PARTS * micro_panels.stride + v % PARTS * sizeof(Words);
      }, x);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t at = v / PARTS * micro_panels.grid_stride + g * NR + v % PARTS * LANES;
      const Floats s = load<Floats>(micro_panels.scale + at);
      const Floats o = load<Floats>(micro_panels.offset + at);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* const to = out + (r * V + v) * LANES;
        const Floats before = IN_MEMORY ? load<Floats>(to) : totals[IN_MEMORY ? 0 : r][v];
        const Floats beside = Isa::fma(Floats{} + x_sums[r * G], o, before);
        const Floats total = Isa::fma(Rows::to_floats(acc[r][v]), s, beside);
        if (IN_MEMORY) {
          store(to, total);
        } else {
          totals[IN_MEMORY ? 0 : r][v] = total;
        }
      }
    }
  }
  if (IN_MEMORY) return;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + (r * V + v) * LANES, totals[IN_MEMORY ? 0 : r][v]);
  }
}

template <class Rows>
using GroupedTile = void (*)(
    const typename Rows::Element*, const GroupedMicroPanels&, int64_t, int64_t, const float*, float*);

// Of 1, 2, ... rows; with as many micro-panels as they meet, or with one.
template <class Rows, bool ALONE, int... R>
constexpr std::array<GroupedTile<Rows>, sizeof...(R)> grouped_tiles(std::integer_sequence<int, R...>) {
  return {grouped_rows<Rows, R + 1, ALONE ? 1 : grouped_micro_panels(R + 1)>...};
}

// y of `count` micro-panels from `micro_panel` on, whose sums are [rows][count * NR].
template <class Rows, class T>
inline void finish_groups(
    const Lhs& a, const Weight& weight, int64_t m, int64_t rows, int64_t micro_panel, int count,
    const float* sums) {
  alignas(64) float of_columns[GROUPED_ROWS * Isa::MICRO_PANELS * NR];
  for (int b = 0; b < count; ++b) {
    const Channels channels(weight, micro_panel + b);
    if (a.in.static_count) {
      StaticColumns columns(a, weight, micro_panel + b);
      static_tile<1>(columns, m, rows, of_columns);
    }
    finish<T>(weight, m, rows, channels, [&](int64_t r, int p) {
      const int64_t at = (r * count + b) * NR + p * LANES;
      const Floats product = load<Floats>(sums + at) * Rows::row_scale(a, m + r);
      if (!a.in.static_count) return product;
      return product + load<Floats>(of_columns + r * Isa::MICRO_PANELS * NR + p * LANES);
    });
  }
}

template <class Rows, class T>
void multiply_groups_as(
    const Lhs& a, const Weight& weight, int64_t m0, int64_t m1, int64_t begin, int64_t end) {
  constexpr std::make_integer_sequence<int, GROUPED_ROWS> ROWS;
  static constexpr auto TILES = grouped_tiles<Rows, false>(ROWS), ALONE = grouped_tiles<Rows, true>(ROWS);
  const int64_t K_padded = a.tiling.K_padded, G = a.in.groups;
  const int most = grouped_micro_panels(std::min(a.tiling.rows, m1 - m0));
  std::unique_ptr<float[], Free> grid(
      static_cast<float*>(std::aligned_alloc(64, 2 * most * G * NR * sizeof(float))));
  alignas(64) float sums[GROUPED_ROWS * MOST_GROUPED_MICRO_PANELS * NR];
  // A single tile reads each micro-panel once, as fast as memory gives it.
  const int64_t near = m1 - m0 > a.tiling.rows ? 0 : GROUPED_NEAR;
  float* const offsets = grid.get() + most * G * NR;
  GroupedMicroPanels micro_panels{nullptr, K_padded * NR / 2, grid.get(), offsets, G * NR, near};
  for (int64_t micro_panel = begin, count; micro_panel < end; micro_panel += count) {
    count = end - micro_panel < most ? 1 : most;
    micro_panels.w = weight.packed + micro_panel * micro_panels.stride;
    for (int64_t b = 0; b < count; ++b)
      read_grid(weight, micro_panel + b, G, grid.get() + b * G * NR, grid.get() + (most + b) * G * NR);
    for (int64_t m = m0; m < m1; m += a.tiling.rows) {
      const int64_t rows = std::min(a.tiling.rows, m1 - m);
      const auto* x = static_cast<const typename Rows::Element*>(a.packed.x) + m * K_padded;
      const float* x_sums = a.in.group_sums + m * G;
      // The last tile may have fewer rows, which would meet more micro-panels than there are.
      const int at_once = count == grouped_micro_panels(rows) ? count : 1;
      for (int64_t b = 0; b < count; b += at_once) {
        GroupedMicroPanels these = micro_panels;
        these.w += b * micro_panels.stride;
        these.scale += b * G * NR;
        these.offset += b * G * NR;
        (at_once > 1 ? TILES : ALONE)[rows - 1](x, these, K_padded / G, G, x_sums, sums);
        finish_groups<Rows, T>(a, weight, m, rows, micro_panel + b, at_once, sums);
      }
    }
  }
}

template <class Rows>
void multiply_groups(
    const Lhs& a, const Weight& weight, int64_t m0, int64_t m1, int64_t begin, int64_t end) {
  with_dtype(a.in.dtype, [&]<class T>(T) {
    multiply_groups_as<Rows, T>(a, weight, m0, m1, begin, end);
  });
}

// --- rows ---------------------------------------------------------------------------------------------

inline float sum_of(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += x[k];
  return sum;
}

template <class T>
inline float sum_of(const T* x, int64_t count) {
  Floats sums{};
  for_vectors(count, [&](int64_t k, auto left) { sums += load_row(x + k, left); });
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += sums[i];
  return sum;
}

// One tile of rows x(m) [K], [K_padded / 4][rows][4], and each group's sum.
template <class Element, class Row>
inline void pack_groups_of(const Lhs& a, int64_t tile, const Row& row) {
  const int64_t m = tile * a.tiling.rows, K_padded = a.tiling.K_padded, G = a.in.groups;
  const int64_t rows = std::min(a.tiling.rows, a.in.M - m), group = K_padded / G;
  for (int64_t r = 0; r < rows; ++r) {
    const auto* x = row(m + r);
    Element* out = static_cast<Element*>(a.packed.x) + m * K_padded + 4 * r;
    int64_t k = 0;
    for (; k + 4 <= a.in.K; k += 4, out += 4 * rows)
      for (int i = 0; i < 4; ++i) out[i] = x[k + i];
    for (; k < K_padded; k += 4, out += 4 * rows)
      for (int i = 0; i < 4; ++i) out[i] = k + i < a.in.K ? Element(x[k + i]) : Element{};
    float* const sums = a.in.group_sums + (m + r) * G;
    for (int64_t g = 0; g < G; ++g)
      sums[g] = sum_of(x + g * group, std::clamp<int64_t>(a.in.K - g * group, 0, group));
  }
}

void pack_int8_groups(const Lhs& a, int64_t tile) {
  pack_groups_of<int8_t>(a, tile, [&](int64_t m) { return a.in.x_int8 + m * a.in.K; });
}

void pack_float_groups(const Lhs& a, int64_t tile) {
  with_dtype(a.in.dtype, [&]<class T>(T) {
    pack_groups_of<float>(a, tile, [&](int64_t m) {
      return static_cast<const T*>(a.in.x_outlier) + m * a.in.K;
    });
  });
}

inline void nothing_to_enter(const Lhs&) {}
inline void nothing_to_leave() {}

// A work item has as many micro-panels as few rows meet at once.
constexpr GroupedProducts GROUPED{
    {GROUPED_ROWS, GROUPED_ROWS, 1, MOST_GROUPED_MICRO_PANELS, sizeof(int8_t), pack_int8_groups,
     nothing_to_enter, nothing_to_leave, multiply_groups<Int8Rows>},
    {GROUPED_ROWS, GROUPED_ROWS, 1, MOST_GROUPED_MICRO_PANELS, sizeof(float), pack_float_groups,
     nothing_to_enter, nothing_to_leave, multiply_groups<RowsAsTheyAre>}};
