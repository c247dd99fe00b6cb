// The devices as libtorch asks for them: the hooks behind
// `torch::cuda::is_available` and its like, and the guard, with its streams
// and events.

#pragma once

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>

#include "generator.h"
#include "memory.h"
#include "queue.h"

namespace simulated {

struct Event {
  c10::DeviceIndex device;
  uint64_t mark;
  std::chrono::steady_clock::time_point time;
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override {
    return c10::DeviceType::CUDA;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return device_count();
  }

  c10::Device getDevice() const override {
    return cuda(current_device());
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.is_cuda(), "a guard of CUDA was given ", device);
    check_device(device.index());
    current_device() = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device() = device.index();
  }

  c10::Stream getStream(c10::Device device) const override {
    check_device(device.index());
    return c10::Stream(c10::Stream::UNSAFE, device, streams()[device.index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static std::atomic<c10::StreamId> next{1};
    check_device(device.index());
    return c10::Stream(c10::Stream::UNSAFE, device, next++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    streams()[stream.device_index()] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(stream.id());
  }
  bool queryStream(const c10::Stream& stream) const override {
    return query(stream.device_index(), Queue::ALL);
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    queue(stream.device_index()).finish();
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    queue(device).finish();
  }

  void record(
      void** event,
      const c10::Stream& stream,
      const c10::DeviceIndex device,
      const c10::EventFlag) const override {
    TORCH_CHECK(
        device == -1 || device == stream.device_index(), "Event device index ",
        static_cast<int>(device), " does not match recording stream's device index ",
        static_cast<int>(stream.device_index()), ".");
    if (*event == nullptr) {
      *event = new Event;
    }
    *static_cast<Event*>(*event) = {
        stream.device_index(), queue(stream.device_index()).mark(),
        std::chrono::steady_clock::now()};
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void* event) const override {
    return event == nullptr ||
        query(static_cast<Event*>(event)->device, static_cast<Event*>(event)->mark);
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      queue(static_cast<Event*>(event)->device).finish(static_cast<Event*>(event)->mark);
    }
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    using Milliseconds = std::chrono::duration<double, std::milli>;
    return Milliseconds(static_cast<Event*>(to)->time - static_cast<Event*>(from)->time).count();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }

 private:
  static std::array<c10::StreamId, 128>& streams() {
    thread_local std::array<c10::StreamId, 128> current{};
    return current;
  }

  // No is the answer once to who asks too early, and the work is then done:
  // who asks until the answer is yes comes to an end.
  static bool query(c10::DeviceIndex device, uint64_t mark) {
    const bool done = queue(device).is_done(mark);
    queue(device).finish(mark);
    return done;
  }
};

} // namespace simulated

// libtorch looks for hooks of this very name.
namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}

  void init() const override {
    TORCH_CHECK(hasCUDA(), "No CUDA GPUs are available");
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return hasCUDA();
  }
  bool hasCUDA() const override {
    return simulated::device_count() > 0;
  }
  DeviceIndex deviceCount() const override {
    return simulated::device_count();
  }
  int getNumGPUs() const override {
    return simulated::device_count();
  }
  bool hasPrimaryContext(DeviceIndex device) const override {
    simulated::check_device(device);
    return true;
  }

  DeviceIndex current_device() const override {
    return hasCUDA() ? simulated::current_device() : -1;
  }
  DeviceIndex getCurrentDevice() const override {
    return simulated::current_device();
  }
  void setCurrentDevice(DeviceIndex device) const override {
    simulated::check_device(device);
    simulated::current_device() = device;
  }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    const DeviceIndex before = getCurrentDevice();
    setCurrentDevice(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? getCurrentDevice() : exchangeDevice(device);
  }
  void deviceSynchronize(DeviceIndex device) const override {
    simulated::queue(device < 0 ? getCurrentDevice() : device).finish();
  }

  Allocator* getCUDADeviceAllocator() const override {
    return &simulated::device_memory();
  }
  Allocator* getPinnedMemoryAllocator() const override {
    return &simulated::pinned_memory();
  }
  bool isPinnedPtr(const void* address) const override {
    return simulated::pinned_memory().holds(address);
  }
  Device getDeviceFromPtr(void* address) const override {
    return simulated::device_memory().device_of(address);
  }

  const Generator& getDefaultGenerator(DeviceIndex device) const override {
    return simulated::default_generator(device);
  }
  Generator getNewGenerator(DeviceIndex device) const override {
    return simulated::new_generator(device < 0 ? getCurrentDevice() : device);
  }
  std::string showConfig() const override {
    return "a CUDA device simulated on the host";
  }
};

} // namespace at
