// How threads share the work items of a call.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace int8fx {

// Each thread works through a range of its own, whose weights it prefetches from item to item, and
// then helps the others, so that a thread which the machine holds up does not hold up the call.
class Queue {
 public:
  Queue(int64_t items, int64_t threads) : ranges_(threads) {
    for (int64_t t = 0; t < threads; ++t) {
      ranges_[t].next = items * t / threads;
      ranges_[t].end = items * (t + 1) / threads;
    }
  }

  template <class F>
  void drain(int64_t thread, const F& execute) {
    const int64_t threads = ranges_.size();
    for (int64_t i = 0; i < threads; ++i) {
      Range& range = ranges_[(thread + i) % threads];
      for (int64_t item; (item = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
        execute(item);
    }
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges_;
};

}  // namespace int8fx
