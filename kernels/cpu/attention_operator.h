// int8fx::attention on a CPU (kernels/ops/attention.py).
#pragma once

#include "kernel_choice.h"
#include "operands.h"
#include "outliers.h"
#include "queue.h"

namespace int8fx {

inline void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  check_activation(q);
  const auto dtype = q.scalar_type();
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be [B, H, M, D]");
  TORCH_CHECK(k.scalar_type() == dtype && v.scalar_type() == dtype, "q, k and v must be of one dtype");
  TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(3) == q.size(3) &&
                  v.size(1) == k.size(1) && v.size(2) == k.size(2) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0,
              "q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit");
  TORCH_CHECK(q.size(3) <= MAX_HEAD && v.size(3) <= MAX_HEAD, "a head must be no wider than ", MAX_HEAD);
}

inline at::Tensor contiguous_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

inline void copy_strides(const at::Tensor& tensor, int64_t* strides) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

// Runs item(i, scratch memory of the thread).
template <class F>
inline void run_items(int64_t items, bool worth_threads, const F& item) {
  const bool alone = !worth_threads || at::in_parallel_region();
  const int64_t threads = alone ? 1 : std::min<int64_t>(items, at::get_num_threads());
  const at::Tensor scratch(at::detail::empty_cpu({threads, ATTENTION_SCRATCH}, at::kFloat));
  Queue queue(items, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      float* own = scratch.data_ptr<float>() + thread * ATTENTION_SCRATCH;
      queue.drain(thread, [&](int64_t i) { item(i, own); });
    }
  });
}

inline void attend_many(const Kernel& kernel, const Attention& a) {
  const int64_t items = a.B * a.KV * at::divup(a.G * a.M, ITEM_TILES * kernel.queries);
  run_items(items, true, [&](int64_t item, float* scratch) { kernel.attend(a, item, scratch); });
}

// The keys of a head are one part, or several where there are too few heads for all threads.
inline void attend_few(const Kernel& kernel, const Attention& a, int64_t key_bytes) {
  constexpr int64_t PARTS_PER_THREAD = 4, MIN_KEYS = 2 * KEYS;
  const int64_t heads = a.B * a.KV;
  const int64_t wanted = at::divup(PARTS_PER_THREAD * at::get_num_threads(), heads);
  const int64_t keys = std::max(MIN_KEYS, round_up(at::divup(a.L, wanted), KEYS));
  const int64_t parts = std::max<int64_t>(at::divup(a.L, keys), 1);
  const int64_t stride = a.G * a.M * (2 + a.DV);
  const at::Tensor memory(at::detail::empty_cpu({heads * parts, stride}, at::kFloat));
  float* const all = memory.data_ptr<float>();
  run_items(heads * parts, key_bytes > FORK_BYTES, [&](int64_t item, float* scratch) {
    const int64_t head = item / parts, l0 = item % parts * keys;
    float* const part = all + item * stride;
    kernel.attend_part(a, head, l0, std::min(l0 + keys, a.L), part, scratch);
    if (parts == 1) kernel.join_parts(a, head, part, 1, stride);
  });
  for (int64_t head = 0; parts > 1 && head < heads; ++head)
    kernel.join_parts(a, head, all + head * parts * stride, parts, stride);
}

inline at::Tensor attention(
    const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any,
    const std::optional<at::Tensor>& mask_any, bool causal, double scale) {
  check_attention(q_any, k_any, v_any);
  const auto q = contiguous_rows(q_any), k = contiguous_rows(k_any), v = contiguous_rows(v_any);
  Attention a{};
  a.B = q.size(0), a.KV = k.size(1), a.G = q.size(1) / a.KV;
  a.M = q.size(2), a.L = k.size(2), a.D = q.size(3), a.DV = v.size(3);
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.dtype = q.scalar_type(), a.causal = causal, a.scale = static_cast<float>(scale);
  at::Tensor mask;
  if (mask_any) {
    const auto dtype = mask_any->scalar_type();
    TORCH_CHECK(dtype == at::kBool || dtype == at::kFloat || dtype == a.dtype,
                "mask must be bool, float32 or of q's dtype, and is ", dtype);
    mask = contiguous_rows(*mask_any).expand({a.B, q.size(1), a.M, a.L});
    mask = contiguous_rows(mask);
    a.mask = mask.const_data_ptr(), a.mask_dtype = dtype;
    copy_strides(mask, a.mask_strides);
  }
  // Rows of all heads side by side, as the linear after it reads them.
  at::Tensor y = at::Tensor(at::detail::empty_cpu({a.B, a.M, q.size(1), a.DV}, a.dtype)).transpose(1, 2);
  a.y = y.data_ptr();
  copy_strides(q, a.q_strides), copy_strides(k, a.k_strides), copy_strides(v, a.v_strides);
  copy_strides(y, a.y_strides);
  if (y.numel() == 0) return y;

  const Kernel& kernel = kernel_for(a.M);
  if (a.G * a.M <= FEW_QUERIES) {
    attend_few(kernel, a, k.nbytes() + v.nbytes());
  } else {
    attend_many(kernel, a);
  }
  return y;
}

}  // namespace int8fx
