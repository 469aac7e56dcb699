// libcudart.so.13: how compiled CUDA code registers its kernels and launches them.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "core.h"

using namespace fakecuda;

namespace {

struct Kernel {
  std::string name;
  size_t max_shared_bytes = 48 << 10;  // more must be asked for with cudaFuncSetAttribute
};
std::mutex& lock = *new std::mutex;
std::map<const void*, Kernel>& kernels = *new std::map<const void*, Kernel>;

Kernel kernel_of(const void* function) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = kernels.find(function);
  return found == kernels.end() ? Kernel{"(unregistered kernel)"} : found->second;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  const Kernel kernel = kernel_of(function);
  const fakecuda_launch described{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, arguments};
  return cudaError_t(fakecuda_launch_kernel(kernel.name.c_str(), &described, kernel.max_shared_bytes, stream));
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local Configuration configuration;  // of the launch being made: <<<...>>> pushes, the kernel's stub pops

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  std::lock_guard<std::mutex> guard(lock);
  kernels[function].name = name;
}
// Calls visit with the mangled name of every registered kernel.
void fakecuda_visit_kernels(void (*visit)(void*, const char*), void* context) {
  std::lock_guard<std::mutex> guard(lock);
  for (auto& [function, kernel] : kernels) visit(context, kernel.name.c_str());
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** arguments) {
  return launch(function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > fakecuda_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 0))
    return fail(cudaErrorInvalidValue);
  std::lock_guard<std::mutex> guard(lock);
  kernels[function].max_shared_bytes = std::max<size_t>(48 << 10, size_t(value));
  return cudaSuccess;
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute attribute, int value, int) {
  return cudaFuncSetAttribute(kernel, attribute, value);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 10 * fakecuda_attribute(cudaDevAttrComputeCapabilityMajor, 0);
  attributes->maxDynamicSharedSizeBytes = int(kernel_of(function).max_shared_bytes);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t) {
  *blocks = std::clamp(2048 / std::max(threads, 1), 1, 32);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 32;
  return cudaSuccess;
}
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* symbol) {
  *function = static_cast<cudaFunction_t>(const_cast<void*>(symbol));
  return cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  static const char anchors[1024] = {};
  static int used = 0;
  std::lock_guard<std::mutex> guard(lock);
  const void* anchor = &anchors[used++ % 1024];
  kernels[anchor].name = name;
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(anchor));
  return cudaSuccess;
}

}  // extern "C"
