// Launches: checked against the GPU's limits, counted, and passed to a host implementation if there is one.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "core.h"

namespace fakecuda {
namespace {

std::mutex& lock = *new std::mutex;
std::map<std::string, fakecuda_bind>& implementations = *new std::map<std::string, fakecuda_bind>;
thread_local int operators = 0;  // that the caller computes, around this launch

// FAKECUDA_KERNELS: libraries with host implementations; they register themselves when they are loaded.
void load_implementations() {
  static std::once_flag once;
  std::call_once(once, [] {
    const char* libraries = getenv("FAKECUDA_KERNELS");
    std::string rest = libraries ? libraries : "";
    while (!rest.empty()) {
      const size_t colon = rest.find(':');
      const std::string path = rest.substr(0, colon);
      rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
      if (path.empty() || dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) continue;
      fprintf(stderr, "fakecuda: FAKECUDA_KERNELS: %s\n", dlerror());
      abort();
    }
  });
}

fakecuda_bind implementation_of(const std::string& name) {
  load_implementations();
  std::lock_guard<std::mutex> guard(lock);
  auto found = implementations.find(name);
  return found == implementations.end() ? nullptr : found->second;
}

// The limits of compute capability 9.0. Returns the violation, or an empty text.
std::string mistake(const fakecuda_launch& launch, size_t max_shared_bytes) {
  const unsigned *g = launch.grid, *b = launch.block;
  char text[160];
  if (uint64_t(b[0]) * b[1] * b[2] - 1 >= 1024 || b[0] > 1024 || b[1] > 1024 || b[2] > 64)
    snprintf(text, sizeof text, "block (%u, %u, %u): 1 to 1024 threads, at most 64 in z", b[0], b[1], b[2]);
  else if (g[0] - 1 >= 0x7fffffff || g[1] - 1 >= 65535 || g[2] - 1 >= 65535)
    snprintf(text, sizeof text, "grid (%u, %u, %u): at least 1, at most 65535 in y and z", g[0], g[1], g[2]);
  else if (launch.shared_bytes > max_shared_bytes)
    snprintf(text, sizeof text, "%zu bytes of dynamic shared memory, %zu are allowed", launch.shared_bytes, max_shared_bytes);
  else
    return "";
  return text;
}

}  // namespace

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 && text ? text : name;
  free(text);
  return result;
}

}  // namespace fakecuda

using namespace fakecuda;

extern "C" {

void fakecuda_begin_op(const char*) { operators++; }
void fakecuda_end_op() { operators--; }

void fakecuda_register_kernel(const char* mangled, fakecuda_bind bind) {
  std::lock_guard<std::mutex> guard(lock);
  implementations[mangled] = bind;
}

void fakecuda_visit_implementations(void (*visit)(void*, const char*), void* context) {
  std::lock_guard<std::mutex> guard(lock);
  for (auto& [name, bind] : implementations) visit(context, name.c_str());
}

int fakecuda_launch_kernel(const char* mangled, const fakecuda_launch* launch, size_t max_shared_bytes, void* stream) {
  static const bool trace = number_setting("FAKECUDA_TRACE", 0) != 0;
  if (trace)
    fprintf(stderr, "fakecuda: %s<<<(%u, %u, %u), (%u, %u, %u), %zu>>>\n", demangled(mangled).c_str(), launch->grid[0],
            launch->grid[1], launch->grid[2], launch->block[0], launch->block[1], launch->block[2], launch->shared_bytes);
  const std::string wrong = mistake(*launch, max_shared_bytes);
  if (!wrong.empty()) {
    fprintf(stderr, "fakecuda: invalid launch of %s: %s\n", demangled(mangled).c_str(), wrong.c_str());
    return fail(launch->shared_bytes > max_shared_bytes ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration);
  }
  fakecuda_count("launches");
  if (fakecuda_bind bind = operators == 0 ? implementation_of(mangled) : nullptr) {
    fakecuda_work work{};
    bind(launch, &work);
    fakecuda_count("launches run on the host");
    fakecuda_enqueue(stream, work.run, work.context, work.drop);
  } else if (operators == 0 && demangled(mangled).find("::spin_kernel(") != std::string::npos) {
    fakecuda_count("launches that only take time");  // torch.cuda._sleep
  } else if (operators == 0) {
    fakecuda_skipped(demangled(mangled).c_str());
  } else {
    fakecuda_count("launches inside an operator");
  }
  return fail(sticky_error());
}

}  // extern "C"
