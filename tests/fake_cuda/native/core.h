// Internals of libfakecuda.so: streams with their work, events, graphs, blocks of memory.
#pragma once

#include <cuda_runtime_api.h>
#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fake.h"

namespace fakecuda {

using Work = std::function<void()>;

// ---- settings and state of a process ---------------------------------------------------------------------------------
double number_setting(const char* name, double otherwise);
double now();  // seconds of a monotonic clock
const std::vector<int>& visible();
int current_device();
cudaError_t set_current_device(int device);
// The last error of this thread, as cudaGetLastError returns it. An assert on the device is never cleared.
cudaError_t fail(cudaError_t error);
cudaError_t last_error(bool clear);
cudaError_t sticky_error();
int stub_result();

// ---- streams -----------------------------------------------------------------------------------------------------------
struct Graph {
  std::vector<Work> nodes;
};
struct Stream;
// One capture and the streams that joined it through events.
struct Capture {
  unsigned long long id;
  std::shared_ptr<Graph> graph;
  Stream* origin;
  std::vector<Stream*> members;
};

// A position in a stream's order of work.
struct Position {
  Stream* stream = nullptr;
  uint64_t sequence = 0;
};
struct Item {
  Work work;
  std::vector<Position> after;  // work on other streams that must finish first
  uint64_t sequence;
  double time;
};
struct Stream {
  int device;
  int priority;
  unsigned flags;
  std::shared_ptr<Capture> capture;
  // Only used with delayed work: work up to `allowed` may run, work up to `done` has run.
  std::deque<Item> queue;
  uint64_t enqueued = 0, allowed = 0, done = 0;
  double running = 0;  // submission time of the running work; earlier work of other streams waits for it
  bool has_worker = false;
  bool is_default = false;
};

// Event memory between processes: how often it was recorded, and which record has completed.
struct SharedEvent {
  volatile uint64_t recorded, completed;
};
struct EventRecord {
  Position position;
  double time = -1;
  std::shared_ptr<Capture> capture;
};
struct Event {
  unsigned flags = 0;
  std::shared_ptr<EventRecord> record;
  SharedEvent* shared = nullptr;  // cudaEventInterprocess
  int shared_file = -1;
  bool foreign = false;  // opened from another process
};

bool lazy();
Stream* stream_of(cudaStream_t handle);  // the default streams are one per device
Stream* create_stream(unsigned flags, int priority);
void enqueue(Stream* stream, Work work);
void wait(Position position);
void wait_stream(Stream* stream);
void wait_device(int device);  // -1: all
void demand(Position position);  // may run now; does not wait
void let_others_run();  // work calls it before it waits for something
bool is_done(Position position);
Position tail(Stream* stream);
// Work submitted to `later` from now on runs after `earlier`.
void order_after(Stream* later, Position earlier);
void record_event(Event* event, Stream* stream);
cudaError_t stream_wait_event(Stream* stream, Event* event);
cudaError_t event_query(Event* event);
void event_wait(Event* event);
void share_event(Event* event);

cudaError_t begin_capture(Stream* stream, std::shared_ptr<Graph> into);
cudaError_t end_capture(Stream* stream, std::shared_ptr<Graph>* graph);

// ---- memory ------------------------------------------------------------------------------------------------------------
enum class Kind { kDevice, kPinned, kManaged };
struct Block {
  size_t size;
  int device;  // logical
  int file;    // -1 where another process or the driver API owns the memory
  Kind kind;
  bool foreign;
};
cudaError_t allocate(void** out, size_t size, Kind kind);
cudaError_t release(void* base);
bool find_block(const void* address, uintptr_t* base, Block* block);
bool is_pageable(const void* address);
void add_block(void* base, Block block);
void remove_block(void* base);
// As the runtime does: pageable sources are read before it returns, pageable destinations are complete when it does.
cudaError_t copy(void* to, const void* from, size_t bytes, Stream* stream);

// ---- kernels -----------------------------------------------------------------------------------------------------------
std::string demangled(const std::string& name);

}  // namespace fakecuda
