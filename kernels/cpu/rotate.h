// Rotate and quantise rows, as kernels/ops/rotation.py and rotated_linear.py state it. Part of kernel.h.
//
// A block is held in vectors. Butterflies of a stride below LANES exchange lanes of one vector, the
// others add and subtract two vectors. The order of strides is that of the reference, so all
// instruction sets have its bits.

template <int STRIDE, int... I>
inline Floats exchanged(Floats v, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (I ^ STRIDE)...);
#else
  return __builtin_shuffle(v, Ints{(I ^ STRIDE)...});
#endif
}

template <int STRIDE, int... I>
inline Floats lane_signs(std::integer_sequence<int, I...>) {
  return Floats{(I & STRIDE ? -1.0f : 1.0f)...};
}

// Lane i becomes v[i] + v[i ^ STRIDE], or where i has the bit v[i ^ STRIDE] - v[i]; the product is exact.
template <int STRIDE>
inline Floats in_lanes(Floats v) {
  constexpr auto LANE = std::make_integer_sequence<int, LANES>();
  return v * lane_signs<STRIDE>(LANE) + exchanged<STRIDE>(v, LANE);
}

template <int STRIDE = 1>
inline Floats all_in_lanes(Floats v) {
  if constexpr (STRIDE == LANES) {
    return v;
  } else {
    return all_in_lanes<STRIDE * 2>(in_lanes<STRIDE>(v));
  }
}

// One block, from elements x; returns the largest magnitudes so far, as bits (quantize.h).
template <int SIZE, bool MASKED, class T>
inline Words rotate_block(
    const T* x, const float* signs, const int32_t* mask, float* out, Words largest) {
  constexpr int COUNT = SIZE / LANES;
  Floats v[COUNT];
#pragma GCC unroll 64
  for (int i = 0; i < COUNT; ++i) {
    v[i] = load_row(x + i * LANES) * load<Floats>(signs + i * LANES);
    if constexpr (MASKED) v[i] = (Floats)((Ints)v[i] & load<Ints>(mask + i * LANES));
    v[i] = all_in_lanes(v[i]);
  }
#pragma GCC unroll 8
  for (int step = 1; step < COUNT; step *= 2) {
#pragma GCC unroll 64
    for (int i = 0; i < COUNT; ++i) {
      if (i & step) continue;
      const Floats low = v[i], high = v[i + step];
      v[i] = low + high;
      v[i + step] = low - high;
    }
  }
#pragma GCC unroll 64
  for (int i = 0; i < COUNT; ++i) {
    store(out + i * LANES, v[i]);
    const Words bits = magnitude(v[i]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// The columns that stay in 16-bit count as 0, as does what pads the last block.
template <int SIZE, class T>
inline Words rotate_row(const FloatRows& in, const T* x, float* out) {
  const Rotation& rotation = *in.rotation;
  Words largest{};
  const auto rotated = [&](const T* block, int64_t k) {
    const int32_t* const mask = rotation.masks[k / SIZE];
    return mask ? rotate_block<SIZE, true>(block, rotation.signs, mask, out + k, largest)
                : rotate_block<SIZE, false>(block, rotation.signs, mask, out + k, largest);
  };
  int64_t k = 0;
  for (; k + SIZE <= in.K; k += SIZE) largest = rotated(x + k, k);
  if (k < in.K) {
    T block[SIZE] = {};
    std::memcpy(static_cast<void*>(block), x + k, (in.K - k) * sizeof(T));
    largest = rotated(block, k);
  }
  return largest;
}

template <int SIZE, class T>
void rotate_and_quantize(const FloatRows& in, int64_t m0, int64_t m1) {
  const Rotation& rotation = *in.rotation;
  // A row at a time, in the L1 cache or the L2 cache.
  alignas(64) float stack[4096];
  std::unique_ptr<float[], Free> heap;
  if (rotation.K > static_cast<int64_t>(std::size(stack)))
    heap.reset(static_cast<float*>(std::aligned_alloc(64, rotation.K * sizeof(float))));
  float* const row = heap ? heap.get() : stack;
  for (int64_t m = m0; m < m1; ++m) {
    const T* x = static_cast<const T*>(in.x) + m * in.K;
    float* x_columns = rotation.x_columns + m * rotation.column_count;
    for (int64_t i = 0; i < rotation.column_count; ++i) x_columns[i] = x[rotation.columns[i]];
    const float absmax = largest_of(rotate_row<SIZE>(in, x, row));
    in.x_scale[m] = write_int8(in.x_int8 + m * rotation.K, rotation.K, absmax, [&](int64_t k, auto count) {
      return load_row(row + k, count);
    });
  }
}

void rotate_rows(const FloatRows& in, int64_t m0, int64_t m1) {
  with_dtype(in.dtype, [&]<class T>(T) {
    switch (in.rotation->block) {
      case 16: return rotate_and_quantize<16, T>(in, m0, m1);
      case 32: return rotate_and_quantize<32, T>(in, m0, m1);
      case 64: return rotate_and_quantize<64, T>(in, m0, m1);
      case 128: return rotate_and_quantize<128, T>(in, m0, m1);
      default: return rotate_and_quantize<256, T>(in, m0, m1);
    }
  });
}
