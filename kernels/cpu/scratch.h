// Memory for one call.
#pragma once

#include <cstdint>

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

namespace int8fx {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Memory for one call. Small calls, the ones that count microseconds, stay on the stack.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > static_cast<int64_t>(sizeof stack_)) {
      heap_ = at::Tensor(at::detail::empty_cpu({bytes}, at::kByte));
      next_ = static_cast<char*>(heap_.data_ptr());
    }
  }

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes_for<T>(count);
    return taken;
  }

  template <class T>
  static int64_t bytes_for(int64_t count) {
    return round_up(count * sizeof(T), 64);
  }

 private:
  alignas(64) char stack_[16 << 10];
  at::Tensor heap_;
  char* next_ = stack_;
};

}  // namespace int8fx
