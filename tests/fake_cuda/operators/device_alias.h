// CUDA tensors seen as CPU tensors. Fake device memory is host memory, so an alias needs no copy: only another device
// and another dispatch key on the same address. Aliases own nothing, as a kernel's arguments own nothing.
#pragma once
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>

#include <optional>
#include <unordered_map>
#include <vector>

namespace fake {

inline bool on_cuda(const at::Tensor& tensor) { return tensor.defined() && tensor.device().is_cuda(); }

// Bytes from the first to the last element of a tensor of these sizes.
inline size_t extent(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  return at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.dtype().itemsize());
}

// Applies f to every tensor of a boxed value; other values pass.
template <class F>
c10::IValue map_tensors(const c10::IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& tensor : value.toTensorVector()) mapped.push_back(f(tensor));
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      mapped.push_back(tensor ? std::optional<at::Tensor>(f(*tensor)) : std::nullopt);
    }
    return mapped;
  }
  return value;
}

// The aliases of one call.
class DeviceAliases {
 public:
  struct Pair {
    at::Tensor cuda, host;
    std::vector<int64_t> sizes;  // when the alias was made: out= arguments may be resized
    const void* memory;
  };

  std::optional<c10::Device> device;  // of the first CUDA tensor

  at::Tensor host(const at::Tensor& tensor) {
    if (!on_cuda(tensor)) return tensor;
    if (!device) device = tensor.device();
    for (const Pair& pair : pairs_) {
      if (pair.cuda.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) return pair.host;
    }
    // One storage for one storage, so that kernels see overlap where there is overlap.
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto found = storages_.find(storage);
    if (found == storages_.end()) {
      c10::DataPtr data(const_cast<void*>(storage->data()), c10::Device(c10::kCPU));
      c10::Storage borrowed(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data),
                            c10::GetAllocator(c10::kCPU), /*resizable=*/true);
      found = storages_.emplace(storage, std::move(borrowed)).first;
    }
    auto alias = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    auto* impl = alias.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    if (tensor.is_conj()) alias._set_conj(true);
    if (tensor.is_neg()) alias._set_neg(true);
    pairs_.push_back({tensor, alias, tensor.sizes().vec(), found->second.data()});
    return alias;
  }

  // The CUDA tensor whose alias this is; undefined where it is something else.
  at::Tensor original(const at::Tensor& alias) const {
    for (const Pair& pair : pairs_) {
      if (alias.defined() && pair.host.unsafeGetTensorImpl() == alias.unsafeGetTensorImpl()) return pair.cuda;
    }
    return {};
  }

  // A kernel's result as the caller gets it: the argument it is, or device memory of its own.
  at::Tensor result(const at::Tensor& tensor, bool with_values) const {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    if (at::Tensor argument = original(tensor); argument.defined()) return argument;
    c10::cuda::CUDAGuard guard(*device);
    auto options = tensor.options().device(*device).pinned_memory(false);
    auto made = at::empty_strided(tensor.sizes(), tensor.strides(), options);
    if (with_values) std::memcpy(made.data_ptr(), tensor.data_ptr(), extent(tensor));
    return made;
  }

  // out= arguments that the kernel has given another shape or other memory.
  void follow_resized() const {
    for (const Pair& pair : pairs_) {
      const bool moved = pair.host.storage().data() != pair.memory;
      if (!moved && pair.host.sizes() == at::IntArrayRef(pair.sizes)) continue;
      c10::cuda::CUDAGuard guard(pair.cuda.device());
      pair.cuda.resize_(pair.host.sizes());
      pair.cuda.unsafeGetTensorImpl()->set_sizes_and_strides(pair.host.sizes(), pair.host.strides());
      if (moved) std::memcpy(pair.cuda.data_ptr(), pair.host.data_ptr(), extent(pair.host));
    }
  }

 private:
  std::vector<Pair> pairs_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_;
};

}  // namespace fake
