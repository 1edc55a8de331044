// Rows of a weight whose codes name values of a codebook. Part of kernel.h.

template <int... I>
inline Words shifts_of(std::integer_sequence<int, I...>) { return Words{4u * (I % 8)...}; }
template <int... I>
inline Words upper_of(std::integer_sequence<int, I...>) { return Words{(I >= 8 ? ~0u : 0u)...}; }

// Codes k, k + 1, ... of a row, from a byte on: two in a byte, the even one in its low half.
inline Words load_codes(const uint8_t* p) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  uint32_t halves[2] = {};
  std::memcpy(halves, p, LANES / 2);
  const Words upper = upper_of(lanes);
  const Words words = ((Words{} + halves[0]) & ~upper) | ((Words{} + halves[1]) & upper);
  return (words >> shifts_of(lanes)) & 15;
}

// w[n, k] = values[code[n, k]] * absmax[n, k / block] for k of one block.
template <class T>
inline void decode_block(const Codebook& c, const uint8_t* row, float absmax, int64_t k, int64_t end, T* w) {
  const Floats scale = Floats{} + absmax;
  if (Isa::LOOKS_UP_AT_ONCE && k % 2 == 0)
    for (; k + LANES <= end; k += LANES)
      store_as(w + k, Isa::look_up(c.values, load_codes(row + k / 2)) * scale);
  if (k == end) return;
  T scaled[16];
  for (int i = 0; i < 16; ++i) scaled[i] = static_cast<T>(c.values[i] * absmax);
  for (; k < end; ++k) w[k] = scaled[(row[k / 2] >> (k % 2 * 4)) & 15];
}

template <class T>
inline void decode_rows_as(const Codebook& c, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; ++n)
    for (int64_t g = 0; g < c.groups; ++g)
      decode_block(
          c, c.packed + n * c.row_bytes, c.absmax[n * c.groups + g], g * c.block,
          std::min((g + 1) * c.block, c.K), static_cast<T*>(c.out) + n * c.K);
}

inline void decode_rows(const Codebook& c, int64_t n0, int64_t n1) {
  with_dtype(c.dtype, [&]<class T>(T) { decode_rows_as<T>(c, n0, n1); });
}
