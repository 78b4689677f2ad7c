// Shared by the files of the simulated kernels.
//
// "Device" memory of the simulated runtime is host memory, so a kernel looks at the very same bytes through a CPU
// tensor: views, strides and writes in place need no copy and cannot be wrong.
#pragma once
#include <ATen/ATen.h>
#include <torch/library.h>

#include <map>
#include <optional>
#include <utility>

namespace sim {

constexpr auto NPU = c10::DeviceType::PrivateUse1;

// The CPU tensors of one call. Tensors that share a storage on the device share one here too.
class Call {
 public:
  // The device of the first device tensor seen, or one set from outside.
  std::optional<c10::Device> device;

  // The same memory as a CPU tensor; what is not on the device stays as it is.
  at::Tensor view(const at::Tensor& tensor);
  // A result of the CPU kernel as a device tensor: a view where it is one of an argument, a copy otherwise.
  at::Tensor back(const at::Tensor& result);
  // After the CPU kernel wrote to an argument: give the device tensor the new size, if it has one.
  static void written(const at::Tensor& npu, const at::Tensor& cpu);

 private:
  struct Storage {
    c10::Storage cpu;
    at::Tensor npu;  // a tensor on the device's storage, to make views from
  };
  std::map<c10::StorageImpl*, Storage> storages_;
};

// While it lives, operators run below autograd and without autocast: the CPU kernel and what it calls.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard autocast;
  BelowAutograd();
};

// fallback.cpp: runs any operator with its CPU kernel.
void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// kernels_*.cpp: what the CPU kernels do not cover.
void register_copies(torch::Library& device);
void register_counting(torch::Library& device);
void register_networks(torch::Library& device, torch::Library& autograd);
void register_batch_norm(torch::Library& device, torch::Library& npu);
void register_npu_operators(torch::Library& npu);
void register_quant(torch::Library& npu);

}  // namespace sim
