// pack_tile and tile_product for instruction sets that multiply one broadcast row with a vector of
// channels. No include guard: included once per instruction set, before kernel.h.
//
// A tile of rows is packed [K_padded / KR][rows][KR], so that the loop over K reads it in sequence.

static_assert(HasDotHooks<Isa>, "isa/hooks.h lists what dot.h needs");

constexpr bool FETCHES_NEAR = true;

template <int R, int B, bool NEAR>
void dot_tile(
    const Isa::Activation* x, const int8_t* w, int64_t w_stride, int64_t k_padded, int32_t* acc,
    Prefetch ahead) {
  // Few rows leave few independent sums: take several k at once to hide the latency.
  constexpr int WIDTH = B * Isa::VECTORS;
  constexpr int CHAINS = R * WIDTH >= 8 ? 1 : R * WIDTH >= 4 ? 2 : 4;
  Isa::Sums sums[CHAINS][R][WIDTH] = {};
#pragma GCC unroll 8
  for (int v = 0; v < WIDTH; ++v) {
    const int8_t* channel_sums = w + v / Isa::VECTORS * w_stride + k_padded * NR;
    const Isa::Sums first = Isa::first_sums(channel_sums, v % Isa::VECTORS);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[0][r][v] = first;
  }
  for (int64_t k = 0; k < k_padded; k += K_MULTIPLE) {
    ahead.step();
    const int8_t* later = ahead.later<B>(w, w_stride, k);
    for (int i = 0; i < K_MULTIPLE; i += 4 * CHAINS) {
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c, later += 4 * NR) {
        if constexpr (NEAR) {
#pragma GCC unroll 2
          for (int b = 0; b < B; ++b) __builtin_prefetch(later + b * w_stride, 0, 3);
        }
        Isa::W columns[WIDTH];
#pragma GCC unroll 8
        for (int v = 0; v < WIDTH; ++v)
          columns[v] = Isa::load_w(w + v / Isa::VECTORS * w_stride + 4 * c * NR, v % Isa::VECTORS);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Isa::X row = Isa::load_x(x + 4 * (c * R + r));
#pragma GCC unroll 8
          for (int v = 0; v < WIDTH; ++v) Isa::dot(sums[c][r][v], row, columns[v]);
        }
      }
      w += 4 * CHAINS * NR;
      x += 4 * CHAINS * R;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 1; c < CHAINS; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < WIDTH; ++v) sums[0][r][v] = sums[0][r][v] + sums[c][r][v];
    }
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b)
      Isa::store_sums(acc + (r * Isa::MICRO_PANELS + b) * NR, sums[0][r] + b * Isa::VECTORS);
  }
}

using DotTile = decltype(&dot_tile<1, 1, true>);

template <int B, bool NEAR, int... R>
constexpr std::array<DotTile, sizeof...(R)> dot_tiles(std::integer_sequence<int, R...>) {
  return {dot_tile<R + 1, B, NEAR>...};
}

template <int B>
void tile_product(
    const Lhs& a, int64_t m, int64_t rows, const int8_t* w, int64_t w_stride,
    int32_t* acc, Prefetch ahead) {
  constexpr std::make_integer_sequence<int, B == 1 ? Isa::MR_ALONE : Isa::MR> ROWS;
  static constexpr auto TILES = dot_tiles<B, false>(ROWS), NEAR_TILES = dot_tiles<B, true>(ROWS);
  const auto* x = static_cast<const Isa::Activation*>(a.packed.x) + m * a.tiling.K_padded;
  const auto& tiles = ahead.near ? NEAR_TILES : TILES;
  tiles[rows - 1](x, w, w_stride, a.tiling.K_padded, acc, ahead);
}

void pack_tile(const Lhs& a, int64_t tile) {
  const int64_t m = tile * a.tiling.rows;
  const int64_t rows = std::min(a.tiling.rows, a.in.M - m);
  auto* packed = static_cast<Isa::Activation*>(a.packed.x) + m * a.tiling.K_padded;
  const int64_t done = Isa::pack_groups(a.in.x_int8 + m * a.in.K, a.in.K, rows, packed);
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* x = a.in.x_int8 + (m + r) * a.in.K;
    Isa::Activation* out = packed + done * rows + 4 * r;
    int64_t k = done;
    for (; k + 4 <= a.in.K; k += 4, out += 4 * rows) Isa::pack_x(x + k, out);
    for (; k < a.tiling.K_padded; k += 4, out += 4 * rows) {
      int8_t rest[4] = {};
      for (int64_t i = k; i < a.in.K && i < k + 4; ++i) rest[i - k] = x[i];
      Isa::pack_x(rest, out);
    }
  }
}
