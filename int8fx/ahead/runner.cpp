// Runs what AOTInductor made of a model's graphs, in a process without Python's torch.
//
// int8fx/ahead/native.py calls the functions at the end. Each returns null, or why it failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/csrc/inductor/aoti_torch/proxy_executor.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

namespace {

enum class Kind : int32_t { TENSOR, TENSORS, INT, INTS };

// An argument that changes from call to call: of a list, how long it is.
struct Argument {
  Kind kind;
  size_t position;
  int64_t length;
};

// An operator that a compiled graph calls by the dispatcher.
struct Call {
  c10::OperatorHandle op;
  torch::jit::Stack fixed;
  std::vector<Argument> arguments;
};

// Calls operators for a compiled graph. torch's own executor takes no empty list of tensors.
class Executor : public torch::aot_inductor::ProxyExecutor {
 public:
  std::vector<Call> calls;

  // Behind the tensors among the arguments come those that take the results.
  void call_function(
      int index, int, int64_t* ints, int, AtenTensorHandle* tensors) override {
    const Call& call = calls.at(index);
    torch::jit::Stack stack = call.fixed;
    for (const Argument& each : call.arguments) stack[each.position] = value_of(each, ints, tensors);
    call.op.callBoxed(stack);
    for (c10::IValue& result : stack) {
      if (result.isTensorList())
        for (const at::Tensor& each : result.toTensorVector()) tensor_of(*tensors++) = each;
      else
        tensor_of(*tensors++) = std::move(result).toTensor();
    }
  }

 private:
  static at::Tensor& tensor_of(AtenTensorHandle handle) {
    return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
  }

  static c10::IValue value_of(const Argument& each, int64_t*& ints, AtenTensorHandle*& tensors) {
    switch (each.kind) {
      case Kind::TENSOR:
        return tensor_of(*tensors++);
      case Kind::TENSORS: {
        c10::List<at::Tensor> list;
        list.reserve(each.length);
        for (int64_t i = 0; i < each.length; ++i) list.push_back(tensor_of(*tensors++));
        return list;
      }
      case Kind::INT:
        return *ints++;
      case Kind::INTS: {
        const c10::List<int64_t> list(c10::IntArrayRef(ints, each.length));
        ints += each.length;
        return list;
      }
    }
    TORCH_CHECK(false, "no kind of argument");
  }
};

// A compiled graph with its inputs: weights and cache stay, tokens change.
class Program : public torch::inductor::AOTIModelContainerRunnerCpu {
 public:
  explicit Program(const std::string& library) : AOTIModelContainerRunnerCpu(library) {
    proxy_executor_handle_ = reinterpret_cast<AOTIProxyExecutorHandle>(
        static_cast<torch::aot_inductor::ProxyExecutor*>(&executor));
  }

  Executor executor;
  std::vector<at::Tensor> inputs;
};

// Where torch's Python is not there, nobody else says which operators there are.
std::vector<torch::Library>& definitions() {
  static std::vector<torch::Library> all;
  return all;
}

std::vector<float> to_float(const at::Tensor& logits, int64_t count) {
  const at::Tensor last = logits.flatten().slice(0, logits.numel() - count).to(at::kFloat).contiguous();
  const float* values = last.const_data_ptr<float>();
  return {values, values + count};
}

// The smallest set of most likely tokens whose probabilities reach top_p; one of them, by its share.
int64_t sample(const std::vector<float>& logits, double temperature, double top_p, double uniform) {
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
  std::vector<double> share(order.size());
  double total = 0;
  for (size_t i = 0; i < order.size(); ++i)
    total += share[i] = std::exp((logits[order[i]] - logits[order[0]]) / temperature);
  double kept = 0;
  size_t count = 0;
  while (count < order.size() && (count == 0 || kept < top_p * total)) kept += share[count++];
  double left = uniform * kept;
  for (size_t i = 0; i < count; ++i)
    if ((left -= share[i]) < 0) return order[i];
  return order[count - 1];
}

template <class Body>
const char* told(Body body) {
  thread_local std::string reason;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Defines an operator int8fx::name, unless Python has.
EXPORT const char* int8fx_ahead_define(const char* name, const char* overload, const char* schema) {
  return told([&] {
    if (c10::Dispatcher::singleton().findSchema({name, overload})) return;
    definitions().emplace_back(torch::Library::FRAGMENT, "int8fx", std::nullopt, __FILE__, __LINE__);
    definitions().back().def(schema);
  });
}

// Python defines them itself when it comes to torch later.
EXPORT void int8fx_ahead_undefine() { definitions().clear(); }

EXPORT const char* int8fx_ahead_open(const char* library, int64_t inputs, Program** program) {
  return told([&] {
    auto opened = std::make_unique<Program>(library);
    opened->inputs.resize(inputs);
    *program = opened.release();
  });
}

EXPORT void int8fx_ahead_close(Program* program) { delete program; }

// The memory stays the caller's.
EXPORT const char* int8fx_ahead_input(
    Program* program, int64_t position, void* data, int32_t dtype, const int64_t* shape, int64_t dims) {
  return told([&] {
    const auto options = at::TensorOptions().dtype(static_cast<c10::ScalarType>(dtype));
    program->inputs.at(position) = at::from_blob(data, at::IntArrayRef(shape, dims), options);
  });
}

// The next operator that the graph calls. Arguments that do not change follow in the order of the schema,
// as do those that do.
EXPORT const char* int8fx_ahead_call(Program* program, const char* name, const char* overload) {
  return told([&] {
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
    program->executor.calls.push_back({op, {}, {}});
  });
}

EXPORT const char* int8fx_ahead_argument(Program* program, int32_t kind, int64_t length) {
  return told([&] {
    Call& call = program->executor.calls.back();
    call.arguments.push_back({static_cast<Kind>(kind), call.fixed.size(), length});
    call.fixed.emplace_back();
  });
}

EXPORT const char* int8fx_ahead_text(Program* program, const char* value) {
  return told([&] { program->executor.calls.back().fixed.emplace_back(std::string(value)); });
}

EXPORT const char* int8fx_ahead_real(Program* program, double value) {
  return told([&] { program->executor.calls.back().fixed.emplace_back(value); });
}

EXPORT const char* int8fx_ahead_flag(Program* program, int32_t value) {
  return told([&] { program->executor.calls.back().fixed.emplace_back(value != 0); });
}

EXPORT const char* int8fx_ahead_none(Program* program) {
  return told([&] { program->executor.calls.back().fixed.emplace_back(); });
}

// Logits of the last position, [vocabulary].
EXPORT const char* int8fx_ahead_run(Program* program, int64_t vocabulary, float* logits) {
  return told([&] {
    // Operators of ours have a gradient in Python, where that is there; nobody asks for one.
    const at::AutoDispatchBelowAutograd below;
    const auto outputs = program->run(program->inputs);
    const auto values = to_float(outputs.at(0), vocabulary);
    std::copy(values.begin(), values.end(), logits);
  });
}

EXPORT int64_t int8fx_ahead_most_likely(const float* logits, int64_t vocabulary) {
  return std::max_element(logits, logits + vocabulary) - logits;
}

EXPORT int64_t int8fx_ahead_sample(
    const float* logits, int64_t vocabulary, double temperature, double top_p, double uniform) {
  return sample({logits, logits + vocabulary}, temperature, top_p, uniform);
}

EXPORT void int8fx_ahead_threads(int32_t count) { at::set_num_threads(count); }
