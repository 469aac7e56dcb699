// libcudart.so.13: memory, memory pools, copies and handles for other processes.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "core.h"

using namespace fakecuda;

namespace {

// Contents of a cudaIpcMemHandle_t: where to find the memory's file.
struct MemoryHandle {
  int pid, file, device;
  size_t size;
  bool operator<(const MemoryHandle& o) const {
    return std::tie(pid, file, device, size) < std::tie(o.pid, o.file, o.device, o.size);
  }
};
static_assert(sizeof(MemoryHandle) <= sizeof(cudaIpcMemHandle_t));
struct Opened {
  void* base;
  int count;
};
std::mutex& handles_lock = *new std::mutex;
std::map<MemoryHandle, Opened>& opened = *new std::map<MemoryHandle, Opened>;

void* map_foreign(const MemoryHandle& handle) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.file);
  const int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  void* memory = mmap(nullptr, handle.size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return memory == MAP_FAILED ? nullptr : memory;
}

cudaError_t free_after_work(void* memory) {
  if (!memory) return cudaSuccess;
  wait_device(-1);  // cudaFree waits for the device
  return release(memory);
}

// A memory pool counts and allocates directly: fragmentation and reuse are not emulated.
struct Pool {
  unsigned long long threshold = 0;
};
Pool* pool_of(int device) {
  static auto& pools = *new std::map<int, Pool*>;
  std::lock_guard<std::mutex> guard(handles_lock);
  Pool*& pool = pools[device];
  if (!pool) pool = new Pool;
  return pool;
}

cudaError_t set(Stream* stream, void* to, int value, size_t bytes) {
  enqueue(stream, [=] {
    if (bytes) memset(to, value, bytes);
  });
  return cudaSuccess;
}

cudaError_t copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                      Stream* stream) {
  for (size_t row = 0; row < height; row++)
    copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width, stream);
  return sticky_error();
}


}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** p, size_t n) { return allocate(p, n, Kind::kDevice); }
cudaError_t cudaMallocManaged(void** p, size_t n, unsigned) { return allocate(p, n, Kind::kManaged); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return allocate(p, n, Kind::kPinned); }
cudaError_t cudaMallocHost(void** p, size_t n) { return allocate(p, n, Kind::kPinned); }
cudaError_t cudaMallocPitch(void** p, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return allocate(p, *pitch * height, Kind::kDevice);
}
cudaError_t cudaFree(void* p) { return free_after_work(p); }
cudaError_t cudaFreeHost(void* p) { return free_after_work(p); }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  if (!is_pageable(p)) return fail(cudaErrorHostMemoryAlreadyRegistered);
  add_block(p, {n, current_device(), -1, Kind::kPinned, true});
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  uintptr_t base;
  if (!find_block(p, &base, nullptr) || base != uintptr_t(p)) return fail(cudaErrorHostMemoryNotRegistered);
  wait_device(-1);
  remove_block(p);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  if (visible().empty()) return fail(cudaErrorNoDevice);
  *total = fakecuda_capacity();
  *available = *total - std::min(*total, fakecuda_used(visible()[current_device()]));
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return allocate(p, n, Kind::kDevice); }
cudaError_t cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t, cudaStream_t) {
  return allocate(p, n, Kind::kDevice);
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  if (p && is_pageable(p)) return fail(cudaErrorInvalidValue);
  enqueue(stream_of(stream), [p] { release(p); });
  return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  *pool = reinterpret_cast<cudaMemPool_t>(pool_of(device));
  return cudaSuccess;
}
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) { return cudaDeviceGetDefaultMemPool(pool, device); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = reinterpret_cast<cudaMemPool_t>(new Pool);
  return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  delete reinterpret_cast<Pool*>(pool);
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  if (attribute == cudaMemPoolAttrReleaseThreshold)
    reinterpret_cast<Pool*>(pool)->threshold = *static_cast<unsigned long long*>(value);
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  if (attribute < cudaMemPoolAttrReleaseThreshold) {
    *static_cast<int*>(value) = 1;
    return cudaSuccess;
  }
  *static_cast<unsigned long long*>(value) = attribute == cudaMemPoolAttrReleaseThreshold
                                                 ? reinterpret_cast<Pool*>(pool)->threshold
                                                 : fakecuda_used(visible()[current_device()]);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  fakecuda_count("cudaMemcpy");
  Stream* stream = stream_of(nullptr);
  copy(to, from, n, stream);
  if (lazy()) wait_stream(stream);
  return fail(sticky_error());
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t stream) {
  fakecuda_count("cudaMemcpyAsync");
  return fail(copy(to, from, n, stream_of(stream)));
}
cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t n) {
  return cudaMemcpy(to, from, n, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind) {
  copy_rows(to, to_pitch, from, from_pitch, width, height, stream_of(nullptr));
  if (lazy()) wait_stream(stream_of(nullptr));
  return fail(sticky_error());
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return fail(copy_rows(to, to_pitch, from, from_pitch, width, height, stream_of(stream)));
}
cudaError_t cudaMemset(void* to, int value, size_t n) { return set(stream_of(nullptr), to, value, n); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t stream) {
  return set(stream_of(stream), to, value, n);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t n, size_t offset, cudaMemcpyKind) {
  memcpy(static_cast<char*>(const_cast<void*>(symbol)) + offset, from, n);
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  *address = const_cast<void*>(symbol);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  Block block;
  if (!find_block(p, nullptr, &block)) {
    a->type = cudaMemoryTypeUnregistered;
    a->device = -1;
    a->hostPointer = const_cast<void*>(p);
    return cudaSuccess;
  }
  a->type = block.kind == Kind::kDevice   ? cudaMemoryTypeDevice
            : block.kind == Kind::kPinned ? cudaMemoryTypeHost
                                          : cudaMemoryTypeManaged;
  a->device = block.device;
  a->devicePointer = const_cast<void*>(p);
  a->hostPointer = block.kind == Kind::kDevice ? nullptr : const_cast<void*>(p);
  return cudaSuccess;
}

// ---- handles for other processes -------------------------------------------------------------------------------------
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* out, void* p) {
  Block block;
  if (!find_block(p, nullptr, &block) || block.file < 0 || block.kind != Kind::kDevice)
    return fail(cudaErrorInvalidValue);  // so does the real one for memory of the driver's virtual memory functions
  const MemoryHandle handle{getpid(), block.file, visible()[block.device], block.size};
  memset(out, 0, sizeof *out);
  memcpy(out, &handle, sizeof handle);
  fakecuda_count("cudaIpcGetMemHandle");
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** p, cudaIpcMemHandle_t given, unsigned) {
  MemoryHandle handle;
  memcpy(&handle, &given, sizeof handle);
  if (handle.pid == getpid()) return fail(cudaErrorDeviceUninitialized);  // a process may not open its own
  std::lock_guard<std::mutex> guard(handles_lock);
  Opened& entry = opened[handle];
  if (entry.count == 0) {
    entry.base = map_foreign(handle);
    if (!entry.base) {
      opened.erase(handle);
      return fail(cudaErrorMapBufferObjectFailed);
    }
    add_block(entry.base, {handle.size, current_device(), -1, Kind::kDevice, true});
  }
  entry.count++;
  fakecuda_count("cudaIpcOpenMemHandle");
  *p = entry.base;
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void* p) {
  wait_device(-1);
  std::lock_guard<std::mutex> guard(handles_lock);
  for (auto it = opened.begin(); it != opened.end(); ++it) {
    if (it->second.base != p) continue;
    if (--it->second.count == 0) {
      opened.erase(it);
      return release(p);
    }
    return cudaSuccess;
  }
  return fail(cudaErrorInvalidValue);
}

}  // extern "C"
