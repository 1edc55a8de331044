// The instruction sets, best first. A new one is a header beside this one (hooks.h) and a row here.
#pragma once

#include "amx_int8.h"
#include "avx2.h"
#include "avx512_vnni.h"
#include "avx_vnni.h"
#include "portable.h"

namespace int8fx {

#define INT8FX_KERNEL(isa)                                                                       \
  Kernel {                                                                                      \
    #isa, isa::supported, isa::Isa::MIN_ROWS, isa::flag_columns, isa::quantize_rows, isa::INT8,  \
        isa::Isa::weight_only, isa::GROUPED, isa::decode_rows, isa::QUERIES, isa::attend,        \
        isa::attend_part, isa::join_parts                                                       \
  }

inline constexpr Kernel KERNELS[] = {
#ifdef INT8FX_X86
    INT8FX_KERNEL(amx_int8),
    INT8FX_KERNEL(avx512_vnni),
    INT8FX_KERNEL(avx_vnni),
    INT8FX_KERNEL(avx2),
#endif
    INT8FX_KERNEL(portable),
};

#undef INT8FX_KERNEL

}  // namespace int8fx
