"""What this machine can do at most: int8 products from registers, and bytes read from memory.

    python benchmarks/peaks.py

Compiled for this processor, all threads at once: as many independent sums as hide the latency of its
int8 instruction (AMX, VNNI with AVX512 or AVX), and a sequential read of 256 MiB on huge pages. Medians
of nine runs: the ceilings of the roofline that ``linear.py`` draws.
"""

import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from int8fx.kernels.cpu.build import find_compiler

SOURCE = r"""
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cstdint>
#include <cstring>

constexpr int64_t STEPS = 200000;

#if defined(__AMX_INT8__)
static bool ready() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
static int64_t products() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int t = 0; t < 8; ++t) c.bytes[t] = 64, c.rows[t] = 16;
  asm volatile("ldtilecfg %0" ::"m"(c));
  for (int64_t i = 0; i < STEPS; ++i) {
    _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return 4 * STEPS * 16 * 16 * 64;
}
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#if defined(__AVX512VNNI__)
typedef __m512i V;
#define DOT(s, x, w) _mm512_dpbusd_epi32(s, x, w)
constexpr int SUMS = 24;
#else
typedef __m256i V;
#define DOT(s, x, w) _mm256_dpbusd_avx_epi32(s, x, w)
constexpr int SUMS = 12;
#endif
static bool ready() { return true; }
static int64_t products() {
  V sums[SUMS] = {}, x, w;
  memset(&x, 1, sizeof x), memset(&w, 1, sizeof w);
  for (int64_t i = 0; i < STEPS; ++i) {
#pragma GCC unroll 24
    for (int s = 0; s < SUMS; ++s) { sums[s] = DOT(sums[s], x, w); asm volatile("" : "+v"(sums[s])); }
  }
  return SUMS * STEPS * (int64_t)sizeof(V);
}
#else
static bool ready() { return false; }
static int64_t products() { return 0; }
#endif

extern "C" double int8_operations_per_second(int threads) {
  if (!ready()) return 0;
  int64_t all = 0;
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : all)
  all += products();
  return 2.0 * all / (omp_get_wtime() - start);
}

extern "C" double bytes_per_second(int threads) {
  constexpr int64_t BYTES = 256 << 20;
  static char* memory = nullptr;
  if (!memory) {
    memory = (char*)mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(memory, BYTES, MADV_HUGEPAGE);
    memset(memory, 1, BYTES);
  }
  int64_t all = 0;
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : all)
  {
    const int64_t part = BYTES / omp_get_num_threads();
    const auto* words = (const int64_t*)(memory + part * omp_get_thread_num());
    for (int64_t i = 0; i < part / 8; ++i) all += words[i];
  }
  const double seconds = omp_get_wtime() - start;
  return all ? BYTES / seconds : 0;
}
"""


@dataclass(frozen=True)
class Peaks:
    """Per second, of ``threads`` threads; int8 is None without an instruction for it."""

    threads: int
    int8_operations: float | None
    bytes_read: float

    def __str__(self) -> str:
        int8 = "no int8 dot product"
        if self.int8_operations is not None:
            int8 = f"{self.int8_operations / 1e9:,.0f} GOP/s in int8"
        return f"at most: {int8}, {self.bytes_read / 1e9:.1f} GB/s from memory"


class Gauges:
    """Both ceilings, each call one run of it."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        with tempfile.TemporaryDirectory() as directory:
            source, library = Path(directory) / "peaks.cpp", Path(directory) / "peaks.so"
            source.write_text(SOURCE)
            flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
            subprocess.run([*find_compiler(), *flags, str(source), "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))
        for function in (self._library.int8_operations_per_second, self._library.bytes_per_second):
            function.restype = ctypes.c_double

    def int8_operations(self) -> float:
        """Per second; 0 without an instruction for them."""
        return self._library.int8_operations_per_second(self.threads)

    def bytes_read(self) -> float:
        """Per second."""
        return self._library.bytes_per_second(self.threads)


def measure(threads: int) -> Peaks:
    gauges = Gauges(threads)

    def median(run: Callable[[], float]) -> float:
        run()
        return statistics.median(run() for _ in range(9))

    return Peaks(threads, median(gauges.int8_operations) or None, median(gauges.bytes_read))


if __name__ == "__main__":
    print(measure(torch.get_num_threads()))
