// The custom autograd function that tch does not bind: a node of the graph
// whose forward and backward are calls into Rust.
//
// Three rules keep the two languages apart. An error in Rust becomes a C++
// exception here, and an exception becomes a call of `fail`; neither crosses
// the border as itself. Every tensor given to Rust is a new handle, which Rust
// owns and frees. The Rust state belongs to `State` from the first line of
// `ulysses_autograd_apply` on, and is freed with the last node that needs it.

#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "../exception.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// What one call into Rust brings back: tensors, or the reason for there being
// none. Rust fills it through `ulysses_answer_tensor` and `_failure`.
struct Answer {
  variable_list tensors;
  std::string failure;
};

using Pass = bool (*)(void*, at::Tensor* const*, size_t, Answer*);
using Release = void (*)(void*);

struct State : torch::CustomClassHolder {
  void* rust;
  Pass forward;
  Pass backward;
  Release release;

  State(void* rust, Pass forward, Pass backward, Release release)
      : rust(rust), forward(forward), backward(backward), release(release) {}
  ~State() override { release(rust); }
};

variable_list call(Pass pass, const State& state, at::TensorList inputs) {
  std::vector<at::Tensor*> handles;
  handles.reserve(inputs.size());
  for (const at::Tensor& input : inputs) {
    handles.push_back(new at::Tensor(input));
  }
  Answer answer;
  if (!pass(state.rust, handles.data(), handles.size(), &answer)) {
    throw std::runtime_error(answer.failure);
  }
  return std::move(answer.tensors);
}

struct RustFunction : torch::autograd::Function<RustFunction> {
  static variable_list forward(
      AutogradContext* context,
      c10::intrusive_ptr<State> state,
      at::TensorList inputs) {
    context->saved_data["state"] = c10::IValue::make_capsule(state);
    return call(state->forward, *state, inputs);
  }

  static variable_list backward(AutogradContext* context, variable_list cotangents) {
    // The engine enables gradients inside backward exactly when the caller
    // asked for a graph of it. Rust's backward records none, so derivatives
    // of second order would come out as zeros without a word.
    if (c10::GradMode::is_enabled()) {
      throw std::runtime_error(
          "this function cannot be differentiated twice: "
          "run backward without create_graph");
    }
    auto capsule = context->saved_data.at("state").toCapsule();
    const State& state = *static_cast<State*>(capsule.get());
    variable_list gradients = call(state.backward, state, cotangents);
    // torch counts `state` among the inputs of forward: it has no gradient.
    gradients.insert(gradients.begin(), Variable());
    return gradients;
  }
};

} // namespace

extern "C" {

void ulysses_answer_tensor(Answer* answer, const at::Tensor* tensor) {
  answer->tensors.push_back(*tensor);
}

void ulysses_answer_failure(Answer* answer, const char* text, size_t length) {
  answer->failure.assign(text, length);
}

bool ulysses_grad_enabled() { return c10::GradMode::is_enabled(); }

void ulysses_autograd_apply(
    void* rust,
    Pass forward,
    Pass backward,
    Release release,
    const at::Tensor* const* inputs,
    size_t count,
    void* outputs,
    void (*output)(void*, at::Tensor*),
    void* sink,
    Fail fail) {
  guarded(sink, fail, [&] {
    auto state = c10::make_intrusive<State>(rust, forward, backward, release);
    std::vector<at::Tensor> list;
    list.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      list.push_back(*inputs[i]);
    }
    for (const at::Tensor& tensor : RustFunction::apply(state, at::TensorList(list))) {
      output(outputs, new at::Tensor(tensor));
    }
  });
}

} // extern "C"
