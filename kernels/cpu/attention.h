// Attention of many query rows, block by block of keys, in fp32 (FlashAttention: Dao et al. 2022,
// arXiv 2205.14135). Part of kernel.h.
//
//   y[r] = sum over l of softmax over l(q[r] · k[l] · scale + mask[r, l]) v[l]
//
// A lane is a query row: scores and outputs are kept transposed, so that the maximum and the sum of a
// softmax are those of whole vectors. The query heads that share a key head are more rows of it. A block
// that the mask hides from every row of a tile is not computed: half of a causal attention.

// ABREAST vectors of sums for each of HELD broadcast elements: what the registers hold.
constexpr int HELD = LANES == 16 ? 8 : 4, ABREAST = 3, QUERIES = ABREAST * LANES;
static_assert(QUERIES <= MAX_QUERIES && KEYS % HELD == 0);

// e^x for x <= 0; below -87 it is 0. The polynomial is Cephes' expf, off by 2 units in the last place.
inline Floats exponential(Floats x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 · 2^23, see quantize.h
  const Floats shifted = x * 1.44269504088896341f + ROUND;
  const Floats n = shifted - ROUND;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words power = (Words)((Ints)shifted + (127 - 0x4b400000)) << 23;
  const Ints small = x < Floats{} - 87.0f;
  return (Floats)((Ints)(p * (Floats)power) & ~small);  // a NaN stays
}

// out[i] = out[i] · rescale + sum over j of a[i, j] · b[j], for HELD rows i of QUERIES.
template <int I, int J>
inline void multiply_held(
    const float* a, const float* b, int64_t count, float* out, const Floats* rescale) {
  Floats sums[HELD][ABREAST];
#pragma GCC unroll 8
  for (int i = 0; i < HELD; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < ABREAST; ++v)
      sums[i][v] = rescale ? load<Floats>(out + i * QUERIES + v * LANES) * rescale[v] : Floats{};
  for (int64_t j = 0; j < count; ++j, a += J, b += QUERIES) {
    Floats row[ABREAST];
#pragma GCC unroll 3
    for (int v = 0; v < ABREAST; ++v) row[v] = load<Floats>(b + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < HELD; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < ABREAST; ++v) sums[i][v] += row[v] * a[i * I];
  }
#pragma GCC unroll 8
  for (int i = 0; i < HELD; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < ABREAST; ++v) store(out + i * QUERIES + v * LANES, sums[i][v]);
}

// `rows` rows of `width` floats, padded with zeros to KEYS rows of `padded`.
template <class T>
void widen(
    const T* from, int64_t stride, int64_t rows, int64_t width, int64_t padded, int64_t step,
    float* to) {
  for (int64_t r = 0; r < KEYS; ++r, to += step) {
    if (r >= rows) {
      std::memset(to, 0, padded * sizeof(float));
      continue;
    }
    const T* row = from + r * stride;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load_row(row + i));
    for (; i < padded; ++i) to[i] = i < width ? static_cast<float>(row[i]) : 0.0f;
  }
}

enum class Visible { NONE, SOME, ALL };

// How many of n keys a row of a mask shows as they are.
template <class T>
Visible visible_of(const T* mask, int64_t n) {
  bool all = true, none = true;
  if constexpr (std::is_same_v<T, bool>) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
    uint8_t some = 0, every = 1;
    for (int64_t l = 0; l < n; ++l) some |= bytes[l], every &= bytes[l];
    all = every, none = !some;
  } else {
    Words added{}, shown{};  // bits of any that is not zero; of any that is not -inf
    int64_t l = 0;
    for (; l + LANES <= n; l += LANES) {
      const Words bits = (Words)load_row(mask + l);
      added |= bits << 1;
      shown |= bits ^ 0xff800000;
    }
    for (int i = 0; i < LANES; ++i) all &= added[i] == 0, none &= shown[i] == 0;
    for (; l < n; ++l) all &= mask[l] == 0.0f, none &= mask[l] == -INFINITY;
  }
  return none ? Visible::NONE : all ? Visible::ALL : Visible::SOME;
}

// What is added to the scores of one row, for every QUERIES-th float of `out`.
template <class T>
void spread(const T* mask, int64_t n, float* out) {
  for (int64_t l = 0; l < n; ++l) {
    if constexpr (std::is_same_v<T, bool>) {
      out[l * QUERIES] = mask[l] ? 0.0f : -INFINITY;
    } else {
      out[l * QUERIES] = static_cast<float>(mask[l]);
    }
  }
}

// f(row of the mask, from key l0 on), of the mask's dtype.
template <class F>
auto with_mask_row(const Attention& a, int64_t b, int64_t h, int64_t m, int64_t l0, const F& f) {
  const int64_t at = b * a.mask_strides[0] + h * a.mask_strides[1] + m * a.mask_strides[2] + l0;
  switch (a.mask_dtype) {
    case c10::ScalarType::Bool: return f(static_cast<const bool*>(a.mask) + at);
    case c10::ScalarType::BFloat16: return f(static_cast<const c10::BFloat16*>(a.mask) + at);
    case c10::ScalarType::Half: return f(static_cast<const c10::Half*>(a.mask) + at);
    default: return f(static_cast<const float*>(a.mask) + at);
  }
}

// The mask of a tile of rows that begins at row r0 of a key head's; as [n][QUERIES] if it shows SOME.
inline Visible tile_mask(
    const Attention& a, int64_t b, int64_t kv, int64_t r0, int64_t rows, int64_t l0, int64_t n,
    float* mask) {
  if (!a.mask && !a.causal) return Visible::ALL;
  const auto head = [&](int64_t r) { return kv * a.G + (r0 + r) / a.M; };
  const auto query = [&](int64_t r) { return (r0 + r) % a.M; };
  Visible whole = Visible::SOME;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t m = query(r);
    const Visible one = a.causal ? m < l0            ? Visible::NONE
                                   : m >= l0 + n - 1 ? Visible::ALL
                                                     : Visible::SOME
                                 : with_mask_row(a, b, head(r), m, l0, [&](const auto* row) {
                                     return visible_of(row, n);
                                   });
    whole = r == 0 || one == whole ? one : Visible::SOME;
    if (whole == Visible::SOME) break;
  }
  if (whole != Visible::SOME) return whole;
  for (int64_t r = 0; r < QUERIES; ++r) {
    float* const out = mask + r;
    if (r < rows && a.mask) {
      with_mask_row(a, b, head(r), query(r), l0, [&](const auto* row) { spread(row, n, out); });
    } else {
      const int64_t shown = r < rows ? std::clamp<int64_t>(query(r) - l0 + 1, 0, n) : n;
      for (int64_t l = 0; l < n; ++l) out[l * QUERIES] = l < shown ? 0.0f : -INFINITY;
    }
  }
  return Visible::SOME;
}

// One tile of rows: its queries and outputs as [D][QUERIES], and its softmax so far.
struct Tile {
  int64_t r0, rows;
  float *q, *y;
  Floats largest[ABREAST], sum[ABREAST];
};

// Scores to e^(score - largest), and what is so far to what it is under the new largest.
inline void soften(Tile& tile, float* scores, int64_t n, const float* mask, Floats* rescale) {
#pragma GCC unroll 3
  for (int v = 0; v < ABREAST; ++v) {
    float* const s = scores + v * LANES;
    Floats largest = tile.largest[v];
    for (int64_t l = 0; l < n; ++l) {
      Floats score = load<Floats>(s + l * QUERIES);
      if (mask) {
        score += load<Floats>(mask + l * QUERIES + v * LANES);
        store(s + l * QUERIES, score);
      }
      largest = score > largest ? score : largest;
    }
    // A row that has seen no key yet has no largest score to take away.
    const Floats shift = largest == Floats{} - INFINITY ? Floats{} : largest;
    rescale[v] = exponential(tile.largest[v] - shift);
    Floats sum = tile.sum[v] * rescale[v];
    for (int64_t l = 0; l < n; ++l) {
      const Floats p = exponential(load<Floats>(s + l * QUERIES) - shift);
      store(s + l * QUERIES, p);
      sum += p;
    }
    tile.largest[v] = largest;
    tile.sum[v] = sum;
  }
}

template <class T>
inline T* row_of(
    const Attention& a, const void* of, const int64_t* strides, int64_t b, int64_t kv, int64_t r) {
  const int64_t h = kv * a.G + r / a.M, m = r % a.M;
  const int64_t at = b * strides[0] + h * strides[1] + m * strides[2];
  return const_cast<T*>(static_cast<const T*>(of)) + at;
}

template <class T>
void read_queries(const Attention& a, int64_t b, int64_t kv, Tile& tile) {
  for (int64_t r = 0; r < QUERIES; ++r) {
    const T* q = r < tile.rows ? row_of<T>(a, a.q, a.q_strides, b, kv, tile.r0 + r) : nullptr;
    for (int64_t d = 0; d < a.D; ++d)
      tile.q[d * QUERIES + r] = q ? static_cast<float>(q[d]) * a.scale : 0.0f;
  }
}

template <class T>
void write_outputs(const Attention& a, int64_t b, int64_t kv, const Tile& tile) {
  for (int v = 0; v < ABREAST; ++v) {
    // A row that sees no key is zeros.
    const Floats inverse = tile.sum[v] == Floats{} ? Floats{} : 1.0f / tile.sum[v];
    for (int64_t d = 0; d < a.DV; ++d) {
      float* y = tile.y + d * QUERIES + v * LANES;
      store(y, load<Floats>(y) * inverse);
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* y = row_of<T>(a, a.y, a.y_strides, b, kv, tile.r0 + r);
    for (int64_t d = 0; d < a.DV; ++d) y[d] = static_cast<T>(tile.y[d * QUERIES + r]);
  }
}

// Rows of one key head, ITEM_TILES tiles of them; STRIDE floats hold a widened key or value.
template <class T, int STRIDE>
void attend_item(const Attention& a, int64_t item, float* scratch) {
  const int64_t rows = a.G * a.M;
  const int64_t items = (rows + ITEM_TILES * QUERIES - 1) / (ITEM_TILES * QUERIES);
  const int64_t b = item / items / a.KV, kv = item / items % a.KV;
  const int64_t D = (a.D + HELD - 1) / HELD * HELD, DV = (a.DV + HELD - 1) / HELD * HELD;
  float* const k = scratch;
  float* const v = k + KEYS * STRIDE;
  float* const scores = v + KEYS * STRIDE;
  float* const mask = scores + KEYS * QUERIES;
  float* next = mask + KEYS * QUERIES;
  Tile tiles[ITEM_TILES];
  int64_t count = 0;
  const int64_t first = item % items * ITEM_TILES * QUERIES;
  for (int64_t r0 = first; r0 < rows && count < ITEM_TILES; r0 += QUERIES) {
    Tile& tile = tiles[count++];
    tile = Tile{r0, std::min<int64_t>(QUERIES, rows - r0), next, next + D * QUERIES, {}, {}};
    next += (D + DV) * QUERIES;
    for (auto& largest : tile.largest) largest = Floats{} - INFINITY;
    read_queries<T>(a, b, kv, tile);
    std::memset(tile.y, 0, DV * QUERIES * sizeof(float));
  }
  const T* keys = static_cast<const T*>(a.k) + b * a.k_strides[0] + kv * a.k_strides[1];
  const T* values = static_cast<const T*>(a.v) + b * a.v_strides[0] + kv * a.v_strides[1];
  for (int64_t l0 = 0; l0 < a.L; l0 += KEYS) {
    const int64_t n = std::min<int64_t>(KEYS, a.L - l0);
    bool widened = false;
    for (int64_t t = 0; t < count; ++t) {
      Tile& tile = tiles[t];
      const Visible visible = tile_mask(a, b, kv, tile.r0, tile.rows, l0, n, mask);
      if (visible == Visible::NONE) continue;
      if (!widened) {
        widen(keys + l0 * a.k_strides[2], a.k_strides[2], n, a.D, D, STRIDE, k);
        widen(values + l0 * a.v_strides[2], a.v_strides[2], n, a.DV, DV, STRIDE, v);
        widened = true;
      }
      for (int64_t l = 0; l < n; l += HELD)
        multiply_held<STRIDE, 1>(k + l * STRIDE, tile.q, a.D, scores + l * QUERIES, nullptr);
      Floats rescale[ABREAST];
      soften(tile, scores, n, visible == Visible::SOME ? mask : nullptr, rescale);
      for (int64_t d = 0; d < DV; d += HELD)
        multiply_held<1, STRIDE>(v + d, scores, n, tile.y + d * QUERIES, rescale);
    }
  }
  for (int64_t t = 0; t < count; ++t) write_outputs<T>(a, b, kv, tiles[t]);
}

template <class T>
void attend_as(const Attention& a, int64_t item, float* scratch) {
  const int64_t widest = std::max(a.D, a.DV);
  if (widest <= 64) return attend_item<T, 64 + 16>(a, item, scratch);
  if (widest <= 128) return attend_item<T, 128 + 16>(a, item, scratch);
  return attend_item<T, MAX_HEAD + 16>(a, item, scratch);
}

void attend(const Attention& a, int64_t item, float* scratch) {
  with_dtype(a.dtype, [&]<class T>(T) { attend_as<T>(a, item, scratch); });
}
