// Memory of the simulated devices.
//
// Every block has two addresses. The one that a tensor shows, its device
// address, lies in a reservation that nobody may read or write, so that host
// code that follows it dies as it would with a real device's. The other is
// ordinary memory, which kernels alone are given. Device addresses are never
// used twice: one that is used after its block was freed is found out.
//
// Fresh memory, pinned memory too, is full of ones, which is NaN in every
// floating element type: it is not by luck the zeros that someone forgot.

#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace simulated {

constexpr int UNWRITTEN = 0xff;

inline int64_t from_environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::stoll(value);
}

inline c10::DeviceIndex device_count() {
  static const auto count =
      static_cast<c10::DeviceIndex>(from_environment("SIMULATED_CUDA_DEVICES", 1));
  return count;
}

inline c10::DeviceIndex& current_device() {
  thread_local c10::DeviceIndex current = 0;
  return current;
}

inline void check_device(c10::DeviceIndex device) {
  TORCH_CHECK(
      device >= 0 && device < device_count(),
      "CUDA error: invalid device ordinal");
}

inline c10::Device cuda(c10::DeviceIndex index) {
  return c10::Device(c10::DeviceType::CUDA, index);
}

inline c10::Allocator* host_allocator() {
  return c10::GetAllocator(c10::DeviceType::CPU);
}

// The context that keeps a storage alive for as long as its memory is someone
// else's.
inline c10::DataPtr owned_by(const c10::Storage& storage) {
  return c10::DataPtr(
      storage.data_ptr().get(),
      new c10::Storage(storage),
      [](void* context) { delete static_cast<c10::Storage*>(context); },
      c10::Device(c10::DeviceType::CPU));
}

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  DeviceMemory()
      : capacity_(from_environment("SIMULATED_CUDA_MEMORY", int64_t{8} << 30)),
        statistics_(std::max<c10::DeviceIndex>(device_count(), 1)) {
    void* start = mmap(
        nullptr, RESERVED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(start != MAP_FAILED, "simulated CUDA: no address space for devices");
    next_ = reinterpret_cast<uintptr_t>(start);
    end_ = next_ + RESERVED;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const c10::DeviceIndex device = current_device();
    check_device(device);
    if (bytes == 0) {
      return c10::DataPtr(nullptr, cuda(device));
    }
    check_room(bytes, device);
    c10::DataPtr host = host_allocator()->allocate(bytes);
    std::memset(host.get(), UNWRITTEN, bytes);
    return place(std::move(host), bytes, device);
  }

  // Memory that a kernel made on the host becomes the device's.
  c10::DataPtr adopt(const c10::Storage& host, c10::DeviceIndex device) {
    if (host.nbytes() == 0) {
      return c10::DataPtr(nullptr, cuda(device));
    }
    check_room(host.nbytes(), device);
    return place(owned_by(host), host.nbytes(), device);
  }

  // Where a kernel finds what lies at a device address.
  void* host_address(const void* address, size_t bytes, c10::DeviceIndex device) {
    if (address == nullptr || bytes == 0) {
      return nullptr;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = find(address);
    TORCH_CHECK(
        found != blocks_.end() && found->second.device == device &&
            offset(found, address) + bytes <= found->second.bytes,
        "CUDA error: an illegal memory access was encountered (simulated: ", bytes,
        " bytes at ", address, " are not memory of cuda:", static_cast<int>(device), ")");
    return static_cast<char*>(found->second.host.get()) + offset(found, address);
  }

  c10::Device device_of(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = find(address);
    TORCH_CHECK(
        found != blocks_.end(),
        "The specified pointer resides on host memory and is not registered with any CUDA device.");
    return cuda(found->second.device);
  }

  c10::DeleterFnPtr raw_deleter() const override;

  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "simulated CUDA: raw copies of device memory are not simulated");
  }

  void release(void* address) {
    // The host memory goes last, without the lock: it may be a storage whose
    // end is code of someone else.
    Block block;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(reinterpret_cast<uintptr_t>(address));
    if (found != blocks_.end()) {
      block = std::move(found->second);
      blocks_.erase(found);
      count(block.device, [&](c10::CachingAllocator::Stat& bytes) { bytes.decrease(block.bytes); });
    }
  }

  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    check_device(device);
    std::lock_guard<std::mutex> lock(mutex_);
    return statistics_[device];
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    check_device(device);
    std::lock_guard<std::mutex> lock(mutex_);
    count(device, [](c10::CachingAllocator::Stat& bytes) { bytes.reset_accumulated(); });
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    check_device(device);
    std::lock_guard<std::mutex> lock(mutex_);
    count(device, [](c10::CachingAllocator::Stat& bytes) { bytes.reset_peak(); });
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    check_device(device);
    std::lock_guard<std::mutex> lock(mutex_);
    return {capacity_ - allocated(device), capacity_};
  }

 private:
  struct Block {
    c10::DataPtr host;
    size_t bytes = 0;
    c10::DeviceIndex device = 0;
  };
  using Blocks = std::map<uintptr_t, Block>;

  static constexpr size_t RESERVED = size_t{1} << 44;
  static constexpr size_t ALIGNMENT = 512;

  size_t allocated(c10::DeviceIndex device) const {
    return statistics_[device].allocated_bytes[0].current;
  }

  // Bytes asked for are all that is counted: there is no cache, and no block
  // is larger than what it holds.
  template <typename Change>
  void count(c10::DeviceIndex device, Change change) {
    auto& statistics = statistics_[device];
    change(statistics.allocated_bytes[0]);
    change(statistics.reserved_bytes[0]);
    change(statistics.active_bytes[0]);
    change(statistics.requested_bytes[0]);
  }

  void check_room(size_t bytes, c10::DeviceIndex device) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t free = capacity_ - allocated(device);
    if (bytes > free) {
      statistics_[device].num_ooms += 1;
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ",
          c10::CachingAllocator::format_size(bytes), ". GPU ", static_cast<int>(device),
          " has a total capacity of ", c10::CachingAllocator::format_size(capacity_), " of which ",
          c10::CachingAllocator::format_size(free), " is free. (simulated)");
    }
  }

  c10::DataPtr place(c10::DataPtr host, size_t bytes, c10::DeviceIndex device) {
    std::lock_guard<std::mutex> lock(mutex_);
    const uintptr_t address = next_;
    // One alignment more than the block needs: no block ends where another
    // begins.
    next_ += (bytes / ALIGNMENT + 2) * ALIGNMENT;
    TORCH_CHECK(next_ < end_, "simulated CUDA: device addresses are used up");
    count(device, [&](c10::CachingAllocator::Stat& counted) { counted.increase(bytes); });
    blocks_.emplace(address, Block{std::move(host), bytes, device});
    void* shown = reinterpret_cast<void*>(address);
    return c10::DataPtr(shown, shown, raw_deleter(), cuda(device));
  }

  Blocks::iterator find(const void* address) {
    auto after = blocks_.upper_bound(reinterpret_cast<uintptr_t>(address));
    if (after == blocks_.begin()) {
      return blocks_.end();
    }
    --after;
    return offset(after, address) < after->second.bytes ? after : blocks_.end();
  }

  static size_t offset(Blocks::const_iterator block, const void* address) {
    return reinterpret_cast<uintptr_t>(address) - block->first;
  }

  const size_t capacity_;
  std::mutex mutex_;
  Blocks blocks_;
  std::vector<c10::CachingDeviceAllocator::DeviceStats> statistics_;
  uintptr_t next_ = 0;
  uintptr_t end_ = 0;
};

// Never destroyed: tensors in statics outlive everything else.
inline DeviceMemory& device_memory() {
  static auto* memory = new DeviceMemory;
  return *memory;
}

inline c10::DeleterFnPtr DeviceMemory::raw_deleter() const {
  return [](void* address) { device_memory().release(address); };
}

// Page-locked host memory: ordinary memory of which it is known that it was
// asked for as such.
class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override;

  c10::DeleterFnPtr raw_deleter() const override;

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  bool holds(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto* place = static_cast<const char*>(address);
    auto after = blocks_.upper_bound(place);
    if (after == blocks_.begin()) {
      return false;
    }
    --after;
    return place < after->first + after->second.second;
  }

  void release(void* address) {
    c10::DataPtr memory;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(static_cast<const char*>(address));
    if (found != blocks_.end()) {
      memory = std::move(found->second.first);
      blocks_.erase(found);
    }
  }

 private:
  std::mutex mutex_;
  std::map<const char*, std::pair<c10::DataPtr, size_t>> blocks_;
};

inline PinnedMemory& pinned_memory() {
  static auto* memory = new PinnedMemory;
  return *memory;
}

inline c10::DeleterFnPtr PinnedMemory::raw_deleter() const {
  return [](void* address) { pinned_memory().release(address); };
}

inline c10::DataPtr PinnedMemory::allocate(size_t bytes) {
  c10::DataPtr memory = host_allocator()->allocate(bytes);
  void* address = memory.get();
  if (address == nullptr) {
    return memory;
  }
  std::memset(address, UNWRITTEN, bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  blocks_.emplace(static_cast<const char*>(address), std::make_pair(std::move(memory), bytes));
  return c10::DataPtr(address, address, raw_deleter(), c10::Device(c10::DeviceType::CPU));
}

} // namespace simulated
