// int8fx::snapshot and int8fx::unchanged: what a list of tensors were at one time, and whether they
// still are that. A compiled graph asks at each call, of each of its weights; int8fx/identity.py says
// what the four numbers are for.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/EmptyTensor.h>

namespace int8fx {

constexpr int64_t STATE_WORDS = 4;

inline void write_state(const at::Tensor& tensor, int64_t* state) {
  const c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  state[0] = reinterpret_cast<int64_t>(impl);
  // Inference tensors count no versions.
  state[1] = tensor.is_inference() ? 0 : impl->version_counter().current_version();
  const bool stored = tensor.has_storage();
  state[2] = stored ? reinterpret_cast<int64_t>(impl->unsafe_storage().unsafeGetStorageImpl()) : 0;
  state[3] = stored ? reinterpret_cast<int64_t>(impl->unsafe_storage().data()) : 0;
}

inline at::Tensor snapshot(at::TensorList tensors) {
  const int64_t count = tensors.size();
  at::Tensor states(at::detail::empty_cpu({count, STATE_WORDS}, at::kLong));
  for (int64_t i = 0; i < count; ++i)
    write_state(tensors[i], states.mutable_data_ptr<int64_t>() + i * STATE_WORDS);
  return states;
}

inline bool unchanged(at::TensorList tensors, const at::Tensor& snapshot) {
  const int64_t count = tensors.size();
  TORCH_CHECK(snapshot.numel() == count * STATE_WORDS, "snapshot is of ",
              snapshot.numel() / STATE_WORDS, " tensors, and these are ", count);
  const int64_t* before = snapshot.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i, before += STATE_WORDS) {
    int64_t now[STATE_WORDS];
    write_state(tensors[i], now);
    for (int64_t word = 0; word < STATE_WORDS; ++word)
      if (now[word] != before[word]) return false;
  }
  return true;
}

}  // namespace int8fx
