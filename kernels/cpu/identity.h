// int8fx::snapshot, int8fx::joined and int8fx::unchanged: what a list of tensors were at one time, and
// whether they still are that. A compiled graph asks at each call, of each of its weights;
// int8fx/weights/identity.py says what is compared.
//
// A snapshot keeps where the samples of a tensor's content lie: they are read after its state was found
// to be the same, and with it its memory. What one comparison reads of it lies in one piece.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include "samples.h"

namespace int8fx {

using Words = std::vector<int64_t>;

inline int64_t word_of(const void* pointer) { return reinterpret_cast<int64_t>(pointer); }

using State = c10::SmallVector<int64_t, 16>;

inline State state_of(const at::Tensor& tensor) {
  const c10::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  State state{word_of(impl)};
  // Inference tensors count no versions.
  state.push_back(tensor.is_inference() ? 0 : impl->version_counter().current_version());
  if (!is_plain(tensor)) return state;
  const c10::Storage& storage = impl->unsafe_storage();
  state.push_back(word_of(storage.unsafeGetStorageImpl()));
  state.push_back(word_of(storage.data()));
  state.push_back(storage.nbytes());
  state.push_back(tensor.storage_offset());
  state.push_back(4 * static_cast<int64_t>(tensor.scalar_type()) + 2 * tensor.is_neg() +
                  tensor.is_conj());
  state.append(tensor.sizes().begin(), tensor.sizes().end());
  state.append(tensor.strides().begin(), tensor.strides().end());
  return state;
}

// Lines that are compared together, as words of a snapshot: hash | width | how many | addresses.
struct Group {
  const int64_t* words;
  static constexpr int64_t HEADER = 3;

  static void append(const Runs& runs, int64_t set, Words& words) {
    const auto lines = lines_of_set(runs, set);
    const uint64_t hash = hash_of(lines.data(), lines.size(), runs.width());
    words.insert(words.end(), {static_cast<int64_t>(hash), runs.width(), static_cast<int64_t>(lines.size())});
    for (const char* const line : lines) words.push_back(word_of(line));
  }

  const char* const* lines() const { return reinterpret_cast<const char* const*>(words + HEADER); }
  void fetch() const { int8fx::fetch(lines(), words[2], words[1]); }
  bool is_same() const {
    return hash_of(lines(), words[2], words[1]) == static_cast<uint64_t>(words[0]);
  }
  Group next() const { return {words + HEADER + words[2]}; }
};

constexpr int64_t GROUP = Group::HEADER + LINES;  // words of a group of a set

// A snapshot is an int64 tensor: how many words each of these takes |
//   states: of each tensor, how many words follow
//   always: the groups that every comparison reads
//   large: which of the tensors have sets
//   sets: of each, the groups of the large tensors
struct Sections {
  Words states, always, large;
  std::array<Words, SETS> sets;

  void append(const at::Tensor& tensor, int64_t index) {
    const State state = state_of(tensor);
    states.push_back(state.size());
    states.insert(states.end(), state.begin(), state.end());
    const Runs runs = runs_of(tensor);
    if (!runs.data) return;
    // Elements that lie apart are short lines, which see little: all sets, always.
    const bool at_once = runs.whole() || runs.width() < LINE;
    for (int64_t set = 0; set < runs.sets(); ++set)
      Group::append(runs, set, at_once ? always : sets[set]);
    if (!at_once) large.push_back(index);
  }

  at::Tensor as_tensor() const {
    Words words{
        static_cast<int64_t>(states.size()), static_cast<int64_t>(always.size()),
        static_cast<int64_t>(large.size())};
    const auto add = [&](const Words& more) { words.insert(words.end(), more.begin(), more.end()); };
    add(states), add(always), add(large);
    for (const Words& set : sets) add(set);
    at::Tensor tensor(at::detail::empty_cpu({static_cast<int64_t>(words.size())}, at::kLong));
    std::copy(words.begin(), words.end(), tensor.mutable_data_ptr<int64_t>());
    return tensor;
  }
};

// The same, as it is read.
class Snapshot {
 public:
  explicit Snapshot(const at::Tensor& tensor) : words_(tensor.const_data_ptr<int64_t>()) {}

  const int64_t* states() const { return words_ + 3; }
  const int64_t* always() const { return states() + words_[0]; }
  const int64_t* large() const { return always() + words_[1]; }
  int64_t count_large() const { return words_[2]; }
  const int64_t* set(int64_t number) const {
    return large() + count_large() * (1 + number % SETS * GROUP);
  }

 private:
  const int64_t* words_;
};

inline at::Tensor snapshot(at::TensorList tensors) {
  Sections sections;
  for (size_t i = 0; i < tensors.size(); ++i) sections.append(tensors[i], i);
  return sections.as_tensor();
}

// One snapshot of the tensors of all of them.
inline at::Tensor joined(at::TensorList snapshots) {
  Sections all;
  int64_t tensors = 0;
  for (const at::Tensor& tensor : snapshots) {
    const Snapshot each(tensor);
    all.states.insert(all.states.end(), each.states(), each.always());
    all.always.insert(all.always.end(), each.always(), each.large());
    for (int64_t i = 0; i < each.count_large(); ++i) all.large.push_back(tensors + each.large()[i]);
    for (int64_t set = 0; set < SETS; ++set) {
      const int64_t* const groups = each.set(set);
      all.sets[set].insert(all.sets[set].end(), groups, groups + each.count_large() * GROUP);
    }
    for (const int64_t* state = each.states(); state < each.always(); state += 1 + *state) ++tensors;
  }
  return all.as_tensor();
}

inline bool same_states(at::TensorList tensors, const Snapshot& snapshot) {
  const int64_t* was = snapshot.states();
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(was < snapshot.always(), "the snapshot is of fewer than ", tensors.size(), " tensors");
    const State now = state_of(tensor);
    const int64_t size = *was++;
    if (static_cast<int64_t>(now.size()) != size || !std::equal(now.begin(), now.end(), was)) return false;
    was += size;
  }
  TORCH_CHECK(was == snapshot.always(), "the snapshot is of more than ", tensors.size(), " tensors");
  return true;
}

// A gradient says that a weight is being trained, which costs more than to compare all samples.
inline bool is_trained(const at::Tensor& tensor) {
  return tensor.requires_grad() && tensor.is_leaf() && tensor.grad().defined();
}

// How many groups' lines are on their way while those of one are hashed: a line takes longer to come, by
// a miss of the TLB in a virtual machine, than a group's take to be hashed.
constexpr int64_t AHEAD = 8;

// Whether the groups from one place of a snapshot to another say the same as memory.
inline bool same_contents(const int64_t* from, const int64_t* to) {
  Group coming{from};
  for (int64_t i = 0; i < AHEAD && coming.words < to; ++i, coming = coming.next()) coming.fetch();
  for (Group group{from}; group.words < to; group = group.next()) {
    if (coming.words < to) {
      coming.fetch();
      coming = coming.next();
    }
    if (!group.is_same()) return false;
  }
  return true;
}

// `sets` sets of samples are compared from number `first` on; with 0 only the states are.
inline bool unchanged(
    at::TensorList tensors, const at::Tensor& words, int64_t first, int64_t sets) {
  TORCH_CHECK(first >= 0 && sets >= 0, "sets of samples: from ", first, ", ", sets);
  const Snapshot snapshot(words);
  if (!same_states(tensors, snapshot)) return false;
  if (sets == 0) return true;
  if (!same_contents(snapshot.always(), snapshot.large())) return false;
  const int64_t large = snapshot.count_large();
  for (int64_t set = 0; set < std::min(sets, SETS); ++set) {
    const int64_t* const groups = snapshot.set(first % SETS + set);
    if (!same_contents(groups, groups + large * GROUP)) return false;
  }
  for (int64_t i = 0; i < large && sets < SETS; ++i) {
    if (!is_trained(tensors[snapshot.large()[i]])) continue;
    for (int64_t set = sets; set < SETS; ++set)
      if (!Group{snapshot.set(first % SETS + set) + i * GROUP}.is_same()) return false;
  }
  return true;
}

}  // namespace int8fx
