// Device tensors seen as CPU tensors, and back.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/Resize.h>

#include "kernels.h"

namespace sim {

using at::Tensor;

BelowAutograd::BelowAutograd() : autocast(c10::autocast_dispatch_keyset) {}

static void copy_bytes(const Tensor& from, const Tensor& to) {  // of the same sizes and strides
  size_t size = at::detail::computeStorageNbytes(from.sizes(), from.strides(), from.element_size());
  if (from.numel()) memcpy(const_cast<void*>(to.const_data_ptr()), from.const_data_ptr(), size);
}

static c10::Storage on_cpu(const c10::Storage& storage) {
  c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
}

Tensor Call::view(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.device().is_privateuseone()) return tensor;
  if (!device) device = tensor.device();
  auto* key = tensor.storage().unsafeGetStorageImpl();
  auto found = storages_.find(key);
  if (found == storages_.end()) found = storages_.emplace(key, Storage{on_cpu(tensor.storage()), tensor}).first;
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second.cpu),
                                                         c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = view.unsafeGetTensorImpl();
  impl->set_storage_offset(tensor.storage_offset());
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) view._set_conj(true);
  if (tensor.is_neg()) view._set_neg(true);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return view;
}

Tensor Call::back(const Tensor& result) {
  if (!result.defined() || !result.device().is_cpu() || result.layout() != at::kStrided) return result;
  for (auto& [key, storage] : storages_)
    if (storage.cpu.is_alias_of(result.storage()))
      return at::as_strided(storage.npu, result.sizes(), result.strides(), result.storage_offset());
  Tensor source = result.is_conj() || result.is_neg() ? result.resolve_conj().resolve_neg() : result;
  auto options = source.options().device(*device).pinned_memory(false);
  Tensor npu = at::empty_strided(source.sizes(), source.strides(), options);
  copy_bytes(source, npu);
  return npu;
}

void Call::written(const Tensor& npu, const Tensor& cpu) {
  if (!npu.defined() || !npu.device().is_privateuseone()) return;
  bool same_shape =
      cpu.sizes() == npu.sizes() && cpu.strides() == npu.strides() && cpu.storage_offset() == npu.storage_offset();
  if (same_shape && cpu.storage().data() == npu.storage().data()) return;
  npu.resize_(cpu.sizes());
  if (npu.strides() != cpu.strides()) npu.as_strided_(cpu.sizes(), cpu.strides());
  if (cpu.storage().data() != npu.storage().data()) copy_bytes(cpu, npu);
}

}  // namespace sim
