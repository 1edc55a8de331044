// Attention of a few query rows, the heads that share a key head among them: reading keys and values is
// all there is to it, and with one key head for each thread at most, threads share its keys, too
// (Flash-Decoding: Dao et al. 2023). Part of kernel.h.
//
// A part is what some keys give for the rows of a key head: for each row the largest score, the sum of
// e^(score - largest), and [DV] values weighted with these, as floats.

// Rows at once, and vectors of sums of each.
constexpr int ROWS_ABREAST = LANES == 16 ? 4 : 2, VALUES_ABREAST = 4;

inline int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

// scores[r][l] = q[r] · k[l] for R rows and n keys.
template <int R, class T>
void score(const float* q, const T* k, int64_t k_stride, int64_t D, int64_t n, float* scores) {
  for (int64_t l0 = 0; l0 < n; l0 += LANES) {
    Floats products[R][LANES];
    for (int64_t l = 0; l < LANES; ++l) {
      const T* key = k + std::min(l0 + l, n - 1) * k_stride;
      Floats sums[R] = {};
      for_vectors(D, [&](int64_t d, auto count) {
        const Floats part = load_row(key + d, count);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r] += load<Floats>(q + r * padded(D) + d) * part;
      });
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) products[r][l] = sums[r];
    }
    for (int r = 0; r < R; ++r) store(scores + r * KEYS + l0, Isa::add_lanes(products[r]));
  }
}

// y[r][d ..] = y[r][d ..] · rescale[r] + sum over l of p[r][l] · v[l][d ..] for R rows and W vectors.
template <int R, int W, class T, class C>
void weigh(
    const float* p, const T* v, int64_t v_stride, int64_t n, C count, const float* rescale, float* y,
    int64_t y_stride) {
  Floats sums[R][W];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sums[r][w] = load<Floats>(y + r * y_stride + w * LANES) * rescale[r];
  for (int64_t l = 0; l < n; ++l, v += v_stride) {
    Floats value[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) value[w] = load_row(v + w * LANES, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[r][w] += value[w] * p[r * KEYS + l];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(y + r * y_stride + w * LANES, sums[r][w]);
}

template <int R, class T>
void weigh_all(
    const float* p, const T* v, int64_t v_stride, int64_t n, int64_t DV, const float* rescale,
    float* y) {
  constexpr int64_t AT_ONCE = VALUES_ABREAST * LANES;
  const std::integral_constant<int64_t, LANES> whole;
  int64_t d = 0;
  for (; d + AT_ONCE <= DV; d += AT_ONCE)
    weigh<R, VALUES_ABREAST>(p, v + d, v_stride, n, whole, rescale, y + d, padded(DV));
  for (; d + LANES <= DV; d += LANES)
    weigh<R, 1>(p, v + d, v_stride, n, whole, rescale, y + d, padded(DV));
  if (d < DV) weigh<R, 1>(p, v + d, v_stride, n, DV - d, rescale, y + d, padded(DV));
}

// f.operator()<R>(r) for groups of R rows from row r on.
template <class F>
inline void for_rows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + ROWS_ABREAST <= rows; r += ROWS_ABREAST) f.template operator()<ROWS_ABREAST>(r);
  for (; r + 2 <= rows; r += 2) f.template operator()<2>(r);
  for (; r < rows; ++r) f.template operator()<1>(r);
}

// The rows of a key head, and what they have come to.
struct FewRows {
  int64_t count;
  float *q, *y;  // [count][D], scaled, and [count][DV], each row padded
  float largest[FEW_QUERIES];
  Floats sum[FEW_QUERIES];
};

// Adds the mask to a row's scores of keys l0 ... l0 + n; false if it hides them all.
inline bool apply_mask(
    const Attention& a, int64_t b, int64_t h, int64_t m, int64_t l0, int64_t n, float* scores) {
  if (a.causal)
    for (int64_t l = std::max<int64_t>(m - l0 + 1, 0); l < n; ++l) scores[l] = -INFINITY;
  if (!a.mask) return !a.causal || l0 <= m;
  return with_mask_row(a, b, h, m, l0, [&]<class T>(const T* mask) {
    const Visible visible = visible_of(mask, n);
    if (visible == Visible::SOME)
      for (int64_t l = 0; l < n; ++l) {
        if constexpr (std::is_same_v<T, bool>) {
          if (!mask[l]) scores[l] = -INFINITY;
        } else {
          scores[l] += static_cast<float>(mask[l]);
        }
      }
    return visible != Visible::NONE;
  });
}

// Scores of n keys to e^(score - largest); returns what is so far is worth under the new largest.
inline float soften_row(float* scores, int64_t n, float& largest, Floats& sum) {
  for (int64_t l = n; l % LANES; ++l) scores[l] = -INFINITY;
  Floats highest = Floats{} + largest;
  for (int64_t l = 0; l < n; l += LANES) {
    const Floats s = load<Floats>(scores + l);
    highest = s > highest ? s : highest;
  }
  const float before = largest;
  for (int i = 0; i < LANES; ++i) largest = std::max(largest, highest[i]);
  // A row that has seen no key yet has no largest score to take away.
  const float shift = largest == -INFINITY ? 0.0f : largest;
  const float rescale = exponential(Floats{} + (before - shift))[0];
  sum *= rescale;
  for (int64_t l = 0; l < n; l += LANES) {
    const Floats p = exponential(load<Floats>(scores + l) - shift);
    store(scores + l, p);
    sum += p;
  }
  return rescale;
}

// Whether the mask shows any row any of n keys from l0 on.
inline bool any_visible(const Attention& a, int64_t b, int64_t kv, int64_t l0, int64_t n) {
  if (a.causal && l0 >= a.M) return false;
  if (!a.mask) return true;
  for (int64_t r = 0; r < a.G * a.M; ++r) {
    const auto shown = [&](const auto* mask) { return visible_of(mask, n) != Visible::NONE; };
    if (with_mask_row(a, b, kv * a.G + r / a.M, r % a.M, l0, shown)) return true;
  }
  return false;
}

// n keys from l0 on, at most KEYS.
template <class T>
void attend_keys(
    const Attention& a, int64_t b, int64_t kv, int64_t l0, int64_t n, FewRows& rows) {
  alignas(64) float scores[FEW_QUERIES * KEYS];
  const T* k = static_cast<const T*>(a.k) + b * a.k_strides[0] + kv * a.k_strides[1] + l0 * a.k_strides[2];
  const T* v = static_cast<const T*>(a.v) + b * a.v_strides[0] + kv * a.v_strides[1] + l0 * a.v_strides[2];
  for_rows(rows.count, [&]<int R>(int64_t r) {
    score<R>(rows.q + r * padded(a.D), k, a.k_strides[2], a.D, n, scores + r * KEYS);
  });
  float rescale[FEW_QUERIES];
  for (int64_t r = 0; r < rows.count; ++r) {
    float* own = scores + r * KEYS;
    if (!apply_mask(a, b, kv * a.G + r / a.M, r % a.M, l0, n, own)) std::fill_n(own, n, -INFINITY);
    rescale[r] = soften_row(own, n, rows.largest[r], rows.sum[r]);
  }
  for_rows(rows.count, [&]<int R>(int64_t r) {
    weigh_all<R>(scores + r * KEYS, v, a.v_strides[2], n, a.DV, rescale + r, rows.y + r * padded(a.DV));
  });
}

template <class T>
void attend_part_as(
    const Attention& a, int64_t head, int64_t l0, int64_t l1, float* part, float* scratch) {
  const int64_t b = head / a.KV, kv = head % a.KV, D = padded(a.D), DV = padded(a.DV);
  FewRows rows{a.G * a.M, scratch, scratch + FEW_QUERIES * D, {}, {}};
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* q = row_of<T>(a, a.q, a.q_strides, b, kv, r);
    for (int64_t d = 0; d < D; ++d)
      rows.q[r * D + d] = d < a.D ? static_cast<float>(q[d]) * a.scale : 0.0f;
    rows.largest[r] = -INFINITY;
  }
  std::fill_n(rows.y, rows.count * DV, 0.0f);
  for (; l0 < l1; l0 += KEYS) {
    const int64_t n = std::min(KEYS, l1 - l0);
    if (any_visible(a, b, kv, l0, n)) attend_keys<T>(a, b, kv, l0, n, rows);
  }
  for (int64_t r = 0; r < rows.count; ++r, part += 2 + a.DV) {
    part[0] = rows.largest[r];
    part[1] = 0.0f;
    for (int i = 0; i < LANES; ++i) part[1] += rows.sum[r][i];
    std::copy_n(rows.y + r * DV, a.DV, part + 2);
  }
}

// y of the rows of a key head from its parts, which are `stride` floats apart.
template <class T>
void join_parts_as(const Attention& a, int64_t head, const float* parts, int64_t count, int64_t stride) {
  for (int64_t r = 0; r < a.G * a.M; ++r, parts += 2 + a.DV) {
    float largest = -INFINITY, sum = 0, y[MAX_HEAD] = {};
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, parts[i * stride]);
    for (int64_t i = 0; i < count; ++i) {
      const float* part = parts + i * stride;
      if (part[0] == -INFINITY && part[1] == 0) continue;  // it saw no key
      const float weight = largest == -INFINITY ? 1.0f : std::exp(part[0] - largest);
      sum += part[1] * weight;
      for (int64_t d = 0; d < a.DV; ++d) y[d] += part[2 + d] * weight;
    }
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum;  // a row that sees no key is zeros
    T* out = row_of<T>(a, a.y, a.y_strides, head / a.KV, head % a.KV, r);
    for (int64_t d = 0; d < a.DV; ++d) out[d] = static_cast<T>(y[d] * inverse);
  }
}

void attend_part(
    const Attention& a, int64_t head, int64_t l0, int64_t l1, float* part, float* scratch) {
  with_dtype(a.dtype, [&]<class T>(T) { attend_part_as<T>(a, head, l0, l1, part, scratch); });
}

void join_parts(const Attention& a, int64_t head, const float* parts, int64_t count, int64_t stride) {
  with_dtype(a.dtype, [&]<class T>(T) { join_parts_as<T>(a, head, parts, count, stride); });
}
