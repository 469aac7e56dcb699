// Device memory: memfds mapped shared, so that cudaIpc handles can name them. Pinned memory is the same without a
// device that it counts for.
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "core.h"

namespace fakecuda {
namespace {

std::mutex& lock = *new std::mutex;
using Guard = std::lock_guard<std::mutex>;
std::map<uintptr_t, Block>& blocks = *new std::map<uintptr_t, Block>;
constexpr size_t kPage = 2 << 20;

std::map<uintptr_t, Block>::iterator block_at(const void* address) {
  auto after = blocks.upper_bound(uintptr_t(address));
  if (after == blocks.begin()) return blocks.end();
  --after;
  return uintptr_t(address) < after->first + after->second.size ? after : blocks.end();
}

// Each block keeps a file open; with the usual limit of 1024, memory would seem full.
void raise_file_limit() {
  static std::once_flag once;
  std::call_once(once, [] {
    rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  });
}

// FAKECUDA_POISON=1: new device memory holds NaNs, as a card's memory may, not the zeros of a fresh file.
bool poison() {
  static const bool setting = number_setting("FAKECUDA_POISON", 0) != 0;
  return setting;
}

}  // namespace

cudaError_t allocate(void** out, size_t size, Kind kind) {
  *out = nullptr;
  if (sticky_error()) return sticky_error();
  if (visible().empty()) return fail(cudaErrorNoDevice);
  if (size == 0) return cudaSuccess;
  const size_t rounded = (size + kPage - 1) / kPage * kPage;
  const bool on_device = kind != Kind::kPinned;
  const int physical = visible()[current_device()];
  if (on_device && !fakecuda_charge(physical, long(rounded))) return fail(cudaErrorMemoryAllocation);
  raise_file_limit();
  const int file = memfd_create("fakecuda", MFD_CLOEXEC);
  void* memory = MAP_FAILED;
  if (file >= 0 && ftruncate(file, off_t(rounded)) == 0)
    memory = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (memory == MAP_FAILED) {
    if (file >= 0) close(file);
    if (on_device) fakecuda_charge(physical, -long(rounded));
    return fail(cudaErrorMemoryAllocation);
  }
  if (on_device && poison()) memset(memory, 0xff, rounded);
  add_block(memory, {rounded, current_device(), file, kind, false});
  fakecuda_count(on_device ? "cudaMalloc" : "cudaHostAlloc");
  *out = memory;
  return cudaSuccess;
}

cudaError_t release(void* base) {
  if (!base) return cudaSuccess;
  Block block;
  {
    Guard guard(lock);
    auto found = blocks.find(uintptr_t(base));
    if (found == blocks.end()) return fail(cudaErrorInvalidValue);
    block = found->second;
    blocks.erase(found);
  }
  munmap(base, block.size);
  if (block.file >= 0) close(block.file);
  if (block.kind != Kind::kPinned && !block.foreign) fakecuda_charge(visible()[block.device], -long(block.size));
  return cudaSuccess;
}

bool find_block(const void* address, uintptr_t* base, Block* block) {
  Guard guard(lock);
  auto found = block_at(address);
  if (found == blocks.end()) return false;
  if (base) *base = found->first;
  if (block) *block = found->second;
  return true;
}

bool is_pageable(const void* address) { return !find_block(address, nullptr, nullptr); }

void add_block(void* base, Block block) {
  Guard guard(lock);
  blocks[uintptr_t(base)] = block;
}
void remove_block(void* base) {
  Guard guard(lock);
  blocks.erase(uintptr_t(base));
}

cudaError_t copy(void* to, const void* from, size_t bytes, Stream* stream) {
  if (bytes == 0) return cudaSuccess;
  if (stream->capture || !lazy()) {
    enqueue(stream, [=] { memmove(to, from, bytes); });
    return cudaSuccess;
  }
  if (is_pageable(from)) {
    auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
    enqueue(stream, [=] { memcpy(to, staged->data(), bytes); });
  } else {
    enqueue(stream, [=] { memmove(to, from, bytes); });
  }
  if (is_pageable(to)) wait_stream(stream);
  return sticky_error();
}

}  // namespace fakecuda

extern "C" void fakecuda_visit_memory(void (*visit)(void*, void*, size_t), void* context) {
  std::map<uintptr_t, fakecuda::Block> copy;
  {
    fakecuda::Guard guard(fakecuda::lock);
    copy = fakecuda::blocks;
  }
  for (auto& [base, block] : copy) visit(context, reinterpret_cast<void*>(base), block.size);
}
