// The emulated GPU: an H100 SXM. FAKECUDA_CAPABILITY changes its compute capability alone.
#include <cstdlib>
#include <cstring>

#include "core.h"

namespace {

struct Value {
  int attribute, value;
};
constexpr int kKiB = 1024;
constexpr Value kValues[] = {
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxBlockDimX, 1024},
    {cudaDevAttrMaxBlockDimY, 1024},
    {cudaDevAttrMaxBlockDimZ, 64},
    {cudaDevAttrMaxGridDimX, 0x7fffffff},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMaxSharedMemoryPerBlock, 48 * kKiB},
    {cudaDevAttrTotalConstantMemory, 64 * kKiB},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMaxPitch, 0x7fffffff},
    {cudaDevAttrMaxRegistersPerBlock, 65536},
    {cudaDevAttrClockRate, 1980000},
    {cudaDevAttrTextureAlignment, 512},
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrCanMapHostMemory, 1},
    {cudaDevAttrConcurrentKernels, 1},
    {cudaDevAttrEccEnabled, 1},
    {cudaDevAttrMemoryClockRate, 2619000},
    {cudaDevAttrGlobalMemoryBusWidth, 5120},
    {cudaDevAttrL2CacheSize, 50 * kKiB * kKiB},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrAsyncEngineCount, 3},
    {cudaDevAttrUnifiedAddressing, 1},
    {cudaDevAttrStreamPrioritiesSupported, 1},
    {cudaDevAttrGlobalL1CacheSupported, 1},
    {cudaDevAttrLocalL1CacheSupported, 1},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * kKiB},
    {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
    {cudaDevAttrManagedMemory, 1},
    {cudaDevAttrComputePreemptionSupported, 1},
    {cudaDevAttrCooperativeLaunch, 1},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 * kKiB},
    {cudaDevAttrHostRegisterSupported, 1},
    {102, 1},  // virtual memory management (the driver has names for these two)
    {103, 1},  // its handles as file descriptors
    {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
    {cudaDevAttrReservedSharedMemoryPerBlock, 1 * kKiB},
    {cudaDevAttrMemoryPoolsSupported, 1},
    {cudaDevAttrIpcEventSupport, 1},
    {cudaDevAttrClusterLaunch, 1},
};

}  // namespace

extern "C" {

const char* fakecuda_device_name() { return "NVIDIA H100 80GB HBM3"; }

int fakecuda_attribute(int attribute, int physical) {
  static const char* capability = getenv("FAKECUDA_CAPABILITY");
  if (attribute == cudaDevAttrComputeCapabilityMajor) return capability ? atoi(capability) : 9;
  if (attribute == cudaDevAttrComputeCapabilityMinor) {
    const char* dot = capability ? strchr(capability, '.') : nullptr;
    return dot ? atoi(dot + 1) : 0;
  }
  if (attribute == cudaDevAttrPciBusId) return 0x10 + physical;
  for (const Value& v : kValues)
    if (v.attribute == attribute) return v.value;
  return 0;
}

void fakecuda_uuid(unsigned char* out, int physical) {
  memset(out, 0xfa, 16);
  out[15] = static_cast<unsigned char>(physical);
}

}  // extern "C"
