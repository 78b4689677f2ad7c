// Any operator by its CPU kernel: arguments are swapped for CPU tensors over the same memory, results are swapped back.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "kernels.h"

namespace sim {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

namespace {

// While it lives, the CPU generator is a function of the device generator's (seed, offset), as on the device.
class DeviceRandom {
 public:
  explicit DeviceRandom(at::Generator device) {
    uint64_t seed, offset;
    {
      std::lock_guard<std::mutex> guard(device.mutex());
      seed = device.current_seed();
      offset = device.unsafeGetGeneratorImpl()->get_offset();
      device.set_offset(offset + 4);
    }
    std::lock_guard<std::mutex> guard(cpu_.mutex());
    saved_ = cpu_.get_state();
    cpu_.set_current_seed(offset ? mixed(seed, offset) : seed);
  }
  ~DeviceRandom() {
    std::lock_guard<std::mutex> guard(cpu_.mutex());
    cpu_.set_state(saved_);
  }

 private:
  static uint64_t mixed(uint64_t seed, uint64_t offset) {  // splitmix64
    uint64_t z = seed + offset * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  static std::mutex& one_at_a_time() {
    static std::mutex mutex;
    return mutex;
  }
  std::unique_lock<std::mutex> lock_{one_at_a_time()};
  at::Generator cpu_ = at::detail::getDefaultCPUGenerator();
  Tensor saved_;
};

// Refuses arguments on several devices, as every device of torch does. Over host memory they would just work.
class SameDevice {
 public:
  explicit SameDevice(const std::string& op) : checked_(!takes_cpu_tensors(op)) {}

  void see(const Tensor& tensor) {
    if (!checked_ || !tensor.defined()) return;
    if (tensor.device().is_cpu()) cpu_ = cpu_ || tensor.dim();  // a number may come as a CPU tensor
    if (!tensor.device().is_privateuseone()) return;
    if (device_ && *device_ != tensor.device()) refuse(*device_, tensor.device());
    device_ = tensor.device();
  }
  void see_in_list(const Tensor& tensor) {
    if (checked_ && tensor.defined() && tensor.device().is_privateuseone() && !device_) device_ = tensor.device();
  }
  void done() const {
    if (checked_ && device_ && cpu_) refuse(*device_, c10::Device(c10::kCPU));
  }

 private:
  static bool takes_cpu_tensors(const std::string& op) {
    static const std::set<std::string> names = {
        "aten::copy_",         "aten::_copy_from",   "aten::_copy_from_and_resize", "aten::index",
        "aten::index_put",     "aten::index_put_",   "aten::_index_put_impl_",      "aten::_foreach_copy_",
        "aten::_foreach_copy", "aten::set_",         "aten::_pack_padded_sequence", "aten::ctc_loss",
        "aten::_ctc_loss",     "aten::tensor_split", "aten::_ctc_loss_backward"};
    return names.count(op);
  }
  [[noreturn]] static void refuse(c10::Device a, c10::Device b) {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", a, " and ", b,
                "!");
  }
  bool checked_, cpu_ = false;
  std::optional<c10::Device> device_;
};

bool is_written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

// The arguments of one call, before and after they are swapped.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, Stack& stack)
      : schema_(op.schema()), stack_(stack), base_(stack.size() - schema_.arguments().size()), same_(schema_.name()) {
    original_.assign(stack.begin() + base_, stack.end());
    for (size_t i = 0; i < original_.size(); i++) swap(i);
    same_.done();
    if (!call.device || !call.device->has_index()) call.device = c10::impl::VirtualGuardImpl(NPU).getDevice();
  }

  Call call;
  std::optional<at::Generator> generator;

  void results() {
    for (auto& [npu, cpu] : written_) Call::written(npu, cpu);
    const auto& returns = schema_.returns();
    const size_t first = stack_.size() - returns.size();
    for (size_t i = 0; i < returns.size(); i++) swap_result(returns[i], stack_[first + i]);
  }

 private:
  void swap(size_t i) {
    const IValue& value = original_[i];
    const auto& argument = schema_.arguments()[i];
    IValue& slot = stack_[base_ + i];
    if (value.isTensor()) {
      same_.see(value.toTensor());
      slot = view(value.toTensor(), argument);
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) {
        same_.see_in_list(tensor);
        tensor = view(tensor, argument);
      }
      slot = IValue(std::move(list));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (auto& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::optional<Tensor>(call.view(*tensor)) : std::nullopt);
      slot = IValue(std::move(list));
    } else if (value.isDevice() && value.toDevice().is_privateuseone()) {
      if (!call.device) call.device = value.toDevice();
      slot = IValue(c10::Device(c10::kCPU));
    } else if (value.isGenerator()) {
      generator = value.toGenerator();
      TORCH_CHECK(generator->device().is_privateuseone(), "Expected a 'npu' device type for generator but found '",
                  generator->device().type(), "'");
      slot = IValue();
    } else if (argument.name() == "pin_memory") {
      slot = IValue();
    }
  }

  Tensor view(const Tensor& npu, const c10::Argument& argument) {
    Tensor cpu = call.view(npu);
    if (is_written(argument)) written_.emplace_back(npu, cpu);
    return cpu;
  }

  void swap_result(const c10::Argument& returned, IValue& value) {
    if (is_written(returned)) {
      value = original_[argument_of(returned)];
    } else if (value.isTensor()) {
      value = call.back(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = call.back(tensor);
      value = IValue(std::move(list));
    }
  }

  // The argument that an in-place or out operator returns.
  size_t argument_of(const c10::Argument& returned) const {
    const auto& arguments = schema_.arguments();
    for (size_t i = 0; i < arguments.size(); i++)
      if (is_written(arguments[i]) && arguments[i].alias_info()->beforeSets() == returned.alias_info()->beforeSets())
        return i;
    TORCH_CHECK(false, schema_.name(), " returns an argument that it does not have");
  }

  const c10::FunctionSchema& schema_;
  Stack& stack_;
  size_t base_;
  SameDevice same_;
  std::vector<IValue> original_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

}  // namespace

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  Arguments arguments(op, *stack);
  BelowAutograd guard;
  std::optional<DeviceRandom> random;
  if (arguments.generator)
    random.emplace(*arguments.generator);
  else if (op.hasTag(at::Tag::nondeterministic_seeded))
    random.emplace(at::globalContext().defaultGenerator(*arguments.call.device));
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  arguments.results();
}

}  // namespace sim
