// Scheduling half of the SIMT executor: threads as fibres, barriers, warp collectives. See simt.h.
#include "simt_runtime.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

Thread* current_thread = nullptr;

namespace {

constexpr size_t kStackBytes = 64 * 1024;

const char* kernel_name = "";
uint3 grid, block, block_at;
std::vector<Thread> threads;
std::string error;
uint64_t random_state = 1;
char* stacks = nullptr;
void (*kernel_body)(const void*) = nullptr;
const void* kernel_parameters = nullptr;

uint64_t next_random() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1Dull;
}

template <class T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

// ---- fibre switching -------------------------------------------------------------------------------------------------
#if defined(__x86_64__)
void* scheduler_stack_pointer = nullptr;
extern "C" void simt_switch(void** save, void* load);
// Saves the callee-saved registers of the System V ABI on the old stack and restores them from the new one.
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
void prepare_fibre(Thread& thread, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(thread.stack_high);
  *--top = nullptr;  // return address of `entry`, which never returns; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}
void enter(Thread& thread) { simt_switch(&scheduler_stack_pointer, thread.stack_pointer); }
void leave(Thread& thread) { simt_switch(&thread.stack_pointer, scheduler_stack_pointer); }
#else
ucontext_t scheduler_context;
std::vector<ucontext_t> contexts(kMaxThreads);
void prepare_fibre(Thread& thread, void (*entry)()) {
  ucontext_t& context = contexts[thread.linear];
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack_low;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
void enter(Thread& thread) { swapcontext(&scheduler_context, &contexts[thread.linear]); }
void leave(Thread& thread) { swapcontext(&contexts[thread.linear], &scheduler_context); }
#endif

void yield() {
  Thread& thread = *current_thread;
  leave(thread);
  current_thread = &thread;
}

Thread* lane_of(const Thread& thread, int lane) {
  const size_t linear = size_t(thread.warp()) * kWarpSize + lane;
  return linear < threads.size() ? &threads[linear] : nullptr;
}

const char* op_name(WarpOp op) {
  static const char* const names[] = {"__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",
                                      "vote",              "__syncwarp",        "__reduce_add_sync", "__reduce_min_sync",
                                      "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  return names[int(op)];
}

std::string place(const Thread& t) {
  switch (t.state) {
    case State::kAtWarpOp:
      return format("is at %s with mask 0x%08x (%s:%d)", op_name(t.warp_op), t.mask, t.file, t.line);
    case State::kAtBarrier:
      return format("is at __syncthreads (%s:%d)", t.file, t.line);
    case State::kExited:
      return "has exited";
    default:
      return "runs";
  }
}

void thread_main() {
  kernel_body(kernel_parameters);
  Thread& thread = *current_thread;
  thread.state = State::kExited;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Thread* other = lane_of(thread, lane);
    if (other && other->state == State::kAtWarpOp && (other->mask >> thread.lane() & 1u))
      fail(format("%s (%s:%d) with mask 0x%08x names lane %d, which has exited", op_name(other->warp_op), other->file,
                  other->line, other->mask, thread.lane()),
           other);
  }
  leave(thread);
  __builtin_unreachable();
}

// ---- warp collectives ------------------------------------------------------------------------------------------------
int source_lane(const Thread& t) {
  const int first = t.lane() & ~(t.width - 1), end = first + t.width;
  int source = t.lane();
  switch (t.warp_op) {
    case WarpOp::kShuffle:
      return first + (t.argument & (t.width - 1));
    case WarpOp::kShuffleUp:
      source -= t.argument;
      return source < first ? t.lane() : source;
    case WarpOp::kShuffleDown:
      source += t.argument;
      return source >= end ? t.lane() : source;
    default:
      source ^= t.argument;
      return source >= end ? t.lane() : source;
  }
}

uint64_t reduce(const std::vector<Thread*>& lanes, WarpOp op, bool is_signed) {
  auto before = [is_signed](uint32_t a, uint32_t b) { return is_signed ? int32_t(a) < int32_t(b) : a < b; };
  uint32_t result = uint32_t(lanes[0]->bits);
  for (size_t i = 1; i < lanes.size(); ++i) {
    const uint32_t value = uint32_t(lanes[i]->bits);
    if (op == WarpOp::kAdd) result += value;
    if (op == WarpOp::kMin && before(value, result)) result = value;
    if (op == WarpOp::kMax && before(result, value)) result = value;
    if (op == WarpOp::kAnd) result &= value;
    if (op == WarpOp::kOr) result |= value;
    if (op == WarpOp::kXor) result ^= value;
  }
  return result;
}

void complete(const std::vector<Thread*>& lanes) {
  const WarpOp op = lanes[0]->warp_op;
  std::vector<uint64_t> results(lanes.size());
  if (op == WarpOp::kSync) order_warp(lanes[0]->warp());
  for (size_t i = 0; i < lanes.size(); ++i) {
    const Thread& t = *lanes[i];
    if (op <= WarpOp::kShuffleXor) {
      const int source = source_lane(t);
      if (!(t.mask >> source & 1u))
        fail(format("%s (%s:%d) reads lane %d, which its mask 0x%08x does not name", op_name(op), t.file, t.line, source,
                    t.mask), &t);
      results[i] = lane_of(t, source)->bits;
    } else if (op == WarpOp::kBallot) {
      for (const Thread* other : lanes) results[i] |= other->bits << other->lane();
    } else if (op != WarpOp::kSync) {
      results[i] = reduce(lanes, op, t.is_signed);
    }
  }
  for (size_t i = 0; i < lanes.size(); ++i) {
    lanes[i]->bits = results[i];
    lanes[i]->state = State::kReady;
  }
}

// ---- the block -------------------------------------------------------------------------------------------------------
// No thread can run: let the barrier pass where all wait at the same one, else say who does not.
void release_barrier() {
  const Thread* first = nullptr;
  for (const Thread& t : threads)
    if (t.state == State::kAtBarrier) first = first ? first : &t;
  for (const Thread& t : threads) {
    if (t.state == State::kAtWarpOp) {
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const Thread* other = lane_of(t, lane);
        if ((t.mask >> lane & 1u) && other->state != State::kAtWarpOp)
          fail(format("divergent warp: waits at %s (%s:%d) for %s, which %s", op_name(t.warp_op), t.file, t.line,
                      thread_name(*other).c_str(), place(*other).c_str()), &t);
      }
    } else if (t.state != State::kAtBarrier || t.line != first->line || std::strcmp(t.file, first->file) != 0) {
      fail(format("divergent barrier: waits at __syncthreads (%s:%d), but %s %s", first->file, first->line,
                  thread_name(t).c_str(), place(t).c_str()), first);
    }
  }
  int count = 0;
  for (const Thread& t : threads) count += t.argument != 0;
  for (Thread& t : threads) {
    const int total = int(threads.size());
    t.bits = t.block_op == BlockOp::kAnd ? count == total : t.block_op == BlockOp::kOr ? count > 0 : count;
    t.state = State::kReady;
  }
  order_block();
}

void run_block() {
  std::vector<Thread*> ready;
  for (;;) {
    ready.clear();
    size_t exited = 0;
    for (Thread& t : threads) {
      if (t.state == State::kReady) ready.push_back(&t);
      exited += t.state == State::kExited;
    }
    if (exited == threads.size()) return;
    if (ready.empty()) {
      release_barrier();
      if (!error.empty()) return;
      continue;
    }
    shuffle(ready);
    for (Thread* t : ready) {
      current_thread = t;
      enter(*t);
      current_thread = nullptr;
      if (!error.empty()) return;
    }
  }
}

bool start_block(unsigned linear_block, size_t dynamic_shared_bytes) {
  block_at = {linear_block % grid.x, linear_block / grid.x % grid.y, linear_block / grid.x / grid.y};
  begin_block(dynamic_shared_bytes);
  for (int i = 0; i < int(threads.size()); ++i) {
    Thread& t = threads[i];
    t = Thread{};
    t.linear = i;
    t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    t.stack_low = stacks + size_t(i) * kStackBytes;
    t.stack_high = t.stack_low + kStackBytes;
    prepare_fibre(t, thread_main);
  }
  run_block();
  return error.empty();
}

}  // namespace

std::string format(const char* pattern, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

std::string thread_name(const Thread& t) { return format("thread (%u,%u,%u)", t.index.x, t.index.y, t.index.z); }

void fail(const std::string& message, const Thread* thread) {
  if (!thread) thread = current_thread;
  if (error.empty())
    error = format("kernel %s, block (%u,%u,%u), %s: ", kernel_name, block_at.x, block_at.y, block_at.z,
                   thread_name(*thread).c_str()) + message;
  if (current_thread) leave(*current_thread);
  throw 0;  // in the scheduler itself; caught in run()
}

void device_check_failed(const char* message) { fail(message); }
uint3 thread_index() { return current_thread->index; }
uint3 block_index() { return block_at; }
uint3 block_extent() { return block; }
uint3 grid_extent() { return grid; }

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t bits, int argument, int width, bool is_signed, const char* file,
                         int line) {
  Thread& self = *current_thread;
  auto here = [&] { return format("%s (%s:%d) with mask 0x%08x", op_name(op), file, line, mask); };
  if (!(mask >> self.lane() & 1u)) fail(here() + format(" leaves out the calling lane %d", self.lane()));
  if (width < 1 || width > kWarpSize || (width & (width - 1))) fail(here() + format(" has width %d", width));
  self.warp_op = op, self.mask = mask, self.bits = bits, self.argument = argument, self.width = width;
  self.is_signed = is_signed, self.file = file, self.line = line, self.state = State::kAtWarpOp;
  std::vector<Thread*> lanes;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    Thread* other = lane_of(self, lane);
    if (!other) fail(here() + format(" names lane %d, which the block does not have", lane));
    if (other->state == State::kExited) fail(here() + format(" names lane %d, which has exited", lane));
    if (other->state != State::kAtWarpOp) continue;
    if (other->warp_op != op || other->mask != mask || other->line != line || std::strcmp(other->file, file) != 0)
      fail("divergent warp: " + here() + " meets " + thread_name(*other) + ", which " + place(*other));
    lanes.push_back(other);
  }
  if (int(lanes.size()) == __builtin_popcount(mask)) complete(lanes);
  std::vector<Thread*>().swap(lanes);  // this fibre may be abandoned while it waits
  if (self.state != State::kReady) yield();
  return self.bits;
}

int block_collective(BlockOp op, int predicate, const char* file, int line) {
  Thread& self = *current_thread;
  self.block_op = op, self.argument = predicate, self.file = file, self.line = line, self.state = State::kAtBarrier;
  yield();
  return int(self.bits);
}

int run(const char* kernel, uint3 grid_, uint3 block_, size_t dynamic_shared_bytes, void (*body)(const void*),
        const void* parameters, size_t parameter_bytes) {
  error.clear();
  kernel_name = kernel, grid = grid_, block = block_, kernel_body = body, kernel_parameters = parameters;
  const size_t num_threads = size_t(block.x) * block.y * block.z, num_blocks = size_t(grid.x) * grid.y * grid.z;
  if (num_threads < 1 || num_threads > kMaxThreads || num_blocks < 1 || num_blocks > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || dynamic_shared_bytes > 227 * 1024) {
    error = format("kernel %s: invalid launch: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of dynamic shared memory", kernel,
                   grid.x, grid.y, grid.z, block.x, block.y, block.z, dynamic_shared_bytes);
    return 1;
  }
  if (!stacks) {
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<char*>(memory);
  }
  threads.resize(num_threads);
  std::vector<unsigned> order(num_blocks);
  for (size_t i = 0; i < num_blocks; ++i) order[i] = unsigned(i);
  shuffle(order);
  begin_launch(parameters, parameter_bytes);
  try {
    for (unsigned linear_block : order)
      if (!start_block(linear_block, dynamic_shared_bytes)) break;
  } catch (int) {
  }
  current_thread = nullptr;
  end_launch();
  return error.empty() ? 0 : 1;
}

extern "C" void simt_seed(uint64_t seed) { random_state = seed * 2 + 1; }
extern "C" const char* simt_error() { return error.c_str(); }

}  // namespace simt
