// The gradient of a leaf: word that it is complete, and taking it away. tch
// binds neither.
//
// The rules of function.cpp hold here too: neither exceptions nor panics cross
// the border, a tensor given to Rust is a new handle that Rust frees, and the
// Rust state of a hook belongs to `Callback` from the first line of
// `ulysses_hook_add` on.

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../exception.h"

namespace {

using torch::autograd::PostAccumulateGradHook;
using torch::autograd::Variable;

using Call = bool (*)(void*, at::Tensor*, std::string*);
using Release = void (*)(void*);

struct Callback {
  void* rust;
  Call call;
  Release release;

  Callback(void* rust, Call call, Release release)
      : rust(rust), call(call), release(release) {}
  Callback(const Callback&) = delete;
  Callback& operator=(const Callback&) = delete;
  ~Callback() { release(rust); }
};

// A leaf has one hook of torch, which is this one, with all of ours in it. It
// stays when the last of them is removed: that may happen while it runs.
struct Hooks : PostAccumulateGradHook {
  std::mutex mutex;
  uint64_t next = 0;
  std::vector<std::pair<uint64_t, std::shared_ptr<Callback>>> callbacks;

  void operator()(const Variable& parameter) override {
    std::unique_lock<std::mutex> lock(mutex);
    auto now = callbacks;
    lock.unlock();
    for (const auto& entry : now) {
      std::string failure;
      if (!entry.second->call(entry.second->rust, new at::Tensor(parameter), &failure)) {
        throw std::runtime_error(failure);
      }
    }
  }
};

} // namespace

extern "C" {

void ulysses_hook_failure(std::string* failure, const char* text, size_t length) {
  failure->assign(text, length);
}

uint64_t ulysses_hook_add(
    const at::Tensor* parameter,
    void* rust,
    Call call,
    Release release,
    void* sink,
    Fail fail) {
  uint64_t id = 0;
  guarded(sink, fail, [&] {
    auto callback = std::make_shared<Callback>(rust, call, release);
    auto& slot = torch::autograd::impl::post_acc_grad_hooks(*parameter);
    if (!slot) {
      torch::autograd::impl::set_post_acc_grad_hooks(*parameter, std::make_unique<Hooks>());
    }
    auto* hooks = dynamic_cast<Hooks*>(
        torch::autograd::impl::post_acc_grad_hooks(*parameter).get());
    if (hooks == nullptr) {
      throw std::runtime_error("somebody else has a hook on this parameter's gradient");
    }
    std::lock_guard<std::mutex> lock(hooks->mutex);
    id = hooks->next++;
    hooks->callbacks.emplace_back(id, std::move(callback));
  });
  return id;
}

void ulysses_hook_remove(
    const at::Tensor* parameter,
    uint64_t id,
    void* sink,
    Fail fail) {
  guarded(sink, fail, [&] {
    auto* hooks = dynamic_cast<Hooks*>(
        torch::autograd::impl::post_acc_grad_hooks(*parameter).get());
    if (hooks == nullptr) {
      return;
    }
    // Released without the lock: Rust may have more hooks to remove then.
    std::shared_ptr<Callback> removed;
    std::lock_guard<std::mutex> lock(hooks->mutex);
    auto& all = hooks->callbacks;
    auto found = std::find_if(
        all.begin(), all.end(), [&](const auto& entry) { return entry.first == id; });
    if (found != all.end()) {
      removed = std::move(found->second);
      all.erase(found);
    }
  });
}

at::Tensor* ulysses_gradient_take(const at::Tensor* parameter, void* sink, Fail fail) {
  at::Tensor* taken = nullptr;
  guarded(sink, fail, [&] {
    at::Tensor gradient = std::exchange(parameter->mutable_grad(), at::Tensor());
    if (gradient.defined()) {
      taken = new at::Tensor(std::move(gradient));
    }
  });
  return taken;
}

} // extern "C"
