// What tch does not bind of a device: which one is current, when it has come
// to an event, how much memory it has, memory that is pinned for it, and the
// switches of torch's attention.
//
// All through c10's interfaces that know no vendor. So this file needs no
// header of CUDA, is compiled against any libtorch, and finds the device when
// libtorch_cuda has been loaded. Nothing here decides anything.

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/AutogradState.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>
#include <memory>

#include "../exception.h"

namespace {

c10::Device cuda(int32_t index) {
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}

c10::impl::VirtualGuardImpl guard() {
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA);
}

c10::DeviceAllocator* allocator() {
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  return c10::getDeviceAllocator(c10::DeviceType::CUDA);
}

} // namespace

extern "C" {

void ulysses_device_set_current(int32_t index, void* sink, Fail fail) {
  guarded(sink, fail, [&] { guard().setDevice(cuda(index)); });
}

void ulysses_device_synchronize(int32_t index, void* sink, Fail fail) {
  guarded(sink, fail, [&] {
    guard().synchronizeDevice(static_cast<c10::DeviceIndex>(index));
  });
}

// The handle of the stream on which torch puts the work of this thread.
void ulysses_device_stream(int32_t index, void** handle, void* sink, Fail fail) {
  guarded(sink, fail, [&] {
    const auto implementation = guard();
    const c10::Stream stream = implementation.getStream(cuda(index));
    *handle = implementation.getStreamNativeHandle(stream);
  });
}

// An event that has been recorded on that stream.
void ulysses_event_record(int32_t index, void** event, void* sink, Fail fail) {
  guarded(sink, fail, [&] {
    const c10::Stream stream = guard().getStream(cuda(index));
    auto recorded = std::make_unique<c10::Event>(
        c10::DeviceType::CUDA, c10::EventFlag::BACKEND_DEFAULT);
    recorded->record(stream);
    *event = recorded.release();
  });
}

void ulysses_event_query(const void* event, bool* reached, void* sink, Fail fail) {
  guarded(sink, fail, [&] {
    *reached = static_cast<const c10::Event*>(event)->query();
  });
}

void ulysses_event_synchronize(const void* event, void* sink, Fail fail) {
  guarded(sink, fail, [&] {
    static_cast<const c10::Event*>(event)->synchronize();
  });
}

void ulysses_event_milliseconds(
    const void* from, const void* to, double* milliseconds, void* sink, Fail fail) {
  guarded(sink, fail, [&] {
    *milliseconds =
        static_cast<const c10::Event*>(from)->elapsedTime(*static_cast<const c10::Event*>(to));
  });
}

void ulysses_event_free(void* event) { delete static_cast<c10::Event*>(event); }

void ulysses_device_memory(
    int32_t index, uint64_t* free, uint64_t* total, void* sink, Fail fail) {
  guarded(sink, fail, [&] {
    const auto memory = allocator()->getMemoryInfo(static_cast<c10::DeviceIndex>(index));
    *free = memory.first;
    *total = memory.second;
  });
}

// Room for `like` in memory of the host that a device copies from and to by
// itself.
void ulysses_pinned(const at::Tensor* like, at::Tensor** tensor, void* sink, Fail fail) {
  guarded(sink, fail, [&] {
    const auto options = at::TensorOptions().dtype(like->dtype()).pinned_memory(true);
    *tensor = new at::Tensor(at::empty(like->sizes(), options));
  });
}

void ulysses_keep_backward_on_this_thread() {
  c10::AutogradState::get_tls_state().set_multithreading_enabled(false);
}

// The switches of torch's scaled_dot_product_attention, which are the whole
// process': flash 1, memory-efficient 2, math 4, cuDNN 8.
uint8_t ulysses_attention_switches() {
  const at::Context& context = at::globalContext();
  return static_cast<uint8_t>(
      (context.userEnabledFlashSDP() ? 1 : 0) | (context.userEnabledMemEfficientSDP() ? 2 : 0) |
      (context.userEnabledMathSDP() ? 4 : 0) | (context.userEnabledCuDNNSDP() ? 8 : 0));
}

void ulysses_set_attention_switches(uint8_t switches) {
  at::Context& context = at::globalContext();
  context.setSDPUseFlash((switches & 1) != 0);
  context.setSDPUseMemEfficient((switches & 2) != 0);
  context.setSDPUseMath((switches & 4) != 0);
  context.setSDPUseCuDNN((switches & 8) != 0);
}

} // extern "C"
