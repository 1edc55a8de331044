// int8fx::snapshot and int8fx::unchanged: what a list of tensors were at one time, and whether they
// still are that. A compiled graph asks at each call, of each of its weights;
// int8fx/weights/identity.py says what is compared.
//
// A snapshot is an int64 tensor: of each tensor
//   how many words of state, how many hashes | state | hashes of its sets of samples
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include "samples.h"

namespace int8fx {

using Words = c10::SmallVector<int64_t, 16>;

inline Words state_of(const at::Tensor& tensor) {
  const c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  Words state{reinterpret_cast<int64_t>(impl)};
  // Inference tensors count no versions.
  state.push_back(tensor.is_inference() ? 0 : impl->version_counter().current_version());
  if (!is_plain(tensor)) return state;
  const c10::Storage& storage = impl->unsafe_storage();
  state.push_back(reinterpret_cast<int64_t>(storage.unsafeGetStorageImpl()));
  state.push_back(reinterpret_cast<int64_t>(storage.data()));
  state.push_back(storage.nbytes());
  state.push_back(tensor.storage_offset());
  state.push_back(4 * static_cast<int64_t>(tensor.scalar_type()) + 2 * tensor.is_neg() +
                  tensor.is_conj());
  state.append(tensor.sizes().begin(), tensor.sizes().end());
  state.append(tensor.strides().begin(), tensor.strides().end());
  return state;
}

struct Record {
  const int64_t* words;
  static constexpr int64_t HEADER = 2;

  int64_t state_words() const { return words[0]; }
  int64_t hashes() const { return words[1]; }
  const int64_t* state() const { return words + HEADER; }
  uint64_t hash(int64_t set) const { return state()[state_words() + set]; }
  Record next() const { return {state() + state_words() + hashes()}; }

  bool is_of(const at::Tensor& tensor) const {
    const Words now = state_of(tensor);
    return static_cast<int64_t>(now.size()) == state_words() &&
           std::equal(now.begin(), now.end(), state());
  }
};

inline at::Tensor snapshot(at::TensorList tensors) {
  c10::SmallVector<int64_t, 64> words;
  Samples samples;
  for (const at::Tensor& tensor : tensors) {
    const Words state = state_of(tensor);
    const Runs runs = runs_of(tensor);
    const int64_t hashes = runs.data ? runs.sets() : 0;
    words.append({static_cast<int64_t>(state.size()), hashes});
    words.append(state.begin(), state.end());
    if (!hashes) continue;
    samples.locate(runs, 0, SETS);
    for (int64_t set = 0; set < hashes; ++set) words.push_back(samples.hash(set));
  }
  at::Tensor states(at::detail::empty_cpu({static_cast<int64_t>(words.size())}, at::kLong));
  std::copy(words.begin(), words.end(), states.mutable_data_ptr<int64_t>());
  return states;
}

// A gradient says that a weight is being trained, which costs more than to compare all samples.
inline bool is_trained(const at::Tensor& tensor) {
  return tensor.requires_grad() && tensor.is_leaf() && tensor.grad().defined();
}

// How many tensors' lines are on their way while those of one are hashed: a line takes longer to come, by
// a miss of the TLB in a virtual machine, than a tensor's take to be hashed.
constexpr int64_t AHEAD = 8;

// Whether the contents are those of the snapshot, whose tensors these are.
inline bool same_contents(at::TensorList tensors, Record record, int64_t first, int64_t sets) {
  std::array<Samples, AHEAD + 1> ring;
  const int64_t count = tensors.size();
  Record coming = record;
  int64_t located = 0;
  for (int64_t i = 0; i < count; ++i, record = record.next()) {
    for (; located < std::min(i + AHEAD + 1, count); ++located, coming = coming.next()) {
      if (!coming.hashes()) continue;
      const at::Tensor& tensor = tensors[located];
      Samples& samples = ring[located % ring.size()];
      samples.locate(runs_of(tensor), first, is_trained(tensor) ? SETS : sets);
      samples.fetch();
    }
    const Samples& samples = ring[i % ring.size()];
    for (int64_t set = 0; record.hashes() && set < samples.sets(); ++set)
      if (samples.hash(set) != record.hash(samples.number(set))) return false;
  }
  return true;
}

// `sets` sets of samples are compared from number `first` on; with 0 only the states are.
inline bool unchanged(
    at::TensorList tensors, const at::Tensor& snapshot, int64_t first, int64_t sets) {
  TORCH_CHECK(first >= 0 && sets >= 0, "sets of samples: from ", first, ", ", sets);
  const int64_t* const end = snapshot.const_data_ptr<int64_t>() + snapshot.numel();
  const Record begin{snapshot.const_data_ptr<int64_t>()};
  Record record = begin;
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(record.words < end, "the snapshot is of fewer than ", tensors.size(), " tensors");
    if (!record.is_of(tensor)) return false;
    record = record.next();
  }
  TORCH_CHECK(record.words == end, "the snapshot is of more than ", tensors.size(), " tensors");
  return sets == 0 || same_contents(tensors, begin, first, sets);
}

}  // namespace int8fx
