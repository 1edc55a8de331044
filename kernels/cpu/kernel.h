// What is the same for every instruction set, and so compiled once for each. No include guard: included
// in a namespace and under a target pragma of its own, after what isa/hooks.h lists.

static_assert(InstructionSet<Isa>, "isa/hooks.h lists what an instruction set must give");
static_assert(
    std::is_same_v<decltype(&pack_tile), decltype(Product::pack)>,
    "pack_tile writes one tile of x_int8 in the order that tile_product reads");
static_assert(
    std::is_same_v<
        decltype(&tile_product<1>),
        void (*)(
            const Lhs&, int64_t m, int64_t rows, const int8_t* w, int64_t w_stride, int32_t* acc,
            Prefetch ahead)>,
    "tile_product<B> multiplies a tile of rows with B micro-panels: exact int32 [rows][MICRO_PANELS * NR]");

#include "with_dtype.h"
#include "quantize.h"
#include "tile.h"
#include "grouped.h"
#include "codebook.h"
#include "attention.h"
#include "few_queries.h"
#include "in_fp32.h"

constexpr Product INT8{
    Isa::MR,
    Isa::MR_ALONE,
    Isa::MR_STEP,
    Isa::MICRO_PANELS,
    sizeof(Isa::Activation),
    pack_tile,
    Isa::enter,
    Isa::leave,
    multiply};
