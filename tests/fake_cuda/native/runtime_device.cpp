// libcudart.so.13: devices, errors, and queries to the driver.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "core.h"

using namespace fakecuda;

namespace {

bool exists(int device) { return fakecuda_visible(device) >= 0; }

// The newest version of a driver function: cuDeviceTotalMem is exported as cuDeviceTotalMem_v2.
void* driver_function(const char* name) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (!driver) return nullptr;
  for (const char* suffix : {"_v3", "_v2", ""})
    if (void* function = dlsym(driver, (std::string(name) + suffix).c_str())) return function;
  return nullptr;
}

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorAssert, "cudaErrorAssert", "device-side assert triggered"},
    {cudaErrorPeerAccessAlreadyEnabled, "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
};
const ErrorText* text_of(cudaError_t error) {
  for (const ErrorText& e : kErrors)
    if (e.error == error) return &e;
  return nullptr;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = int(visible().size());
  return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) { return set_current_device(device); }
cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return visible().empty() ? fail(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return exists(device) ? cudaSuccess : fail(cudaErrorInvalidDevice);
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return last_error(true); }
cudaError_t cudaPeekAtLastError() { return last_error(false); }
const char* cudaGetErrorString(cudaError_t error) {
  const ErrorText* e = text_of(error);
  return e ? e->text : "an error of the fake CUDA runtime";
}
const char* cudaGetErrorName(cudaError_t error) {
  const ErrorText* e = text_of(error);
  return e ? e->name : "cudaErrorUnknown";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!exists(device)) return fail(cudaErrorInvalidDevice);
  *value = fakecuda_attribute(attribute, fakecuda_visible(device));
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (!exists(device)) return fail(cudaErrorInvalidDevice);
  const int physical = fakecuda_visible(device);
  auto get = [physical](cudaDeviceAttr attribute) { return fakecuda_attribute(attribute, physical); };
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", fakecuda_device_name());
  fakecuda_uuid(reinterpret_cast<unsigned char*>(&p->uuid), physical);
  p->totalGlobalMem = fakecuda_capacity();
  p->sharedMemPerBlock = get(cudaDevAttrMaxSharedMemoryPerBlock);
  p->regsPerBlock = get(cudaDevAttrMaxRegistersPerBlock);
  p->warpSize = get(cudaDevAttrWarpSize);
  p->memPitch = get(cudaDevAttrMaxPitch);
  p->maxThreadsPerBlock = get(cudaDevAttrMaxThreadsPerBlock);
  const cudaDeviceAttr block[] = {cudaDevAttrMaxBlockDimX, cudaDevAttrMaxBlockDimY, cudaDevAttrMaxBlockDimZ};
  const cudaDeviceAttr grid[] = {cudaDevAttrMaxGridDimX, cudaDevAttrMaxGridDimY, cudaDevAttrMaxGridDimZ};
  for (int i = 0; i < 3; i++) {
    p->maxThreadsDim[i] = get(block[i]);
    p->maxGridSize[i] = get(grid[i]);
  }
  p->totalConstMem = get(cudaDevAttrTotalConstantMemory);
  p->major = get(cudaDevAttrComputeCapabilityMajor);
  p->minor = get(cudaDevAttrComputeCapabilityMinor);
  p->textureAlignment = get(cudaDevAttrTextureAlignment);
  p->multiProcessorCount = get(cudaDevAttrMultiProcessorCount);
  p->canMapHostMemory = get(cudaDevAttrCanMapHostMemory);
  p->concurrentKernels = get(cudaDevAttrConcurrentKernels);
  p->ECCEnabled = get(cudaDevAttrEccEnabled);
  p->pciBusID = get(cudaDevAttrPciBusId);
  p->asyncEngineCount = get(cudaDevAttrAsyncEngineCount);
  p->unifiedAddressing = get(cudaDevAttrUnifiedAddressing);
  p->memoryBusWidth = get(cudaDevAttrGlobalMemoryBusWidth);
  p->l2CacheSize = get(cudaDevAttrL2CacheSize);
  p->persistingL2CacheMaxSize = 32 << 20;
  p->maxThreadsPerMultiProcessor = get(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->streamPrioritiesSupported = get(cudaDevAttrStreamPrioritiesSupported);
  p->globalL1CacheSupported = get(cudaDevAttrGlobalL1CacheSupported);
  p->localL1CacheSupported = get(cudaDevAttrLocalL1CacheSupported);
  p->sharedMemPerMultiprocessor = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerMultiprocessor = get(cudaDevAttrMaxRegistersPerMultiprocessor);
  p->managedMemory = get(cudaDevAttrManagedMemory);
  p->computePreemptionSupported = get(cudaDevAttrComputePreemptionSupported);
  p->cooperativeLaunch = get(cudaDevAttrCooperativeLaunch);
  p->sharedMemPerBlockOptin = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->maxBlocksPerMultiProcessor = get(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->reservedSharedMemPerBlock = get(cudaDevAttrReservedSharedMemoryPerBlock);
  p->hostRegisterSupported = get(cudaDevAttrHostRegisterSupported);
  p->memoryPoolsSupported = get(cudaDevAttrMemoryPoolsSupported);
  p->ipcEventSupported = get(cudaDevAttrIpcEventSupport);
  p->clusterLaunch = get(cudaDevAttrClusterLaunch);
  p->unifiedFunctionPointers = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  if (!exists(device)) return fail(cudaErrorInvalidDevice);
  snprintf(text, size, "00000000:%02X:00.0", fakecuda_attribute(cudaDevAttrPciBusId, fakecuda_visible(device)));
  return cudaSuccess;
}
cudaError_t cudaDeviceGetByPCIBusId(int* device, const char* text) {
  for (int i = 0; exists(i); i++) {
    char own[32];
    cudaDeviceGetPCIBusId(own, sizeof own, i);
    if (strcasecmp(own + (strlen(text) < strlen(own) ? strlen(own) - strlen(text) : 0), text) == 0) {
      *device = i;
      return cudaSuccess;
    }
  }
  return fail(cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  if (!exists(device) || !exists(peer)) return fail(cudaErrorInvalidDevice);
  *can = device != peer;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr, int, int) {
  *value = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  fakecuda_count("cudaDeviceSynchronize");
  wait_device(current_device());
  return fail(sticky_error());
}
cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit) {
  *value = 1024;
  return cudaSuccess;
}
cudaError_t cudaDeviceReset() {
  wait_device(current_device());
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = driver_function(name);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : fail(cudaErrorInvalidValue);
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(name, function, 13000, flags, status);
}

}  // extern "C"
