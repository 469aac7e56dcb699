// libcuda.so.1: the functions that torch, vLLM, triton and cuda-python call; the remaining ones are generated.
#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "core.h"

using namespace fakecuda;

namespace {

int device_count() { return int(visible().size()); }
CUresult result_of(cudaError_t error) { return CUresult(error); }  // the numbers agree

// A context is a device here: context n + 1 is the primary context of device n.
CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(intptr_t(device) + 1); }
int device_of(CUcontext context) { return int(reinterpret_cast<intptr_t>(context)) - 1; }

// Physical memory of the virtual memory functions. Counts for its device until the handle is released and every
// mapping is gone.
struct Physical {
  int file, device;  // device -1: memory of the host, or another process's
  size_t size;
  Kind kind;
  ~Physical() {
    close(file);
    if (device >= 0) fakecuda_charge(visible()[device], -long(size));
  }
};
using Handle = std::shared_ptr<Physical>;
std::mutex& lock = *new std::mutex;
std::map<CUdeviceptr, Handle>& mapped = *new std::map<CUdeviceptr, Handle>;

struct Module {};
struct Function {
  std::string name;
  size_t max_shared_bytes = 48 << 10;
};
Function* function_of(CUfunction function) { return reinterpret_cast<Function*>(function); }

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return device_count() ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = device_count();
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < device_count() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  snprintf(name, size, "%s", fakecuda_device_name());
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  fakecuda_uuid(reinterpret_cast<unsigned char*>(uuid), fakecuda_visible(device));
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
  *bytes = fakecuda_capacity();
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = fakecuda_attribute(int(attribute), fakecuda_visible(device));
  return CUDA_SUCCESS;
}
CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
  cuDeviceGetAttribute(major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  return cuDeviceGetAttribute(minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
}
CUresult cuDeviceGetPCIBusId(char* text, int size, CUdevice device) {
  snprintf(text, size, "00000000:%02X:00.0", 0x10 + fakecuda_visible(device));
  return CUDA_SUCCESS;
}
CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  *can = device != peer;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = context_of(current_device());
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  return context ? result_of(set_current_device(device_of(context))) : CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) { return cuCtxSetCurrent(context); }
CUresult cuCtxPopCurrent_v2(CUcontext* context) { return context ? cuCtxGetCurrent(context) : CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device();
  return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize() {
  wait_device(current_device());
  return result_of(sticky_error());
}
CUresult cuStreamSynchronize(CUstream stream) {
  if (lazy()) wait_stream(stream_of(stream));
  return result_of(sticky_error());
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = fakecuda_is_capturing(stream) ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  static thread_local char buffer[64];
  snprintf(buffer, sizeof buffer, error == CUDA_SUCCESS ? "no error" : "error %d of the fake CUDA driver", int(error));
  *text = buffer;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** name) { return cuGetErrorString(error, name); }

CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
  static void* self = dlopen("libcuda.so.1", RTLD_NOW);
  *function = nullptr;
  for (const char* suffix : {"_v3", "_v2", ""})
    if (!*function) *function = dlsym(self, (std::string(name) + suffix).c_str());
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// The private tables that a statically linked libcudart (cuda-python's) starts from: it then reports an error.
CUresult cuGetExportTable(const void** table, const CUuuid*) {
  *table = nullptr;
  return CUDA_ERROR_NOT_FOUND;
}

// ---- memory ------------------------------------------------------------------------------------------------------------
CUresult cuPointerGetAttribute(void* out, CUpointer_attribute attribute, CUdeviceptr p) {
  Block block;
  uintptr_t base = 0;
  if (!find_block(reinterpret_cast<void*>(p), &base, &block)) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<int*>(out) = block.kind == Kind::kPinned ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(out) = block.device;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *static_cast<CUcontext*>(out) = context_of(block.device);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      *static_cast<CUdeviceptr*>(out) = p;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *static_cast<CUdeviceptr*>(out) = base;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *static_cast<size_t*>(out) = block.size;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      *static_cast<int*>(out) = block.kind == Kind::kManaged;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr p) {
  Block block;
  uintptr_t start;
  if (!find_block(reinterpret_cast<void*>(p), &start, &block)) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = start;
  if (size) *size = block.size;
  return CUDA_SUCCESS;
}
CUresult cuMemGetInfo_v2(size_t* available, size_t* total) {
  *total = fakecuda_capacity();
  *available = *total - std::min(*total, fakecuda_used(fakecuda_visible(current_device())));
  return CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr* p, size_t size) {
  return result_of(allocate(reinterpret_cast<void**>(p), size, Kind::kDevice));
}
CUresult cuMemFree_v2(CUdeviceptr p) {
  wait_device(-1);
  return result_of(release(reinterpret_cast<void*>(p)));
}
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream stream) {
  return result_of(copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), n, stream_of(stream)));
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream stream) {
  return cuMemcpyAsync(to, from, n, stream);
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t n) {
  copy(reinterpret_cast<void*>(to), from, n, stream_of(nullptr));
  if (lazy()) wait_stream(stream_of(nullptr));
  return result_of(sticky_error());
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t n) {
  copy(to, reinterpret_cast<void*>(from), n, stream_of(nullptr));
  if (lazy()) wait_stream(stream_of(nullptr));
  return result_of(sticky_error());
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t n, CUstream stream) {
  enqueue(stream_of(stream), [=] { memset(reinterpret_cast<void*>(to), value, n); });
  return CUDA_SUCCESS;
}

// ---- virtual memory: address space is reserved, memfds are the memory behind it ---------------------------------------
CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = 2 << 20;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr* p, size_t size, size_t, CUdeviceptr, unsigned long long) {
  void* memory = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *p = reinterpret_cast<CUdeviceptr>(memory);
  return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr p, size_t size) {
  munmap(reinterpret_cast<void*>(p), size);
  return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* properties,
                     unsigned long long) {
  const int device = properties && properties->location.type == CU_MEM_LOCATION_TYPE_DEVICE ? properties->location.id : -1;
  if (device >= 0 && !fakecuda_charge(visible().at(device), long(size))) return CUDA_ERROR_OUT_OF_MEMORY;
  const int file = memfd_create("fakecuda-physical", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, off_t(size)) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
  fakecuda_count("cuMemCreate");
  *handle = reinterpret_cast<CUmemGenericAllocationHandle>(new Handle(new Physical{file, device, size, device < 0 ? Kind::kPinned : Kind::kDevice}));
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  delete reinterpret_cast<Handle*>(handle);
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr p, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long) {
  const Handle physical = *reinterpret_cast<Handle*>(handle);
  void* at = reinterpret_cast<void*>(p);
  if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file, off_t(offset)) == MAP_FAILED)
    return CUDA_ERROR_INVALID_VALUE;
  add_block(at, {size, physical->device < 0 ? current_device() : physical->device, -1, physical->kind, true});
  std::lock_guard<std::mutex> guard(lock);
  mapped[p] = physical;
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr p, size_t size) {
  fakecuda_count("cuMemUnmap");
  mmap(reinterpret_cast<void*>(p), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  std::lock_guard<std::mutex> guard(lock);
  for (auto it = mapped.lower_bound(p); it != mapped.end() && it->first < p + size;) {
    remove_block(reinterpret_cast<void*>(it->first));
    it = mapped.erase(it);
  }
  return CUDA_SUCCESS;
}
CUresult cuMemExportToShareableHandle(void* out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,
                                      unsigned long long) {
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
  *static_cast<int*>(out) = dup((*reinterpret_cast<Handle*>(handle))->file);
  return CUDA_SUCCESS;
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* given,
                                        CUmemAllocationHandleType type) {
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
  const int file = dup(int(reinterpret_cast<intptr_t>(given)));
  if (file < 0) return CUDA_ERROR_INVALID_VALUE;
  *handle = reinterpret_cast<CUmemGenericAllocationHandle>(new Handle(new Physical{file, -1, 0, Kind::kDevice}));
  return CUDA_SUCCESS;
}

// ---- kernels that triton and others load themselves ------------------------------------------------------------------
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = reinterpret_cast<CUmodule>(new Module);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(new Function{name});
  return CUDA_SUCCESS;
}
CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                           unsigned) {
  *library = reinterpret_cast<CUlibrary>(new Module);
  return CUDA_SUCCESS;
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) {
  *kernel = reinterpret_cast<CUkernel>(new Function{name});
  return CUDA_SUCCESS;
}
CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  *function = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) function_of(function)->max_shared_bytes = size_t(value);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** arguments, void**) {
  const fakecuda_launch launch{{gx, gy, gz}, {bx, by, bz}, shared, arguments};
  const Function* f = function_of(function);
  return result_of(cudaError_t(fakecuda_launch_kernel(f->name.c_str(), &launch, f->max_shared_bytes, stream)));
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void** extra) {
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, arguments, extra);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
  *blocks = 2;
  return CUDA_SUCCESS;
}

}  // extern "C"
