// One call of a kernel: arguments of the device become arguments on the host
// over the same memory, and results of the host become the device's.
//
// What a kernel gave back as it got it is the argument itself again; what
// shares its memory is a view of it; all else is new memory of the device.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/TensorImpl.h>

#include <optional>
#include <string>
#include <vector>

#include "generator.h"
#include "memory.h"

namespace simulated {

inline const c10::Device HOST(c10::DeviceType::CPU);

class Call {
 public:
  // The device that the call runs on: results are placed there.
  explicit Call(c10::DeviceIndex device) : device_(device) {}

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      return tensor;
    }
    for (const auto& known : tensors_) {
      if (known.device.is_same(tensor)) {
        return known.host;
      }
    }
    const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    auto host = like(impl, to_host(tensor.storage()), c10::DispatchKey::CPU);
    tensors_.push_back({tensor, host});
    return host;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu()) {
      return tensor;
    }
    for (const auto& known : tensors_) {
      if (known.host.is_same(tensor)) {
        return known.device;
      }
    }
    return like(
        *tensor.unsafeGetTensorImpl(), to_device(tensor.storage()), c10::DispatchKey::CUDA);
  }

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isDevice()) {
      return HOST;
    }
    if (value.isStorage()) {
      return to_host(value.toStorage());
    }
    if (value.isGenerator()) {
      const at::Generator given = value.toGenerator();
      TORCH_CHECK(
          given.device().is_cuda(), "Expected a 'cuda' device type for generator but found '",
          given.device().type(), "'");
      return given.get<DeviceGenerator>()->host();
    }
    return each_tensor(value, [this](const at::Tensor& tensor) { return to_host(tensor); });
  }

  c10::IValue to_device(const c10::IValue& value) {
    return each_tensor(value, [this](const at::Tensor& tensor) { return to_device(tensor); });
  }

  // What the kernel did to its arguments beside writing their elements: it
  // may have resized them or set them to other memory.
  void update_arguments() {
    const size_t arguments = storages_.size();
    for (size_t i = 0; i < arguments; ++i) {
      const Pair<c10::Storage> storage = storages_[i];
      if (storage.host.data() != addresses_[i] ||
          storage.host.nbytes() != storage.device.nbytes()) {
        storage.device.set_data_ptr(
            device_memory().adopt(storage.host, storage.device.device().index()));
        storage.device.set_nbytes(storage.host.nbytes());
      }
    }
    for (const auto& tensor : tensors_) {
      c10::TensorImpl* device = tensor.device.unsafeGetTensorImpl();
      const c10::TensorImpl* host = tensor.host.unsafeGetTensorImpl();
      const c10::Storage storage = to_device(host->storage());
      if (!storage.is_alias_of(device->storage())) {
        device->set_storage_keep_dtype(storage);
      }
      if (device->sizes() != host->sizes() || device->strides() != host->strides() ||
          device->storage_offset() != host->storage_offset()) {
        device->set_sizes_and_strides(host->sizes(), host->strides(), host->storage_offset());
      }
    }
  }

 private:
  template <typename T>
  struct Pair {
    T device;
    T host;
  };

  static at::Tensor like(
      const c10::TensorImpl& impl,
      c10::Storage storage,
      c10::DispatchKey key) {
    auto made = c10::make_intrusive<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(key), impl.dtype());
    made->set_sizes_and_strides(impl.sizes(), impl.strides(), impl.storage_offset());
    if (impl.is_wrapped_number()) {
      made->set_wrapped_number(true);
    }
    if (impl.is_conj()) {
      made->_set_conj(true);
    }
    if (impl.is_neg()) {
      made->_set_neg(true);
    }
    return at::Tensor(std::move(made));
  }

  c10::Storage to_host(const c10::Storage& storage) {
    if (!storage.device().is_cuda()) {
      return storage;
    }
    for (const auto& known : storages_) {
      if (known.device.is_alias_of(storage)) {
        return known.host;
      }
    }
    void* address = device_memory().host_address(
        storage.data_ptr().get(), storage.nbytes(), storage.device().index());
    c10::Storage host(
        c10::Storage::use_byte_size_t(), storage.nbytes(), c10::DataPtr(address, HOST),
        host_allocator(), storage.resizable());
    storages_.push_back({storage, host});
    addresses_.push_back(address);
    return host;
  }

  c10::Storage to_device(const c10::Storage& storage) {
    for (const auto& known : storages_) {
      if (known.host.is_alias_of(storage)) {
        return known.device;
      }
    }
    c10::Storage device(
        c10::Storage::use_byte_size_t(), storage.nbytes(),
        device_memory().adopt(storage, device_), &device_memory(), storage.resizable());
    storages_.push_back({device, storage});
    return device;
  }

  template <typename Change>
  static c10::IValue each_tensor(const c10::IValue& value, Change change) {
    if (value.isTensor()) {
      return change(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> changed;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        changed.push_back(change(tensor));
      }
      return changed;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> changed;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        changed.push_back(tensor ? std::make_optional(change(*tensor)) : std::nullopt);
      }
      return changed;
    }
    return value;
  }

  c10::DeviceIndex device_;
  std::vector<Pair<at::Tensor>> tensors_;
  std::vector<Pair<c10::Storage>> storages_;
  // Of the storages of arguments: where their memory was before the call.
  std::vector<const void*> addresses_;
};

} // namespace simulated
