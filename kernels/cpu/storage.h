// Gives the data of a storage back to who asks for it, after
// release_data_and_set_meta_custom_data_ptr_error_msg_: torch 2.11 can forbid it, and has no way back.
#pragma once

#include <c10/core/StorageImpl.h>
#include <torch/version.h>

namespace int8fx {

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR > 11

inline void allow_data_access(c10::StorageImpl* storage) { storage->clear_data_ptr_access_error_msg_(); }

#else

// An explicit instantiation may name private members; it hands the two over that later releases set.
template <bool c10::StorageImpl::* throws, void (c10::StorageImpl::*refresh)()>
struct Private {
  friend void clear_error(c10::StorageImpl& storage) {
    storage.*throws = false;
    (storage.*refresh)();
  }
};
void clear_error(c10::StorageImpl& storage);
template struct Private<&c10::StorageImpl::throw_on_immutable_data_ptr_,
                        &c10::StorageImpl::refresh_has_data_ptr_check>;

inline void allow_data_access(c10::StorageImpl* storage) {
  clear_error(*storage);
  storage->get_extra_meta().custom_data_ptr_error_msg_ = std::nullopt;
}

#endif

}  // namespace int8fx
