// What a device has been asked and has not done yet.
//
// Kernels run at once, so a copy between pinned memory and the device, asked
// for with `non_blocking`, is the one thing that waits here. It is done as
// late as a real device may be: a copy to the device when a kernel needs it
// or someone waits, a copy from the device when someone waits. Until then
// the host sees unwritten memory, and whatever it writes in a buffer that it
// gave away reaches the device.

#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <mutex>
#include <vector>

#include "memory.h"

namespace simulated {

class Queue {
 public:
  static constexpr uint64_t ALL = std::numeric_limits<uint64_t>::max();

  void push(bool upload, std::function<void()> copy) {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back({++pushed_, upload, std::move(copy)});
  }

  // What an event that is recorded now has to wait for.
  uint64_t mark() {
    std::lock_guard<std::mutex> lock(mutex_);
    return pushed_;
  }

  bool is_done(uint64_t mark) {
    std::lock_guard<std::mutex> lock(mutex_);
    return waiting_.empty() || waiting_.front().number > mark;
  }

  void finish(uint64_t mark = ALL) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (!waiting_.empty() && waiting_.front().number <= mark) {
      waiting_.front().copy();
      waiting_.pop_front();
    }
  }

  // Before a kernel, which sees what was copied to the device before it.
  void finish_uploads() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
      if (waiting->upload) {
        waiting->copy();
        waiting = waiting_.erase(waiting);
      } else {
        ++waiting;
      }
    }
  }

 private:
  struct Waiting {
    uint64_t number;
    bool upload;
    std::function<void()> copy;
  };

  std::mutex mutex_;
  std::deque<Waiting> waiting_;
  uint64_t pushed_ = 0;
};

// All streams of a device are one queue.
inline Queue& queue(c10::DeviceIndex device) {
  static auto* queues = new std::vector<Queue>(device_count());
  check_device(device);
  return (*queues)[device];
}

} // namespace simulated
