// Which row of the table serves a call.
#pragma once

#include <atomic>
#include <vector>

#include "isa/table.h"

namespace int8fx {

// The kernels that this machine can execute, best first.
inline const std::vector<const Kernel*>& usable_kernels() {
  static const auto usable = [] {
    std::vector<const Kernel*> found;
    for (const Kernel& kernel : KERNELS)
      if (kernel.supported()) found.push_back(&kernel);
    return found;
  }();
  return usable;
}

inline std::atomic<const Kernel*> forced_kernel{nullptr};

inline const Kernel& kernel_for(int64_t M) {
  if (const Kernel* forced = forced_kernel.load(std::memory_order_relaxed)) return *forced;
  for (const Kernel* kernel : usable_kernels())
    if (M >= kernel->min_rows) return *kernel;
  return *usable_kernels().back();
}

}  // namespace int8fx
