// What an instruction set must give. One header of this folder is one instruction set; it defines, in a
// namespace of its own,
//
//   bool supported()         whether this processor executes it: outside of the target pragma, since it
//                            is asked of every processor
//   constexpr int LANES      32-bit elements of a vector, the native width
//   #include "../vectors.h"  Floats, Ints, Words, Halves, Bytes of LANES
//   struct Isa               the hooks below
//   #include "../dot.h"      pack_tile and tile_product of a product that broadcasts a row's values;
//                            or else these two functions themselves, as amx_int8.h has them, and
//                            FETCHES_NEAR: whether tile_product itself fetches the weights to come
//   #include "../kernel.h"   all that is the same for every instruction set
//
// and has a row in table.h. A hook that is missing or of another type is a compile error that names it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#include "../kernel_table.h"
#include "../prefetch.h"

namespace int8fx {

// The elementary operations on vectors.
template <class I>
concept HasVectorHooks = requires(
    const void* p, void* out, const float* floats, const int8_t* bytes, typename I::Floats v,
    typename I::Ints sums, typename I::Words codes,
    const typename I::Floats* vectors) {
  { I::load_words(p) } -> std::same_as<typename I::Words>;         // LANES uint16, as uint32
  { I::load_half(p) } -> std::same_as<typename I::Floats>;         // LANES fp16
  { I::store_half(out, v) } -> std::same_as<void>;                 // round-to-nearest-even
  { I::to_floats(bytes) } -> std::same_as<typename I::Floats>;     // LANES int8
  { I::to_ints(v) } -> std::same_as<typename I::Ints>;             // round-to-nearest-even
  { I::repeat_quad(floats) } -> std::same_as<typename I::Floats>;  // 4 floats, again and again
  { I::add_lanes(vectors) } -> std::same_as<typename I::Floats>;   // of LANES vectors, the sum of each
  { I::fma(v, v, v) } -> std::same_as<typename I::Floats>;         // a · b + c
  { I::fnma(v, v, v) } -> std::same_as<typename I::Floats>;        // c - a · b
  { I::lowest_codes(codes) } -> std::same_as<typename I::Floats>;  // the lowest 4 bits of each lane
  { I::look_up(floats, codes) } -> std::same_as<typename I::Floats>;  // of 16 values
  // Adds the products of 4 codes from 0 to 15 in each lane with 4 int8, the same for every lane.
  { I::dot_codes(sums, codes, bytes) } -> std::same_as<typename I::Ints>;
  // Whether fma and fnma round once. If so, rows are quantised without a division.
  requires std::same_as<decltype(I::FMA_ROUNDS_ONCE), const bool>;
  // Whether look_up is a few instructions, and not one for each lane.
  requires std::same_as<decltype(I::LOOKS_UP_AT_ONCE), const bool>;
};

// The micro-tile of the int8 product, MR rows x MICRO_PANELS micro-panels of NR channels.
template <class I>
concept HasTileHooks = requires(const Lhs& lhs) {
  requires I::MR > 0;             // rows, at most
  requires I::MR_ALONE >= I::MR;  // rows of a tile that no other rows follow, with one micro-panel
  requires I::MR_STEP > 0;        // rows of a tile are a multiple of it
  requires I::MICRO_PANELS == 1 || I::MICRO_PANELS == 2;
  requires I::OUTLIER_ROWS > 0;   // rows that share one read of the outlier columns
  requires I::MIN_ROWS > 0;       // with fewer rows the next row of the table is as fast
  requires sizeof(typename I::Activation) > 0;  // a packed element of x_int8
  { I::enter(lhs) } -> std::same_as<void>;      // in every thread, before its products
  { I::leave() } -> std::same_as<void>;         // and after them
  { I::weight_only(lhs.in) } -> std::same_as<const Product&>;  // the product with x in float
};

template <class I>
concept InstructionSet = HasVectorHooks<I> && HasTileHooks<I>;

// For dot.h: a product of one broadcast row with vectors of channels.
template <class I>
concept HasDotHooks = requires(
    const int8_t* bytes, typename I::Activation* packed, const typename I::Activation* x, int64_t n,
    typename I::Sums& sums, const typename I::Sums* done, const typename I::X& row,
    const typename I::W& columns, int32_t* out) {
  requires I::VECTORS > 0;  // vectors that hold the int32 sums of a micro-panel
  { I::pack_x(bytes, packed) } -> std::same_as<void>;      // KR = 4 consecutive k of a row
  { I::load_x(x) } -> std::same_as<typename I::X>;         // the same, for every channel of a vector
  { I::load_w(bytes, 0) } -> std::same_as<typename I::W>;  // 4 k of the channels of vector 0, 1, ...
  // What sums start from, given the channels' sums of weights and the vector's number.
  { I::first_sums(bytes, 0) } -> std::same_as<typename I::Sums>;
  { I::dot(sums, row, columns) } -> std::same_as<void>;    // adds a product
  { I::store_sums(out, done) } -> std::same_as<void>;      // of a micro-panel, in the order of channels
  // Packs rows (x, their length K, their number, out) from their beginning; returns up to which k. An
  // instruction set without a faster way than pack_x returns 0.
  { I::pack_groups(bytes, n, n, packed) } -> std::same_as<int64_t>;
};

// For limbs.h: x in float as int8 limbs, for an unsigned Activation.
template <class I>
concept HasLimbHooks = HasDotHooks<I> && requires(typename I::Words words) {
  // Of LANES integers, 4 by 4: the lowest bytes of the four, the next higher ones, ...
  { I::limb_quads(words) } -> std::same_as<typename I::Words>;
};

// For weight_only.h: a product with x in float, in a namespace with a struct FloatIsa.
template <class I, class Floats>
concept HasFloatProductHooks = requires(
    const int8_t* bytes, const typename I::Element* x, typename I::Element* out,
    typename I::W* columns, const typename I::W* columns_to_store, Floats& sums, typename I::X row,
    typename I::W w) {
  requires I::MR > 0;  // rows, at most
  { I::load_x(x) } -> std::same_as<typename I::X>;  // 4 consecutive k of a row, again and again
  // Some vectors of channels x 4 k: from a packed weight, or from what store_w wrote.
  { I::load_w(columns, bytes) } -> std::same_as<void>;
  { I::load_w(columns, x) } -> std::same_as<void>;
  { I::store_w(out, columns_to_store) } -> std::same_as<void>;
  { I::channel_of(0) } -> std::same_as<int>;  // of a lane of these vectors
  { I::dot(sums, row, w) } -> std::same_as<void>;
};

}  // namespace int8fx
