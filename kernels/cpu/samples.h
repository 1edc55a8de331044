// Samples of a tensor's content: lines of 128 bytes, spread over it, and hashes of them.
//
// A call of a compiled graph compares one set of 8 lines of each weight, and the next call another one.
// A line costs a miss of the TLB and one of the cache, in which its second half comes along, and the
// misses of all lines overlap: no address depends on what was read before. 8 lines are 256 elements in
// fp32 and 512 in bf16. Where an update moves one in a hundred bf16 elements (the others round to what
// they were), a set misses it with a probability of 0.99^512 = 0.6 %, and all sets with one of 10^-36.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

namespace int8fx {

constexpr int64_t LINE = 128;  // bytes: two lines of the cache
constexpr int64_t LINES = 8;   // of a set
constexpr int64_t SETS = 16;
constexpr int64_t WHOLE = 33;  // up to as many lines (4 KiB at any address) a tensor is compared whole

constexpr uint64_t mixed(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Where the lines of each set lie, as fractions of a tensor in units of 2^-64. The first and the last
// are its ends. The others are random within strata, so that all sets together cover it evenly.
constexpr auto FRACTIONS = [] {
  std::array<std::array<uint64_t, LINES>, SETS> fractions{};
  for (uint64_t set = 0; set < SETS; ++set)
    for (uint64_t line = 0; line < LINES; ++line) {
      const uint64_t stratum = line * SETS + (7 * set + 5 * line) % SETS;
      fractions[set][line] = (stratum << 57) | (mixed(set * LINES + line + 1) >> 7);
    }
  for (auto& set : fractions) {
    set.front() = 0;
    set.back() = ~uint64_t{0};
  }
  return fractions;
}();
static_assert(LINES * SETS == 128, "a stratum is the first seven bits of a fraction");

constexpr auto SECRETS = [] {
  std::array<uint64_t, LINE / 8> secrets{};
  for (uint64_t word = 0; word < secrets.size(); ++word) secrets[word] = mixed(word + 257);
  return secrets;
}();

// As in wyhash: every bit of either factor changes bits all over it.
inline uint64_t folded_product(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// A tensor's memory: runs of bytes without a gap, at multiples of strides.
struct Runs {
  const char* data = nullptr;
  int64_t bytes = 0;  // of a run
  int64_t count = 1;
  c10::SmallVector<std::pair<int64_t, int64_t>, 4> dims;  // of the runs: size, stride in bytes

  int64_t width() const { return std::min(bytes, LINE); }
  // Lines of a run that begins at any address.
  int64_t lines_of_run() const { return bytes <= LINE ? 1 : (bytes + 2 * (LINE - 1)) / LINE; }
  int64_t lines() const { return count * lines_of_run(); }
  bool whole() const { return lines() <= WHOLE; }
  int64_t sets() const { return whole() ? 1 : SETS; }

  // Lines but the first and the last of a run begin at a multiple of their length.
  const char* line(int64_t index) const {
    int64_t run = index / lines_of_run();
    const int64_t within = index % lines_of_run();
    const char* start = data;
    for (const auto& [size, stride] : dims) {
      start += run % size * stride;
      run /= size;
    }
    if (within == 0) return start;
    const int64_t misaligned = reinterpret_cast<uintptr_t>(start) % LINE;
    return start + std::min(within * LINE - misaligned, bytes - LINE);
  }
};

// Whether a tensor's sizes, strides and storage may be asked for: not of subclasses with a
// __torch_dispatch__ (fake tensors, DTensors), and nested tensors.
inline bool is_plain(const at::Tensor& tensor) {
  const c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  return impl->has_storage() && !impl->is_python_dispatch() && !tensor.is_nested() &&
         !impl->has_symbolic_sizes_strides();
}

// The memory of a tensor that may be read; data is null where none may: on a device other than a CPU
// (its content would have to be waited for), without elements, or with less storage than it says.
inline Runs runs_of(const at::Tensor& tensor) {
  Runs runs;
  if (!is_plain(tensor) || !tensor.is_cpu() || tensor.numel() == 0) return runs;
  const c10::Storage& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
  const int64_t item = tensor.element_size(), start = tensor.storage_offset();
  int64_t last = start;
  c10::SmallVector<std::pair<int64_t, int64_t>, 4> dims;  // stride, size
  for (size_t dim = 0; dim < tensor.sizes().size(); ++dim) {
    const int64_t size = tensor.sizes()[dim], stride = tensor.strides()[dim];
    last += (size - 1) * stride;
    if (size > 1 && stride > 0) dims.emplace_back(stride, size);
  }
  if (!storage.data() || (last + 1) * item > static_cast<int64_t>(storage.nbytes())) return runs;
  runs.data = static_cast<const char*>(storage.data()) + start * item;
  runs.bytes = item;
  std::sort(dims.begin(), dims.end());
  for (const auto& [stride, size] : dims) {
    if (runs.dims.empty() && stride * item == runs.bytes) {
      runs.bytes *= size;
    } else {
      runs.dims.emplace_back(size, stride * item);
      runs.count *= size;
    }
  }
  return runs;
}

// The lines of one set, which is the only one of a tensor that is compared whole. With a dimension that
// is not contiguous a line may be a single element.
inline c10::SmallVector<const char*, WHOLE> lines_of_set(const Runs& runs, int64_t set) {
  c10::SmallVector<const char*, WHOLE> lines;
  const auto all = static_cast<unsigned __int128>(runs.lines());
  if (runs.whole())
    for (int64_t line = 0; line < runs.lines(); ++line) lines.push_back(runs.line(line));
  else
    for (const uint64_t fraction : FRACTIONS[set])
      lines.push_back(runs.line(static_cast<int64_t>(all * fraction >> 64)));
  return lines;
}

inline uint64_t hash_of_line(const char* line, int64_t width) {
  uint64_t words[LINE / 8] = {}, sum = 0;
  std::memcpy(words, line, width);
  for (int64_t word = 0; word < LINE / 8; word += 2)
    sum += folded_product(words[word] ^ SECRETS[word], words[word + 1] ^ SECRETS[word + 1]);
  return sum;
}

inline uint64_t hash_of(const char* const* lines, int64_t count, int64_t width) {
  uint64_t hash = 0;
  for (int64_t line = 0; line < count; ++line) {
    // A width that the compiler knows is eight loads.
    const uint64_t sum =
        width == LINE ? hash_of_line(lines[line], LINE) : hash_of_line(lines[line], width);
    hash = folded_product(hash ^ SECRETS[0], sum ^ SECRETS[1]);
  }
  return hash;
}

inline void fetch(const char* const* lines, int64_t count, int64_t width) {
  for (int64_t line = 0; line < count; ++line) {
    __builtin_prefetch(lines[line]);
    __builtin_prefetch(lines[line] + width - 1);
  }
}

}  // namespace int8fx
