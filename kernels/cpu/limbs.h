// Weights in int8 and x as it is, by integer products alone: a row of x becomes an integer for each k,
// and that LIMBS int8 limbs to the base 256, each of them a row of dot.h's.
//
//   x[k] = q[k] · 2^(e - BITS),  q[k] = Σ_d limb_d[k] · 256^d,  -128 <= limb_d < 128
//   y    = Σ_d 256^d · (limb_d @ w_int8ᵀ) · 2^(e - BITS) · w_scale + bias
//
// with 2^e above the row's largest |x|. Nothing is converted from int8, the sums are exact, and a row
// costs what LIMBS rows of LLM.int8() do. An element is off by 2^-BITS of the largest at most, half of
// its last bit: of 22, every bf16 from 2^-14 of the largest on is exact and every fp16 from 2^-11; of
// 30, every fp32 from 2^-6.
//
// Beside a product in fp32 (weight_only.h), which converts every weight: 1.2 to 1.6 times its speed at
// one row of 576 to 2048 channels in the cache (fp32, Zen 4), and within 10 % of it at four rows.
//
// No include guard: included after dot.h and kernel.h by instruction sets whose Activation is unsigned.

static_assert(HasLimbHooks<Isa> && std::is_same_v<Isa::Activation, uint8_t>);

constexpr int BASE_BITS = 8;
constexpr float BASE = 1 << BASE_BITS;
// Limbs are signed: adding 128 to each makes them the bytes of an unsigned sum, which is what the
// product wants.
constexpr uint32_t ZERO_POINTS = 0x80808080;

template <class T>
constexpr int LIMBS = std::is_same_v<T, float> ? 4 : 3;
// One bit less than all limbs hold would do for the sign, and one more for the carries between them.
template <class T>
constexpr int BITS = BASE_BITS * LIMBS<T> - 2;
// Beyond it 128 · 128 · K overflows.
constexpr int64_t MAX_K = (1 << 17) - 1;

// 2^e of the smallest rows: every float is a multiple of 2^-149, so that these are exact, subnormals too.
template <class T>
constexpr int LEAST_EXPONENT = BITS<T> - 149;
// 2^(BITS - e) can be above the largest float: it is applied in two steps, the first at most this large.
constexpr int FIRST_STEP = 100;

// One row; its limbs' quads are `stride` bytes apart. A row that is not finite has no limbs, and NaN
// for its scale.
template <class T>
void pack_limbs(const T* x, int64_t K, int64_t k_padded, uint8_t* out, int64_t stride, float* scale) {
  constexpr int BYTES = 4 * LIMBS<T>;
  const float absmax = largest_magnitude(K, [x](int64_t k, auto count) { return load_row(x + k, count); });
  const bool finite = std::isfinite(absmax);
  int exponent = 0;
  if (finite) std::frexp(absmax, &exponent);  // absmax < 2^exponent
  exponent = std::max(exponent, LEAST_EXPONENT<T>);
  *scale = finite ? std::ldexp(1.0f, exponent - BITS<T>) : NAN;
  const int up = BITS<T> - exponent, first = std::min(up, FIRST_STEP);
  const float factor = std::ldexp(1.0f, first), rest = std::ldexp(1.0f, up - first);
  const auto write = [&](Words bytes, int64_t count) {
    alignas(64) uint8_t quads[4 * LANES];
    store(quads, Isa::limb_quads(bytes));
    for (int64_t i = 0; i < count; i += 4, out += stride) std::memcpy(out, quads + 4 * i, BYTES);
  };
  for_vectors(K, [&](int64_t k, auto count) {
    const Floats v = finite ? load_row(x + k, count) : Floats{};
    write((Words)Isa::to_ints(v * factor * rest) + ZERO_POINTS, count);
  });
  for (int64_t k = (K + 3) / 4 * 4; k < k_padded; k += 4) write(Words{} + ZERO_POINTS, 4);
}

template <class T>
void pack_limbs_as(const Lhs& a, int64_t tile) {
  const int64_t m = tile * a.tiling.rows;
  const int64_t rows = std::min(a.tiling.rows, a.in.M - m);
  constexpr int D = LIMBS<T>;
  auto* packed = static_cast<uint8_t*>(a.packed.x) + m * D * a.tiling.K_padded;
  for (int64_t r = 0; r < rows; ++r)
    pack_limbs(
        static_cast<const T*>(a.in.x_outlier) + (m + r) * a.in.K, a.in.K, a.tiling.K_padded,
        packed + 4 * D * r, 4 * D * rows, a.packed.row_scale + m + r);
}

// A row with an infinity or a NaN, in fp32: its outlier product, of all its columns.
template <class T>
inline Floats product_in_fp32(const T* x, int64_t K, const int8_t* micro_panel, int part) {
  Floats sum{};
  for (int64_t k = 0; k < K; ++k) sum += weight_column(micro_panel, part, k) * static_cast<float>(x[k]);
  return sum;
}

template <class T>
struct LimbRows {
  static constexpr int INT8_ROWS = LIMBS<T>;
  const Lhs& a;
  const int8_t* w;
  int64_t w_stride;

  LimbRows(const Lhs& a, const Weight&, int64_t, const int8_t* w, int64_t w_stride)
      : a(a), w(w), w_stride(w_stride) {}

  template <int B>
  void begin(int64_t, int64_t) {}
  Floats value(const int32_t* acc, int64_t m, int64_t r, int b, int p, Floats w_scale) const {
    return product(acc, m, r, b, p) * w_scale;
  }

 private:
  Floats product(const int32_t* acc, int64_t m, int64_t r, int b, int p) const {
    const float scale = a.packed.row_scale[m + r];
    if (scale != scale) {
      const T* x = static_cast<const T*>(a.in.x_outlier) + (m + r) * a.in.K;
      return product_in_fp32(x, a.in.K, w + b * w_stride, p);
    }
    Floats sum{};
    for (int d = INT8_ROWS; d-- > 0;) {
      const int32_t* limb = acc + ((r * INT8_ROWS + d) * Isa::MICRO_PANELS + b) * NR + p * LANES;
      sum = sum * BASE + __builtin_convertvector(load<Ints>(limb), Floats);
    }
    return sum * scale;
  }
};

template <class T>
constexpr Product IN_LIMBS{
    Isa::MR / LIMBS<T>,
    Isa::MR_ALONE / LIMBS<T>,
    1,
    Isa::MICRO_PANELS,
    LIMBS<T> * sizeof(Isa::Activation),
    pack_limbs_as<T>,
    Isa::enter,
    Isa::leave,
    multiply_rows<LimbRows<T>, T>};
