// Weights in int8 and x as it is: y = (x @ w_int8ᵀ) · w_scale + bias. No include guard: included after
// kernel.h, in a namespace with a struct FloatIsa.
//
// Weights are converted in registers, in the order that they are packed in: 64 bytes of a micro-panel
// are KR k of NR channels, and a row's same KR k are repeated beside them. Where several tiles of rows
// read a micro-panel, it is converted once, into the cache. A row's sums are in the same order whatever
// rows come with it.

using Element = FloatIsa::Element;
static_assert(HasFloatProductHooks<FloatIsa, Floats>, "isa/hooks.h lists what weight_only.h needs");

// How far ahead rows that are a single tile fetch weights. On Zen 5 a row of 2048 to 5632 channels takes
// 0.86 of the time without where memory gives it 75 GB/s and 0.98 where it gives 50; 12 KiB and 4 KiB are
// better in one of these cases, and worse in the other.
constexpr int64_t NEAR = 8 << 10;
constexpr int QUADS = KR * NR;                             // elements of a micro-panel at KR k
constexpr int AT_ONCE = sizeof(Floats) / sizeof(Element);  // of them, those in a vector
constexpr int SHARE = QUADS / AT_ONCE * LANES / NR;        // sums of a channel
constexpr int WIDTH = std::min(QUADS / AT_ONCE, 4);        // vectors that registers hold sums of

// out [R][NR] = R rows, packed [K_padded / KR][R][KR], times a micro-panel.
template <int R, class T>
void dot_rows(const Element* x, const T* w, int64_t k_padded, float* out, Prefetch ahead) {
  for (int first = 0; first < QUADS; first += WIDTH * AT_ONCE) {
    Floats sums[R][WIDTH] = {};
    const Element* row = x;
    const T* columns = w + first;
    for (int64_t k = 0; k < k_padded; k += K_MULTIPLE) {
      if (first == 0) ahead.step();
      for (int i = 0; i < K_MULTIPLE; i += 4, row += 4 * R, columns += QUADS) {
        if (ahead.near && first == 0) __builtin_prefetch(columns + ahead.near, 0, 3);
        FloatIsa::W weights[WIDTH];
        FloatIsa::load_w(weights, columns);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const FloatIsa::X quad = FloatIsa::load_x(row + 4 * r);
#pragma GCC unroll 4
          for (int v = 0; v < WIDTH; ++v) FloatIsa::dot(sums[r][v], quad, weights[v]);
        }
      }
    }
    // Stored one by one: an array that a loop reads would be kept in memory from the beginning.
    float lanes[R * WIDTH * LANES];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < WIDTH; ++v) store(lanes + (r * WIDTH + v) * LANES, sums[r][v]);
    }
    constexpr int CHANNELS = WIDTH * LANES / SHARE;
    for (int i = 0; i < R * CHANNELS; ++i) {
      float sum = lanes[i * SHARE];
      for (int j = 1; j < SHARE; ++j) sum += lanes[i * SHARE + j];
      out[i / CHANNELS * NR + first / 4 + FloatIsa::channel_of(i % CHANNELS)] = sum;
    }
  }
}

template <class T>
using DotRows = void (*)(const Element*, const T*, int64_t, float*, Prefetch);

template <class T, int... R>
constexpr std::array<DotRows<T>, FloatIsa::MR> all_rows(std::integer_sequence<int, R...>) {
  return {dot_rows<R + 1, T>...};
}

// Rows [m, m + rows) times a micro-panel of weights: y.
template <class Y, class T>
inline void multiply_tile(
    const Lhs& a, const Weight& weight, int64_t m, int64_t rows, const T* w,
    const Channels& channels, Prefetch ahead) {
  static constexpr auto TILES = all_rows<T>(std::make_integer_sequence<int, FloatIsa::MR>());
  alignas(64) float sums[FloatIsa::MR * NR];
  TILES[rows - 1](
      static_cast<const Element*>(a.packed.x) + m * a.tiling.K_padded, w, a.tiling.K_padded, sums, ahead);
  finish<Y>(weight, m, rows, channels, [&](int64_t r, int p) {
    return load<Floats>(sums + r * NR + p * LANES) * channels.w_scale[p];
  });
}

template <class Y>
void multiply_as(
    const Lhs& a, const Weight& weight, int64_t m0, int64_t m1, int64_t begin, int64_t end) {
  const int64_t tiles = (m1 - m0 + a.tiling.rows - 1) / a.tiling.rows;
  const int64_t elements = a.tiling.K_padded * NR;
  std::unique_ptr<Element[], Free> converted;
  if (tiles > 1)
    converted.reset(static_cast<Element*>(std::aligned_alloc(64, elements * sizeof(Element))));
  for (; begin < end; ++begin) {
    const int8_t* w = weight.packed + begin * micro_panel_bytes(a.tiling.K_padded);
    const Channels channels(weight, begin);
    Prefetch ahead{nullptr, 0, NEAR};
    if (tiles > 1) ahead = next_micro_panels(a, weight, m1 - m0, begin, 1);
    if (converted)
      for (int64_t i = 0; i < elements; i += WIDTH * AT_ONCE) {
        FloatIsa::W weights[WIDTH];
        FloatIsa::load_w(weights, w + i);
        FloatIsa::store_w(&converted[i], weights);
      }
    for (int64_t m = m0; m < m1; m += a.tiling.rows) {
      const int64_t rows = std::min(a.tiling.rows, m1 - m);
      if (converted) {
        multiply_tile<Y>(a, weight, m, rows, converted.get(), channels, ahead);
      } else {
        multiply_tile<Y>(a, weight, m, rows, w, channels, ahead);
      }
      ahead.next += a.tiling.K_padded * ahead.lines;
    }
  }
}

template <class T>
void pack_as(const Lhs& a, int64_t tile) {
  const int64_t m = tile * a.tiling.rows;
  const int64_t rows = std::min(a.tiling.rows, a.in.M - m);
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = static_cast<const T*>(a.in.x_outlier) + (m + r) * a.in.K;
    Element* out = static_cast<Element*>(a.packed.x) + m * a.tiling.K_padded + 4 * r;
    int64_t k = 0;
    for (; k + 4 <= a.in.K; k += 4, out += 4 * rows)
      for (int i = 0; i < 4; ++i) out[i] = FloatIsa::element(x[k + i]);
    for (; k < a.tiling.K_padded; k += 4, out += 4 * rows)
      for (int i = 0; i < 4; ++i) out[i] = k + i < a.in.K ? FloatIsa::element(x[k + i]) : Element{};
  }
}

// A product in bf16 is of bf16 rows alone.
template <class T>
constexpr bool SERVES = std::is_same_v<Element, float> || std::is_same_v<T, c10::BFloat16>;

template <class F>
inline void for_dtype(c10::ScalarType dtype, const F& f) {
  if (dtype == c10::ScalarType::BFloat16) return f(c10::BFloat16());
  if constexpr (SERVES<float>) {
    if (dtype == c10::ScalarType::Half) return f(c10::Half());
    f(float());
  }
}

void pack(const Lhs& a, int64_t tile) {
  for_dtype(a.in.dtype, [&](auto x) { pack_as<decltype(x)>(a, tile); });
}

void multiply(
    const Lhs& a, const Weight& weight, int64_t m0, int64_t m1, int64_t begin, int64_t end) {
  for_dtype(a.in.dtype, [&](auto y) { multiply_as<decltype(y)>(a, weight, m0, m1, begin, end); });
}

// Micro-panels are multiplied one by one, but a work item has two at least: SmolLM2's decode step took 0.94
// of the time so, on average of three runs and before weights were fetched near.
constexpr Product PRODUCT{
    FloatIsa::MR,
    FloatIsa::MR,
    1,
    2,
    sizeof(Element),
    pack,
    Isa::enter,
    Isa::leave,
    multiply};
