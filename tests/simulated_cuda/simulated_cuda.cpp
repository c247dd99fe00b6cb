// CUDA devices simulated on the host, for a process of libtorch without
// `libtorch_cuda.so`. Everything that libtorch looks up for CUDA is registered
// here. See README.md.

#include <ATen/native/transformers/attention.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <cstring>

#include "device.h"
#include "kernels.h"
#include "memory.h"

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at

namespace {

// A kernel that libtorch composes of others comes before any fallback. Of
// these operators the host has a kernel of its own, as real devices do.
const char* const COMPOSED[] = {
    "addr", "addr.out", "linalg__powsum", "mish_backward",
    "native_group_norm", "native_layer_norm", "silu_backward"};

C10_REGISTER_GUARD_IMPL(CUDA, simulated::Guard)

const bool registered = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, &simulated::device_memory());
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(simulated::choose_attention);
  return true;
}();

template <c10::BoxedKernel::BoxedKernelFunction* kernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kernel>();
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(boxed<&simulated::run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", simulated::empty);
  library.impl("empty_strided", simulated::empty_strided);
  library.impl("copy_", simulated::copy);
  library.impl("record_stream", simulated::record_stream);
  library.impl("_fused_sdp_choice", simulated::choose_attention);
  library.impl("_softmax.out", boxed<&simulated::run_softmax>());
  library.impl("_log_softmax.out", boxed<&simulated::run_softmax>());
  library.impl("_softmax_backward_data.out", boxed<&simulated::run_softmax_backward>());
  library.impl("_log_softmax_backward_data.out", boxed<&simulated::run_softmax_backward>());
  for (const char* composed : COMPOSED) {
    library.impl(composed, boxed<&simulated::run_on_host>());
  }
}

} // namespace

// Where a driver of NVIDIA is, a program that looks for it would load
// libtorch_cuda.so, which registers devices too: it is not found here.
extern "C" void* dlopen(const char* name, int flags) noexcept {
  using Open = void* (*)(const char*, int);
  static const auto open = reinterpret_cast<Open>(dlsym(RTLD_NEXT, "dlopen"));
  const bool is_driver = name != nullptr && std::strstr(name, "libcuda.so") != nullptr;
  return open(is_driver ? "libcuda.so (hidden: devices are simulated)" : name, flags);
}
