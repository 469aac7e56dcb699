// libfakecuda_preload.so, for LD_PRELOAD: dlopen of one of NVIDIA's libraries by any path gives the fake one.
//
// cuda-python, FlashInfer and vLLM load libcudart by its path, beside the one that torch has; the real one would crash on
// the fake driver.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

using Open = void* (*)(const char*, int);

constexpr const char* kLibraries[] = {"libcudart.so.13", "libcuda.so.1", "libnvidia-ml.so.1", "libnccl.so.2",
                                      "libcupti.so.13"};

// "libcudart.so" of "/usr/local/cuda/lib64/libcudart.so.13.0.48": which of ours it is, or null.
const char* fake_of(const char* path) {
  static thread_local char redirected[PATH_MAX];
  const char* directory = getenv("FAKECUDA_LIB");
  if (!path || !directory) return nullptr;
  const char* slash = strrchr(path, '/');
  const char* name = slash ? slash + 1 : path;
  for (const char* library : kLibraries) {
    const size_t stem = size_t(strstr(library, ".so") + 3 - library);
    if (strncmp(name, library, stem) != 0 || (name[stem] != 0 && name[stem] != '.')) continue;
    snprintf(redirected, sizeof redirected, "%s/%s", directory, library);
    return redirected;
  }
  return nullptr;
}

}  // namespace

// A tail call: glibc looks at its caller to find the RUNPATH that a name without a slash is searched in, and that must
// be the library that asked, not this one.
extern "C" __attribute__((optimize("O2", "optimize-sibling-calls"))) void* dlopen(const char* path, int flags) {
  static Open real = reinterpret_cast<Open>(dlsym(RTLD_NEXT, "dlopen"));
  const char* fake = fake_of(path);
  if (fake) path = fake;
  return real(path, flags);
}
