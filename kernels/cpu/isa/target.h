// How the headers of this folder are compiled for instructions that the machine at hand may lack.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#define INT8FX_X86 1
#include <immintrin.h>
#endif

// Everything between BEGIN and END is compiled for these instructions, whatever the flags say, so
// that one shared object serves every machine.
#define INT8FX_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define INT8FX_BEGIN_TARGET(isa) \
  INT8FX_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define INT8FX_END_TARGET INT8FX_PRAGMA(clang attribute pop)
#else
#define INT8FX_BEGIN_TARGET(isa) INT8FX_PRAGMA(GCC push_options) INT8FX_PRAGMA(GCC target(isa))
#define INT8FX_END_TARGET INT8FX_PRAGMA(GCC pop_options)
#endif

#define INT8FX_AVX2 "avx2,fma,f16c"
#define INT8FX_AVX512 INT8FX_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
