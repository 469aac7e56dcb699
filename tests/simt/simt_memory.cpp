// Memory checks of the SIMT executor: every access of a kernel passes through here. See simt.h.
#include <map>

#include "simt_runtime.h"

namespace simt {
namespace {

struct Region {
  const char* low;
  const char* high;
  std::string name;
  bool writable;
  uint64_t bytes_read = 0, bytes_written = 0;
};
std::vector<Region> regions;  // sorted by address, disjoint
size_t last_region = 0;
const char* parameters_low = nullptr;
const char* parameters_high = nullptr;

// ---- shared memory ---------------------------------------------------------------------------------------------------
constexpr size_t kSharedBytes = 256 * 1024;  // arena: more than a block may have, for the gaps between variables
constexpr size_t kGap = 64;                  // bytes between variables: a small overrun hits no neighbour
constexpr uint16_t kNobody = 0xffff, kSeveral = 0xfffe, kAtomics = 0xfffd;

// Who touched a byte of shared memory last. Times are counts of barriers passed plus 1; 0 is never.
struct Shadow {
  uint32_t written = 0, written_in_warp = 0;
  uint32_t read = 0, read_in_warp = 0;
  uint16_t writer = kNobody;
  uint16_t reader = kNobody;       // a thread, or kSeveral
  uint16_t reader_warp = kNobody;  // the warp all readers belong to, or kSeveral
};
struct Variable {
  size_t low, bytes;
  std::string name;
};
alignas(1024) char arena[kSharedBytes];
Shadow shadow[kSharedBytes];
std::vector<Variable> variables;
std::map<const void*, size_t> variable_at;  // declaration site -> offset
size_t arena_used = 0, shared_bytes_used = 0;
uint32_t block_time = 1;
uint32_t warp_time[kWarpSize] = {};

void* place_variable(const char* name, size_t bytes, size_t alignment) {
  const size_t low = (arena_used + kGap + alignment - 1) / alignment * alignment;
  shared_bytes_used += bytes;
  if (shared_bytes_used > 227 * 1024 || low + bytes + kGap > kSharedBytes)
    fail(format("the block's shared memory exceeds 227 KiB at %s", name));
  arena_used = low + bytes;
  variables.push_back({low, bytes, name});
  std::memset(arena + low, 0xcb, bytes);  // poison: a NaN-like pattern, should an unchecked read slip through
  for (size_t i = low; i < low + bytes; ++i) shadow[i] = Shadow{};
  return arena + low;
}

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic update";
}

// `who` touched the byte at `time` (and at `time_in_warp` of its warp): is that ordered before the running thread?
bool ordered(uint32_t time, uint32_t time_in_warp, int who_warp, const Thread& now) {
  if (time < block_time) return true;
  return who_warp == now.warp() && time_in_warp < warp_time[now.warp()];
}

void check_shared(size_t offset, size_t bytes, Access access) {
  const Thread& now = *current_thread;
  const Variable* variable = nullptr;
  for (const Variable& v : variables)
    if (offset >= v.low && offset + bytes <= v.low + v.bytes) variable = &v;
  if (!variable) {
    const Variable* nearest = &variables.front();
    for (const Variable& v : variables)
      if (v.low <= offset) nearest = &v;
    fail(format("out of bounds: %s of %zu bytes at byte %td of shared variable %s (%zu bytes)", verb(access), bytes,
                ptrdiff_t(offset - nearest->low), nearest->name.c_str(), nearest->bytes));
  }
  auto race = [&](const char* earlier, uint16_t who) {
    const std::string other = who < kMaxThreads ? "thread " + std::to_string(who) + " of the block" : "other threads";
    fail(format("data race: %s of byte %zu of shared variable %s, not ordered after the %s by %s", verb(access),
                offset - variable->low, variable->name.c_str(), earlier, other.c_str()));
  };
  for (Shadow* s = shadow + offset; s != shadow + offset + bytes; ++s) {
    if (access != Access::kWrite && s->written == 0)
      fail(format("%s of unwritten byte %zu of shared variable %s", verb(access), size_t(s - shadow) - variable->low,
                  variable->name.c_str()));
    const bool both_atomic = s->writer == kAtomics && access == Access::kAtomic;
    const int writer_warp = s->writer < kMaxThreads ? s->writer / kWarpSize : -1;
    if (s->written && s->writer != now.linear && !both_atomic &&
        !ordered(s->written, s->written_in_warp, writer_warp, now))
      race("write", s->writer);
    if (access == Access::kRead) {
      const bool fresh = s->read < block_time;
      s->reader = fresh || s->reader == now.linear ? uint16_t(now.linear) : kSeveral;
      s->reader_warp = fresh || s->reader_warp == now.warp() ? uint16_t(now.warp()) : kSeveral;
      s->read = block_time;
      s->read_in_warp = warp_time[now.warp()];
      continue;
    }
    if (s->read && s->reader != now.linear && !ordered(s->read, s->read_in_warp, s->reader_warp, now))
      race("read", s->reader);
    s->writer = access == Access::kAtomic ? kAtomics : uint16_t(now.linear);
    s->written = block_time;
    s->written_in_warp = warp_time[now.warp()];
  }
}

// ---- global memory ---------------------------------------------------------------------------------------------------
[[noreturn]] void fail_global(const char* address, size_t bytes, Access access) {
  const Region* nearest = nullptr;
  for (const Region& r : regions) {
    auto distance = [address](const Region& q) { return address < q.low ? q.low - address : address - q.high; };
    if (!nearest || std::abs(distance(r)) < std::abs(distance(*nearest))) nearest = &r;
  }
  if (!nearest) fail(format("out of bounds: %s of %zu bytes at %p", verb(access), bytes, (const void*)address));
  fail(format("out of bounds: %s of %zu bytes at byte %td of buffer %s (%td bytes)", verb(access), bytes,
              address - nearest->low, nearest->name.c_str(), nearest->high - nearest->low));
}

bool contains(const Region& r, const char* address, size_t bytes) {
  return address >= r.low && address + bytes <= r.high;
}

void check_global(const char* address, size_t bytes, Access access) {
  if (last_region >= regions.size() || !contains(regions[last_region], address, bytes)) {
    auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                  [](const char* a, const Region& r) { return a < r.low; });
    if (after == regions.begin() || !contains(*(after - 1), address, bytes)) fail_global(address, bytes, access);
    last_region = size_t(after - regions.begin()) - 1;
  }
  Region& region = regions[last_region];
  if (access != Access::kRead) {
    if (!region.writable) fail(format("%s at byte %td of read-only buffer %s", verb(access), address - region.low,
                                      region.name.c_str()));
    region.bytes_written += bytes;
  }
  if (access != Access::kWrite) region.bytes_read += bytes;
}

}  // namespace

void check_access(const void* pointer, size_t bytes, size_t alignment, Access access) {
  if (!current_thread) return;
  const char* address = static_cast<const char*>(pointer);
  if (address >= current_thread->stack_low && address + bytes <= current_thread->stack_high) return;
  if (alignment > 1 && reinterpret_cast<uintptr_t>(address) % alignment != 0)
    fail(format("misaligned %s of %zu bytes at %p: needs a multiple of %zu", verb(access), bytes, pointer, alignment));
  if (address >= arena && address < arena + kSharedBytes && !variables.empty())
    return check_shared(size_t(address - arena), bytes, access);
  if (access == Access::kRead && address >= parameters_low && address + bytes <= parameters_high) return;
  check_global(address, bytes, access);
}

void* shared_variable(const void* site, const char* name, size_t bytes, size_t alignment) {
  auto found = variable_at.find(site);
  if (found != variable_at.end()) return arena + found->second;
  char* memory = static_cast<char*>(place_variable(name, bytes, alignment));
  variable_at[site] = size_t(memory - arena);
  return memory;
}

void* dynamic_shared() { return arena + variables.front().low; }

void begin_launch(const void* parameters, size_t parameter_bytes) {
  parameters_low = static_cast<const char*>(parameters);
  parameters_high = parameters_low + parameter_bytes;
}

void begin_block(size_t dynamic_shared_bytes) {
  variables.clear();
  variable_at.clear();
  arena_used = shared_bytes_used = 0;
  block_time = 1;
  std::fill(std::begin(warp_time), std::end(warp_time), 1u);
  place_variable("(dynamic)", dynamic_shared_bytes, 1024);
}

void end_launch() { variables.clear(); }

void order_block() { ++block_time; }
void order_warp(int warp) { ++warp_time[warp]; }

extern "C" {

// Global buffers. Python registers every array a kernel may touch; anything else is out of bounds.
void simt_register(const char* name, const void* data, size_t bytes, int writable) {
  const char* low = static_cast<const char*>(data);
  auto after = std::upper_bound(regions.begin(), regions.end(), low, [](const char* a, const Region& r) { return a < r.low; });
  regions.insert(after, Region{low, low + bytes, name, writable != 0});
}
void simt_forget_buffers() {
  regions.clear();
  last_region = 0;
}
// Bytes that kernels moved to or from all buffers called `name` since they were registered.
uint64_t simt_traffic(const char* name, int written) {
  uint64_t total = 0;
  for (const Region& r : regions)
    if (r.name == name) total += written ? r.bytes_written : r.bytes_read;
  return total;
}

// ---- what the compiler calls under -fsanitize=thread -----------------------------------------------------------------
#define SIMT_TSAN(BYTES)                                                                                        \
  void __tsan_read##BYTES(void* p) { check_access(p, BYTES, BYTES, Access::kRead); }                            \
  void __tsan_write##BYTES(void* p) { check_access(p, BYTES, BYTES, Access::kWrite); }                          \
  void __tsan_unaligned_read##BYTES(void* p) { check_access(p, BYTES, BYTES, Access::kRead); }                  \
  void __tsan_unaligned_write##BYTES(void* p) { check_access(p, BYTES, BYTES, Access::kWrite); }                \
  void __tsan_volatile_read##BYTES(void* p) { check_access(p, BYTES, BYTES, Access::kRead); }                   \
  void __tsan_volatile_write##BYTES(void* p) { check_access(p, BYTES, BYTES, Access::kWrite); }
SIMT_TSAN(1)
SIMT_TSAN(2)
SIMT_TSAN(4)
SIMT_TSAN(8)
SIMT_TSAN(16)
void __tsan_read_range(void* p, size_t bytes) { check_access(p, bytes, 1, Access::kRead); }
void __tsan_write_range(void* p, size_t bytes) { check_access(p, bytes, 1, Access::kWrite); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// ---- and under -fsanitize=alignment,bounds,signed-integer-overflow,shift ---------------------------------------------
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
static std::string at(const void* data) {
  const auto& location = *static_cast<const SourceLocation*>(data);  // each handler's data begins with it
  return format(" (%s:%u)", location.file, location.line);
}
static void fail_in_kernel(const std::string& message) {
  if (current_thread) fail(message);
  throw message;
}
void __ubsan_handle_type_mismatch_v1_abort(void* data, uintptr_t pointer) {
  fail_in_kernel(format("misaligned access at 0x%zx", size_t(pointer)) + at(data));
}
void __ubsan_handle_out_of_bounds_abort(void* data, uintptr_t index) {
  fail_in_kernel(format("index %td is out of bounds of its array", ptrdiff_t(index)) + at(data));
}
#define SIMT_UBSAN(NAME, MESSAGE) \
  void __ubsan_handle_##NAME##_abort(void* data, uintptr_t, uintptr_t) { fail_in_kernel(MESSAGE + at(data)); }
SIMT_UBSAN(add_overflow, "signed overflow in +")
SIMT_UBSAN(sub_overflow, "signed overflow in -")
SIMT_UBSAN(mul_overflow, "signed overflow in *")
SIMT_UBSAN(negate_overflow, "signed overflow in negation")
SIMT_UBSAN(divrem_overflow, "division by zero or overflow")
SIMT_UBSAN(shift_out_of_bounds, "shift by more than the width")

}  // extern "C"
}  // namespace simt
