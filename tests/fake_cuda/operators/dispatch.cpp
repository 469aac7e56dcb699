// The CUDA dispatch key computed by the CPU's kernels.
//
// sitecustomize.py calls fakecuda_sweep() after torch and after each library that brings operators. Every operator with a
// kernel for CUDA and one for the CPU then gets run_on_host() for CUDA: its CUDA tensors become CPU aliases
// (device_alias.h), the CPU's kernel runs, and what is new goes to the "device". MegaRL's own operators keep their CUDA
// code, whose kernels the runtime executes.
//
// Three ways to run, as the current stream has it:
//   capturing   nothing is computed; the call becomes a node of the graph and runs at each replay
//   lazy        what only writes into its arguments is enqueued; anything else waits for the stream, then runs
//   otherwise   now
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "device_alias.h"
#include "runtime.h"

namespace {
using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using fake::DeviceAliases;
using fake::map_tensors;
using torch::jit::Stack;
using Device = c10::Device;

// Kernels for CUDA that only allocate, describe or synchronize: the fake runtime is all they need.
const std::set<std::string> LEFT_ALONE = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::as_strided", "aten::resize_", "aten::set_",
    "aten::set_.source_Tensor", "aten::set_.source_Storage", "aten::set_.source_Storage_storage_offset",
    "aten::is_set_to", "aten::record_stream", "aten::is_pinned", "aten::_pin_memory", "aten::_fused_sdp_choice",
    "aten::_copy_from_and_resize", "aten::_local_scalar_dense",
};
const char* const FOREIGN[] = {"aten::_nested", "c10d::", "fakecuda::", "symm_mem::"};
// Operators whose CUDA code runs first, for its checks and its launches. The numbers come from here all the same.
const char* const HOST_HALF_TOO[] = {
    "_C::", "_C_cache_ops::", "_moe_C::", "aten::_scaled_dot_product_flash", "aten::_scaled_dot_product_efficient",
    "aten::_flash_attention",
};

bool starts_with(const std::string& name, const char* prefix) { return name.rfind(prefix, 0) == 0; }

template <size_t N>
bool starts_with_any(const std::string& name, const char* const (&prefixes)[N]) {
  return std::any_of(std::begin(prefixes), std::end(prefixes), [&](const char* p) { return starts_with(name, p); });
}

// The record of an operator that fakecuda_sweep() has replaced.
struct Replaced {
  c10::SafeKernelFunction cuda;  // the kernel it had
  bool host_half;
  bool only_writes;  // its results are its arguments: it can be delayed
};
std::map<std::string, Replaced>& replaced() {
  static auto* table = new std::map<std::string, Replaced>;
  return *table;
}
std::set<std::string>& uncovered() {
  static auto* names = new std::set<std::string>;
  return *names;
}

// The CPU's kernel on arguments that lie on the CPU. May run on a thread of the runtime: nothing of the caller's
// state (autocast, autograd, inference mode) may matter.
void compute(const OperatorHandle& op, Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

void append_tensors(const IValue& value, std::vector<Tensor>* tensors) {
  map_tensors(value, [&](const Tensor& tensor) {
    tensors->push_back(tensor);
    return tensor;
  });
}

// A call for later: once with lazy streams, once per replay in a graph.
struct DelayedCall {
  OperatorHandle op;
  std::vector<IValue> arguments;
  std::vector<Tensor> results;  // aliases of what the caller was given; undefined for arguments

  static void run(void* context) {
    auto* call = static_cast<DelayedCall*>(context);
    try {
      c10::InferenceMode normal_mode(false);
      Stack stack(call->arguments.begin(), call->arguments.end());
      compute(call->op, &stack);
      std::vector<Tensor> computed;
      for (const IValue& value : stack) append_tensors(value, &computed);
      for (size_t i = 0; i < call->results.size(); i++) {
        const Tensor& to = call->results[i];
        if (to.defined()) std::memcpy(to.data_ptr(), computed[i].data_ptr(), fake::extent(computed[i]));
      }
    } catch (const std::exception& error) {
      std::fprintf(stderr, "fakecuda: %s failed after its launch: %s\n", toString(call->op.operator_name()).c_str(),
                   error.what());
      std::abort();
    }
  }
  static void drop(void* context) { delete static_cast<DelayedCall*>(context); }
};

// A CPU generator that follows the CUDA generator's seed and offset, so that saved and restored states have the same
// effect as on a GPU. The numbers themselves differ from a GPU's.
at::Generator host_generator(const IValue& given, Device device, int64_t numel) {
  at::Generator source = given.isGenerator() && given.toGenerator().defined()
                             ? given.toGenerator()
                             : at::cuda::detail::getDefaultCUDAGenerator(device.index());
  if (!source.device().is_cuda()) return source;
  auto* cuda = at::check_generator<at::CUDAGeneratorImpl>(source);
  std::lock_guard<std::mutex> lock(cuda->mutex_);
  const uint64_t offset = cuda->philox_offset_per_thread();
  cuda->set_philox_offset_per_thread(offset + 4 * (1 + numel / 2048));
  uint64_t mixed = cuda->current_seed() + 0x9E3779B97F4A7C15ull * (offset + 1);  // splitmix64
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ull;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBull;
  return at::make_generator<at::CPUGeneratorImpl>(mixed ^ (mixed >> 31));
}

bool is_generator(const c10::Argument& argument) {
  return argument.type()->str().find("Generator") != std::string::npos;
}

// Arguments as the CPU's kernel takes them.
std::vector<IValue> to_host(const c10::FunctionSchema& schema, at::ArrayRef<IValue> given, DeviceAliases* aliases) {
  std::vector<IValue> arguments;
  int64_t numel = 1;
  for (const IValue& value : given) {
    if (value.isTensor() && fake::on_cuda(value.toTensor())) numel = std::max(numel, value.toTensor().numel());
    if (value.isDevice() && value.toDevice().is_cuda()) {
      const Device device = value.toDevice();
      aliases->device = device.has_index() ? device : Device(c10::kCUDA, c10::cuda::current_device());
      arguments.push_back(Device(c10::kCPU));
    } else {
      arguments.push_back(map_tensors(value, [&](const Tensor& tensor) { return aliases->host(tensor); }));
    }
  }
  if (!aliases->device) aliases->device = Device(c10::kCUDA, c10::cuda::current_device());
  for (size_t i = 0; i < arguments.size(); i++) {
    if (is_generator(schema.arguments()[i])) arguments[i] = host_generator(arguments[i], *aliases->device, numel);
  }
  return arguments;
}

// Results of a call that is recorded, with the right shapes and no values: the kernel runs on copies of what it writes.
void record(const OperatorHandle& op, std::vector<IValue> arguments, const DeviceAliases& aliases, void* stream,
            Stack* stack) {
  std::vector<std::pair<Tensor, Tensor>> copies;  // copy, the alias it stands for
  Stack trial;
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto* alias_info = op.schema().arguments()[i].alias_info();
    const bool written = alias_info && alias_info->isWrite();
    trial.push_back(!written ? arguments[i] : map_tensors(arguments[i], [&](const Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      copies.emplace_back(tensor.clone(), tensor);
      return copies.back().first;
    }));
  }
  compute(op, &trial);
  auto* call = new DelayedCall{op, std::move(arguments), {}};
  for (const IValue& value : trial) {
    stack->push_back(map_tensors(value, [&](const Tensor& tensor) {
      for (const auto& [copy, alias] : copies) {
        if (tensor.defined() && copy.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) {
          call->results.emplace_back();
          return aliases.original(alias);
        }
      }
      Tensor made = aliases.result(tensor, /*with_values=*/false);
      const bool fresh = fake::on_cuda(made) && !aliases.original(tensor).defined();
      call->results.push_back(fresh ? DeviceAliases().host(made) : Tensor());  // the graph's pool owns the memory
      return made;
    }));
  }
  fakecuda_enqueue(stream, DelayedCall::run, call, DelayedCall::drop);
}

// copy_ touches host memory too. As on a GPU it may return early only where that memory is pinned and the caller
// does not wait.
bool may_be_delayed(const std::string& name, bool only_writes, at::ArrayRef<IValue> given) {
  if (!only_writes) return false;
  if (name != "aten::copy_") return true;
  const Tensor& to = given[0].toTensor();
  const Tensor& from = given[1].toTensor();
  if (to.device() == from.device()) return true;
  if (to.is_cuda() && from.is_cuda()) return false;
  const Tensor& on_host = to.is_cuda() ? from : to;
  return given[2].toBool() && on_host.is_pinned();
}

void run_on_host(const OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const std::string name = toString(op.operator_name());
  const Replaced& known = replaced().at(name);
  const size_t count = op.schema().arguments().size();
  const std::vector<IValue> given(stack->end() - count, stack->end());
  torch::jit::drop(*stack, count);

  if (known.host_half && !fakecuda_any_capture()) {
    Stack copy(given.begin(), given.end());
    fakecuda_begin_op(name.c_str());
    try {
      known.cuda.callBoxed(op, c10::DispatchKeySet(c10::DispatchKey::CUDA), &copy);
    } catch (...) {
      fakecuda_end_op();
      throw;
    }
    fakecuda_end_op();
  }

  DeviceAliases aliases;
  std::vector<IValue> arguments = to_host(op.schema(), given, &aliases);
  const c10::cuda::CUDAGuard guard(*aliases.device);  // a default stream is the current device's
  c10::cuda::CUDAStream current = c10::cuda::getCurrentCUDAStream(aliases.device->index());
  void* stream = current.stream();
  if (fakecuda_any_capture() && fakecuda_is_capturing(stream)) {
    record(op, std::move(arguments), aliases, stream, stack);
    return;
  }
  if (fakecuda_lazy()) {
    if (may_be_delayed(name, known.only_writes, given)) {
      for (const auto& result : op.schema().returns()) {
        // In place: the result is the argument with the same alias set.
        for (size_t i = 0; i < count; i++) {
          const auto* alias_info = op.schema().arguments()[i].alias_info();
          if (alias_info && alias_info->isWrite() && *alias_info == *result.alias_info()) stack->push_back(given[i]);
        }
      }
      for (size_t i = 0; i < count; i++) {  // a launch takes host values with it, unless they are pinned
        arguments[i] = map_tensors(arguments[i], [&](const Tensor& tensor) {
          const bool by_value = tensor.defined() && !aliases.original(tensor).defined() && !tensor.is_pinned();
          return by_value ? tensor.clone() : tensor;
        });
      }
      auto* call = new DelayedCall{op, std::move(arguments), {}};
      fakecuda_enqueue(stream, DelayedCall::run, call, DelayedCall::drop);
      return;
    }
    current.synchronize();
    // A copy between devices is ordered on both.
    for (const IValue& value : given) {
      if (name == "aten::copy_" && value.isTensor() && fake::on_cuda(value.toTensor())) {
        c10::cuda::getCurrentCUDAStream(value.toTensor().device().index()).synchronize();
      }
    }
  }
  Stack work(std::make_move_iterator(arguments.begin()), std::make_move_iterator(arguments.end()));
  compute(op, &work);
  aliases.follow_resized();
  for (const IValue& value : work) {
    stack->push_back(map_tensors(value, [&](const Tensor& tensor) { return aliases.result(tensor, true); }));
  }
}

bool is_view(const c10::FunctionSchema& schema) {
  return std::any_of(schema.returns().begin(), schema.returns().end(),
                     [](const auto& r) { return r.alias_info() && !r.alias_info()->isWrite(); });
}

bool only_writes(const c10::FunctionSchema& schema) {
  bool writes = false;
  for (const auto& argument : schema.arguments()) {
    if (!argument.alias_info() || !argument.alias_info()->isWrite()) continue;
    if (argument.kwarg_only()) return false;  // out=, which may be resized
    writes = true;
  }
  return writes && std::all_of(schema.returns().begin(), schema.returns().end(), [](const auto& result) {
    return result.alias_info() && result.alias_info()->isWrite();
  });
}

bool has_host_kernel(const OperatorHandle& op) {
  using Key = c10::DispatchKey;
  return op.hasKernelForDispatchKey(Key::CPU) || op.hasKernelForDispatchKey(Key::CompositeExplicitAutograd) ||
         op.hasKernelForDispatchKey(Key::CompositeImplicitAutograd) ||
         op.hasKernelForDispatchKey(Key::CompositeExplicitAutogradNonFunctional);
}

void replace(const OperatorHandle& op) {
  const std::string name = toString(op.operator_name());
  static const char* megarl = std::getenv("FAKECUDA_MEGARL");
  const bool own_kernels = starts_with(name, "megarl::") && !(megarl && std::string(megarl) == "cpu");
  if (replaced().count(name) || LEFT_ALONE.count(name) || own_kernels) return;
  if (starts_with_any(name, FOREIGN) || is_view(op.schema())) return;
  const bool copies = name == "aten::copy_";  // one kernel for all devices: on CUDA it would launch
  if (!copies && !op.hasKernelForDispatchKey(c10::DispatchKey::CUDA)) return;
  if (!copies && !has_host_kernel(op)) {
    uncovered().insert(name);
    return;
  }
  uncovered().erase(name);
  replaced().emplace(name, Replaced{op.getComputedKernelForDispatchKey(c10::DispatchKey::CUDA),
                                    starts_with_any(name, HOST_HALF_TOO), only_writes(op.schema())});
  static auto* registrations = new std::vector<c10::RegistrationHandleRAII>;
  registrations->push_back(c10::Dispatcher::singleton().registerImpl(
      op.operator_name(), c10::DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&run_on_host>(),
      std::nullopt, nullptr, "fakecuda"));
}

Tensor host_alias(const Tensor& tensor) { return DeviceAliases().host(tensor); }
TORCH_LIBRARY(fakecuda, m) { m.def("host_alias(Tensor tensor) -> Tensor"); }
TORCH_LIBRARY_IMPL(fakecuda, CUDA, m) { m.impl("host_alias", host_alias); }
}  // namespace

extern "C" void fakecuda_sweep() {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    if (op && op->hasSchema()) replace(*op);
  }
  if (const char* path = std::getenv("FAKECUDA_UNCOVERED")) {
    if (FILE* file = std::fopen(path, "w")) {
      for (const auto& name : uncovered()) std::fprintf(file, "%s\n", name.c_str());
      std::fclose(file);
    }
  }
}
