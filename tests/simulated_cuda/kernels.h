// Kernels of the simulated devices: the host's, for every operator, and those
// few that speak of the device itself.

#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>

#include <cstring>
#include <optional>
#include <set>
#include <string>

#include "call.h"
#include "memory.h"
#include "queue.h"

namespace simulated {

// The one device of all arguments, by the rules of real kernels: a number on
// the host may be read beside them but not written, and indices of tensors
// may lie on the host.
class OneDevice {
 public:
  void see(const c10::Argument& argument, const c10::IValue& value) {
    if (value.isDevice()) {
      asked_ = value.toDevice();
    } else if (value.isTensor()) {
      see(argument, value.toTensor(), false);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) {
        see(argument, tensor, false);
      }
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        if (tensor) {
          see(argument, *tensor, true);
        }
      }
    } else if (value.isStorage()) {
      see(value.toStorage().device());
    }
  }

  c10::DeviceIndex index() const {
    TORCH_CHECK(
        !device_ || !host_,
        "Expected all tensors to be on the same device, but found at least two devices, ",
        device_.value_or(HOST), " and cpu! (when checking argument ", host_.value_or(""), ")");
    const c10::Device device = device_.value_or(asked_.value_or(cuda(-1)));
    return device.has_index() ? device.index() : current_device();
  }

 private:
  void see(const c10::Argument& argument, const at::Tensor& tensor, bool is_index) {
    if (!tensor.defined()) {
      return;
    }
    if (!tensor.is_cpu()) {
      see(tensor.device());
      return;
    }
    const bool is_written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (is_written || (tensor.dim() > 0 && !is_index)) {
      host_ = argument.name();
    }
  }

  void see(c10::Device device) {
    TORCH_CHECK(
        !device_ || *device_ == device,
        "Expected all tensors to be on the same device, but found at least two devices, ",
        *device_, " and ", device, "!");
    device_ = device;
  }

  std::optional<c10::Device> device_;
  std::optional<c10::Device> asked_;
  std::optional<std::string> host_;
};

inline bool is_generator(const c10::Argument& argument) {
  const c10::TypePtr& type = argument.type();
  const auto optional = type->cast<c10::OptionalType>();
  return (optional ? optional->getElementType() : type)->kind() == c10::TypeKind::GeneratorType;
}

// cuBLAS has no products of integers, which the host's kernels do have.
inline void check_product(const c10::FunctionSchema& schema, const torch::jit::Stack& stack) {
  static const std::set<std::string> products{
      "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::dot"};
  if (products.count(schema.name()) == 0) {
    return;
  }
  const auto dtype = stack[stack.size() - schema.arguments().size()].toTensor().scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      !c10::isIntegralType(dtype, true), "\"", schema.name(), "_cuda\" not implemented for '",
      dtype, "'");
}

inline void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  TORCH_CHECK_NOT_IMPLEMENTED(
      op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), "Could not run '", schema.name(),
      "' with arguments from the 'CUDA' backend (simulated: the CPU has no kernel for it)");
  check_product(schema, *stack);
  const size_t first = stack->size() - schema.arguments().size();
  OneDevice one;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    one.see(schema.arguments()[i], (*stack)[first + i]);
  }
  const c10::DeviceIndex device = one.index();
  check_device(device);
  const c10::DeviceGuard guard(cuda(device));
  queue(device).finish_uploads();

  Call call(device);
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    c10::IValue& argument = (*stack)[first + i];
    argument = is_generator(schema.arguments()[i]) && argument.isNone()
        ? call.to_host(c10::IValue(default_generator(device)))
        : call.to_host(argument);
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.update_arguments();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = call.to_device((*stack)[i]);
  }
}

// Softmax, or its logarithm, of halves in float is one kernel of a device and
// none of the host.
inline void run_softmax(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  constexpr size_t INPUT = 0, HALF_TO_FLOAT = 2;
  auto* arguments = &(*stack)[stack->size() - op.schema().arguments().size()];
  if (arguments[HALF_TO_FLOAT].toBool()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    arguments[INPUT] = arguments[INPUT].toTensor().to(at::kFloat);
    arguments[HALF_TO_FLOAT] = false;
  }
  run_on_host(op, stack);
}

// Its derivative is then asked for in half, of float.
inline void run_softmax_backward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  constexpr size_t COTANGENT = 0, INPUT_DTYPE = 3, OUT = 4;
  auto* arguments = &(*stack)[stack->size() - op.schema().arguments().size()];
  const at::ScalarType dtype = arguments[COTANGENT].toTensor().scalar_type();
  if (dtype == arguments[INPUT_DTYPE].toScalarType()) {
    run_on_host(op, stack);
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor out = arguments[OUT].toTensor();
  const at::Tensor wide = out.to(dtype);
  arguments[INPUT_DTYPE] = dtype;
  arguments[OUT] = wide;
  run_on_host(op, stack);
  out.copy_(wide);
  stack->back() = out;
}

inline at::Tensor empty(
    c10::SymIntArrayRef sizes,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool> pinned,
    std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  const c10::OptionalDeviceGuard guard(device && device->has_index() ? device : std::nullopt);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), &device_memory(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(
    c10::SymIntArrayRef sizes,
    c10::SymIntArrayRef strides,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  const c10::OptionalDeviceGuard guard(device && device->has_index() ? device : std::nullopt);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &device_memory(),
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

inline void copy_on_host(const at::Tensor& to, const at::Tensor& from) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const_cast<at::Tensor&>(to).copy_(from);
}

// Copies alone go from device to device, and between device and host.
inline at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  for (const at::Tensor& tensor : {self, source}) {
    if (tensor.is_cuda()) {
      queue(tensor.device().index()).finish_uploads();
    }
  }
  Call call(self.is_cuda() ? self.device().index() : source.device().index());
  const at::Tensor to = call.to_host(self);
  const at::Tensor from = call.to_host(source).expand_as(to);
  const bool is_upload = source.is_cpu();
  const at::Tensor& on_host = is_upload ? source : self;
  const bool is_transfer = source.is_cpu() || self.is_cpu();
  if (is_transfer && non_blocking && pinned_memory().holds(on_host.storage().data())) {
    if (is_upload) {
      queue(self.device().index()).push(true, [self, to, from] { copy_on_host(to, from); });
    } else {
      // What lies there now: kernels that come later do not change it.
      const at::Tensor now = from.clone();
      if (to.is_non_overlapping_and_dense()) {
        std::memset(to.mutable_data_ptr(), UNWRITTEN, to.nbytes());
      }
      queue(source.device().index()).push(false, [to, now] { copy_on_host(to, now); });
    }
    return self;
  }
  if (is_transfer) {
    // The host waits for such a copy, and with it for all that came before.
    queue(is_upload ? self.device().index() : source.device().index()).finish();
  }
  copy_on_host(to, from);
  return self;
}

inline void record_stream(at::Tensor& self, at::Stream stream) {
  device_memory().recordStream(self.storage().data_ptr(), stream);
}

// A simulated device has no kernel for attention but the formula in parts.
inline int64_t choose_attention(
    const at::Tensor&,
    const at::Tensor&,
    const at::Tensor&,
    const std::optional<at::Tensor>&,
    double,
    bool,
    std::optional<double>,
    bool) {
  constexpr int64_t MATH = 0;
  TORCH_CHECK(
      at::globalContext().userEnabledMathSDP(), "No available kernel. Aborting execution.");
  return MATH;
}

} // namespace simulated
