// Replaces the kernels that torch_npu registers for its device. What allocates, or only looks at metadata, stays its
// own.
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using c10::DispatchKey;
using torch::CppFunction;
using torch::jit::Stack;

using Names = std::set<std::string>;

// torch_npu's own kernels that work here as they are: they allocate, look at metadata, or read one number.
const Names& kept() {
  static const Names names = {
      "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "resize_as_", "set_",
      "is_set_to", "is_pinned", "_pin_memory", "record_stream", "_local_scalar_dense",
      "_has_compatible_shallow_copy_type", "_reshape_alias", "view", "as_strided", "_nested_tensor_size",
      // sparse tensors: a pair of strided ones
      "_sparse_coo_tensor_unsafe", "_sparse_coo_tensor_with_dims", "_sparse_coo_tensor_with_dims_and_tensors",
      "_coalesced_", "_dimI", "_dimV", "_nnz", "_values", "_indices", "values", "indices", "sparse_dim", "dense_dim",
      "coalesce", "_coalesce", "is_coalesced", "copy_sparse_to_sparse_", "sparse_resize_", "sparse_resize_and_clear_",
      "_to_dense"};
  return names;
}

// Registered by the register_ functions.
const Names& with_own_kernel() {
  static const Names names = {"copy_",
                              "_copy_from",
                              "_copy_from_and_resize",
                              "histc",
                              "_fused_sdp_choice",
                              "scaled_dot_product_attention",
                              "_thnn_fused_lstm_cell",
                              "_thnn_fused_gru_cell"};
  return names;
}

// Composite kernels call other operators with the device's own tensors, which is what is wanted here.
const Names& composite_preferred() {
  static const Names names = {"_to_copy", "_pack_padded_sequence"};
  return names;
}

template <DispatchKey key>
void call_kernel_of(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  op.callBoxedForDispatchKey(key, *stack);
}

template <auto* kernel>
CppFunction boxed() {
  return CppFunction::makeFromBoxedFunction<kernel>();
}

struct Quiet : c10::WarningHandler {  // of the warnings that a kernel is replaced
  void process(const c10::Warning&) override {}
};

class Installer {
 public:
  Installer()
      : device_(library("aten", DispatchKey::PrivateUse1)),
        autograd_(library("aten", DispatchKey::AutogradPrivateUse1)) {}

  void install() {
    for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
      if (name.name.rfind("aten::", 0) == 0) replace(name);
    auto& npu = library("npu", DispatchKey::PrivateUse1);
    sim::register_copies(device_);
    sim::register_counting(device_);
    sim::register_networks(device_, autograd_);
    sim::register_batch_norm(device_, npu);
    sim::register_npu_operators(npu);
    sim::register_quant(npu);
  }

 private:
  static torch::Library& library(const char* name, DispatchKey key) {
    static std::vector<std::unique_ptr<torch::Library>> libraries;  // for good: kernels go with their library
    libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, name, key, __FILE__, __LINE__));
    return *libraries.back();
  }

  void replace(const c10::OperatorName& name) {
    auto op = c10::Dispatcher::singleton().findSchema(name);
    std::string base = name.name.substr(6), full = name.overload_name.empty() ? base : base + "." + name.overload_name;
    if (!op || with_own_kernel().count(base)) return;
    const bool on_device = op->hasKernelForDispatchKey(DispatchKey::PrivateUse1);
    const bool on_autograd = op->hasKernelForDispatchKey(DispatchKey::AutogradPrivateUse1);
    if (!on_device && !on_autograd) return;
    // Where torch has a CPU kernel beside the composite one (silu_backward), that one is what the CPU would run.
    if (op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) &&
        !op->hasKernelForDispatchKey(DispatchKey::CPU)) {
      device_.impl(full.c_str(), boxed<&call_kernel_of<DispatchKey::CompositeImplicitAutograd>>());
      autograd_.impl(full.c_str(), boxed<&call_kernel_of<DispatchKey::CompositeImplicitAutograd>>());
      return;
    }
    if (kept().count(base) || returns_view(*op) || op->hasTag(at::Tag::inplace_view)) return;
    if (on_autograd && op->hasKernelForDispatchKey(DispatchKey::Autograd))
      autograd_.impl(full.c_str(), boxed<&call_kernel_of<DispatchKey::Autograd>>());
    if (on_device) replace_on_device(*op, base, full);
  }

  void replace_on_device(const c10::OperatorHandle& op, const std::string& base, const std::string& full) {
    if (composite_preferred().count(base))
      device_.impl(full.c_str(), boxed<&call_kernel_of<DispatchKey::CompositeExplicitAutograd>>());
    else if (op.hasComputedKernelForDispatchKey(DispatchKey::CPU))
      device_.impl(full.c_str(), boxed<&sim::run_on_cpu>());
    // An operator without a CPU kernel keeps torch_npu's, which fails naming the operator.
  }

  static bool returns_view(const c10::OperatorHandle& op) {
    for (const auto& value : op.schema().returns())
      if (value.alias_info() && !value.alias_info()->isWrite()) return true;
    return false;
  }

  torch::Library &device_, &autograd_;
};

}  // namespace

// Call it once, after torch_npu was imported. 0 on success.
extern "C" __attribute__((visibility("default"))) int sim_install_kernels() try {
  Quiet quiet;
  c10::WarningUtils::WarningHandlerGuard hush(&quiet);
  Installer().install();
  return 0;
} catch (const std::exception& error) {
  std::cerr << "[simulated NPU] the kernels were not installed: " << error.what() << std::endl;
  return 1;
}
