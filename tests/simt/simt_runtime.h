// What the two halves of the executor share: the running thread, and how a failed check ends a launch.
#pragma once

#include <string>
#include <vector>

#include "simt.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace simt {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
enum class State { kReady, kAtWarpOp, kAtBarrier, kExited };

struct Thread {
  void* stack_pointer = nullptr;
  char* stack_low = nullptr;
  char* stack_high = nullptr;
  State state = State::kReady;
  uint3 index{};
  int linear = 0;  // warp is linear / 32, lane linear % 32
  // The collective this thread waits at.
  WarpOp warp_op{};
  BlockOp block_op{};
  unsigned mask = 0;
  uint64_t bits = 0;  // its contribution, then its result
  int argument = 0;
  int width = kWarpSize;
  bool is_signed = false;
  const char* file = "";
  int line = 0;

  int warp() const { return linear / kWarpSize; }
  int lane() const { return linear % kWarpSize; }
};

// The thread that runs now; null while host code runs, which no check looks at.
extern Thread* current_thread;

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string thread_name(const Thread& thread);
// Records the first error of a launch, named after `thread` (the running one by default), and leaves the fibre for good.
[[noreturn]] void fail(const std::string& message, const Thread* thread = nullptr);

// simt_memory.cpp: the block's shared memory and the order of accesses to it.
void begin_launch(const void* parameters, size_t parameter_bytes);
void begin_block(size_t dynamic_shared_bytes);
void end_launch();
void order_block();          // after __syncthreads
void order_warp(int warp);   // after __syncwarp

}  // namespace simt
