// Weights in int8 and x as it is, by integer products alone: a row of x becomes an integer for each k,
// and that DIGITS int8 digits to the base 256, each of them a row of dot.h's.
//
//   x[k] = q[k] · 2^(e - BITS),  q[k] = Σ_d digit_d[k] · 256^d,  -128 <= digit_d < 128
//   y    = Σ_d 256^d · (digit_d @ w_int8ᵀ) · 2^(e - BITS) · w_scale + bias
//
// with 2^e above the row's largest |x|. Nothing is converted from int8, the sums are exact, and a row
// costs what DIGITS rows of LLM.int8() do. An element is off by 2^-BITS of the largest at most, half of
// its last bit: of 22, every bf16 from 2^-14 of the largest on is exact and every fp16 from 2^-11; of
// 30, every fp32 from 2^-6.
//
// Beside a product in fp32 (weight_only.h), which converts every weight: 1.2 to 1.6 times its speed at
// one row of 576 to 2048 channels in the cache (fp32, Zen 4), and within 10 % of it at four rows.
//
// No include guard: included after dot.h and kernel.h by instruction sets whose Activation is unsigned.

static_assert(HasDigitHooks<Isa> && std::is_same_v<Isa::Activation, uint8_t>);

constexpr int BASE_BITS = 8;
constexpr float BASE = 1 << BASE_BITS;
// Digits are signed: adding 128 to each makes them the bytes of an unsigned sum, which is what the
// product wants.
constexpr uint32_t ZERO_POINTS = 0x80808080;

template <class T>
constexpr int DIGITS = std::is_same_v<T, float> ? 4 : 3;
// One bit less than all digits hold would do for the sign, and one more for the carries between them.
template <class T>
constexpr int BITS = BASE_BITS * DIGITS<T> - 2;
// Beyond it 128 · 128 · K overflows.
constexpr int64_t MAX_K = (1 << 17) - 1;

// 2^e of the smallest rows: every float is a multiple of 2^-149, so that these are exact, subnormals too.
template <class T>
constexpr int LEAST_EXPONENT = BITS<T> - 149;
// 2^(BITS - e) can be above the largest float: it is applied in two steps, the first at most this large.
constexpr int FIRST_STEP = 100;

// One row; its digits' quads are `stride` bytes apart. A row that is not finite has no digits, and NaN
// for its scale.
template <class T>
void pack_digits(const T* x, int64_t K, int64_t k_padded, uint8_t* out, int64_t stride, float* scale) {
  constexpr int BYTES = 4 * DIGITS<T>;
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
    store(quads, Isa::digit_quads(bytes));
    for (int64_t i = 0; i < count; i += 4, out += stride) std::memcpy(out, quads + 4 * i, BYTES);
  };
  for_vectors(K, [&](int64_t k, auto count) {
    const Floats v = finite ? load_row(x + k, count) : Floats{};
    write((Words)Isa::to_ints(v * factor * rest) + ZERO_POINTS, count);
  });
  for (int64_t k = (K + 3) / 4 * 4; k < k_padded; k += 4) write(Words{} + ZERO_POINTS, 4);
}

template <class T>
void pack_digits_as(const Activations& a, int64_t tile) {
  const int64_t m = tile * a.row_tile;
  const int64_t rows = std::min(a.row_tile, a.M - m);
  constexpr int D = DIGITS<T>;
  auto* packed = static_cast<uint8_t*>(a.packed) + m * D * a.K_padded;
  for (int64_t r = 0; r < rows; ++r)
    pack_digits(
        static_cast<const T*>(a.x_outlier) + (m + r) * a.K, a.K, a.K_padded, packed + 4 * D * r,
        4 * D * rows, a.row_scale + m + r);
}

// A row with an infinity or a NaN, in fp32: its outlier product, of all its columns.
template <class T>
inline Floats product_in_fp32(const T* x, int64_t K, const int8_t* block, int part) {
  Floats sum{};
  for (int64_t k = 0; k < K; ++k) sum += weight_column(block, part, k) * static_cast<float>(x[k]);
  return sum;
}

template <class T>
struct DigitRows {
  static constexpr int INT8_ROWS = DIGITS<T>;
  const Activations& a;
  const int8_t* w;
  int64_t w_stride;

  template <int B>
  void begin(int64_t, int64_t) {}
  Floats product(const int32_t* acc, int64_t m, int64_t r, int b, int p) const {
    const float scale = a.row_scale[m + r];
    if (scale != scale) {
      const T* x = static_cast<const T*>(a.x_outlier) + (m + r) * a.K;
      return product_in_fp32(x, a.K, w + b * w_stride, p);
    }
    Floats sum{};
    for (int d = INT8_ROWS; d-- > 0;) {
      const int32_t* digit = acc + ((r * INT8_ROWS + d) * Isa::PANEL + b) * BLOCK_N + p * LANES;
      sum = sum * BASE + __builtin_convertvector(load<Ints>(digit), Floats);
    }
    return sum * scale;
  }
};

template <class T>
constexpr Product IN_DIGITS{
    Isa::ROW_TILE / DIGITS<T>,
    Isa::ONE_TILE / DIGITS<T>,
    1,
    Isa::PANEL,
    DIGITS<T> * sizeof(Isa::Activation),
    pack_digits_as<T>,
    Isa::enter,
    Isa::leave,
    multiply_rows<DigitRows<T>, T>};
