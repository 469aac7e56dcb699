// Streams, events and captures. Eager: work runs when it is submitted, in program order. Lazy: each stream has a thread
// that runs work when a synchronisation needs it, as late as possible; missing synchronisation then gives wrong
// numbers. Of work that may run at once, the last submitted runs first, to reverse any order that is not enforced.
//
// Work that nothing waits for runs FAKECUDA_STREAM_DELAY seconds after submission, as a GPU would run it eventually.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "core.h"

namespace fakecuda {
namespace {

// Threads use these until the process ends, hence never destroyed.
std::mutex& lock = *new std::mutex;
std::condition_variable& changed = *new std::condition_variable;
std::vector<Stream*>& streams = *new std::vector<Stream*>;
std::atomic<int> captures{0};
std::atomic<unsigned long long> capture_ids{1};
bool stopping = false;
int working = 0;
thread_local Stream* serving = nullptr;  // whose work this thread runs

using Guard = std::unique_lock<std::mutex>;

double delay() {
  static const double seconds = number_setting("FAKECUDA_STREAM_DELAY", 3);
  return seconds;
}

// Allows all work of `stream` up to `sequence`, and its predecessors, to run. The lock is held.
void allow(Stream* stream, uint64_t sequence) {
  if (sequence <= stream->allowed) return;
  const uint64_t before = stream->allowed;
  stream->allowed = sequence;
  for (const Item& item : stream->queue) {
    if (item.sequence <= before) continue;
    if (item.sequence > sequence) break;
    for (const Position& position : item.after) allow(position.stream, position.sequence);
  }
  changed.notify_all();
}

// Returns true if all predecessors of `item` are done. The lock is held.
bool is_ready(const Item& item) {
  return std::all_of(item.after.begin(), item.after.end(),
                     [](const Position& position) { return position.stream->done >= position.sequence; });
}

// Returns true if another stream runs, or may run now, work submitted after `item`. A stream whose work waits does not
// count (let_others_run). The lock is held.
bool later_work_runs(const Stream* stream, const Item& item) {
  return std::any_of(streams.begin(), streams.end(), [&](const Stream* other) {
    if (other == stream) return false;
    if (other->running > item.time) return true;
    if (other->queue.empty()) return false;
    const Item& first = other->queue.front();
    return first.sequence <= other->allowed && first.time > item.time && is_ready(first);
  });
}

void run(Work& work) {
  try {
    work();
  } catch (const std::exception& error) {
    fakecuda_device_assert(error.what());
  }
}

void serve(Stream* stream) {
  serving = stream;
  Guard guard(lock);
  for (;;) {
    if (stopping) return;
    if (stream->queue.empty()) {
      changed.wait(guard);
      continue;
    }
    const Item& first = stream->queue.front();
    if (first.sequence > stream->allowed) {
      const double left = first.time + delay() - now();
      if (left > 0)
        changed.wait_for(guard, std::chrono::duration<double>(left));
      else
        allow(stream, first.sequence);
      continue;
    }
    if (!is_ready(first) || later_work_runs(stream, first)) {
      changed.wait(guard);
      continue;
    }
    Item item = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->running = item.time;
    working++;
    guard.unlock();
    run(item.work);
    item.work = nullptr;  // what it holds is let go outside the lock
    guard.lock();
    working--;
    stream->done = item.sequence;
    stream->running = 0;
    changed.notify_all();
  }
}

// As on a GPU, work that is pending when the process ends is lost; what runs just now gets a moment to end.
void at_exit() {
  Guard guard(lock);
  stopping = true;
  changed.notify_all();
  changed.wait_for(guard, std::chrono::seconds(2), [] { return working == 0; });
}
struct AtExit {
  AtExit() {
    if (lazy()) atexit(at_exit);
  }
} registered;

// The legacy default stream and those made without cudaStreamNonBlocking wait for each other.
void legacy_order(Stream* stream, std::vector<Position>& after) {
  if (stream->flags & cudaStreamNonBlocking) return;
  for (Stream* other : streams) {
    if (other == stream || other->device != stream->device || (other->flags & cudaStreamNonBlocking)) continue;
    if (!stream->is_default && !other->is_default) continue;
    if (other->enqueued > other->done) after.push_back({other, other->enqueued});
  }
}

void append(Stream* stream, Work work, std::vector<Position> after) {
  Guard guard(lock);
  legacy_order(stream, after);
  stream->queue.push_back({std::move(work), std::move(after), ++stream->enqueued, now()});
  if (!stream->has_worker) {
    stream->has_worker = true;
    std::thread(serve, stream).detach();
  }
  changed.notify_all();
}

}  // namespace

bool lazy() {
  static const bool setting = [] {
    const char* order = getenv("FAKECUDA_STREAM_ORDER");
    return order && strcmp(order, "lazy") == 0;
  }();
  return setting;
}

Stream* create_stream(unsigned flags, int priority) {
  auto* stream = new Stream{current_device(), priority, flags};
  Guard guard(lock);
  streams.push_back(stream);
  return stream;
}

Stream* stream_of(cudaStream_t handle) {
  if (uintptr_t(handle) > uintptr_t(cudaStreamPerThread)) return reinterpret_cast<Stream*>(handle);
  static auto& defaults = *new std::map<int, Stream*>;
  Guard guard(lock);
  Stream*& stream = defaults[current_device()];
  if (!stream) {
    stream = new Stream{current_device(), 0, 0};
    stream->is_default = true;
    streams.push_back(stream);
  }
  return stream;
}

void enqueue(Stream* stream, Work work) {
  if (stream->capture) {
    Guard guard(lock);
    stream->capture->graph->nodes.push_back(std::move(work));
  } else if (lazy()) {
    append(stream, std::move(work), {});
  } else {
    work();
  }
}

Position tail(Stream* stream) {
  Guard guard(lock);
  return {stream, stream->enqueued};
}

bool is_done(Position position) {
  Guard guard(lock);
  return !position.stream || position.stream->done >= position.sequence;
}

void let_others_run() {
  if (!serving) return;
  Guard guard(lock);
  serving->running = 0;
  changed.notify_all();
}

void demand(Position position) {
  if (!position.stream) return;
  Guard guard(lock);
  allow(position.stream, position.sequence);
}

void wait(Position position) {
  if (!position.stream || position.stream == serving) return;  // all before this thread's work is done
  let_others_run();
  Guard guard(lock);
  allow(position.stream, position.sequence);
  changed.wait(guard, [&] { return stopping || position.stream->done >= position.sequence; });
}

void wait_stream(Stream* stream) {
  std::vector<Position> after;
  {
    Guard guard(lock);
    after.push_back({stream, stream->enqueued});
    legacy_order(stream, after);
  }
  for (const Position& position : after) wait(position);
}

void wait_device(int device) {
  if (!lazy()) return;
  std::vector<Position> tails;
  {
    Guard guard(lock);
    for (Stream* stream : streams)
      if (device < 0 || stream->device == device) tails.push_back({stream, stream->enqueued});
    for (const Position& position : tails) allow(position.stream, position.sequence);
  }
  for (const Position& position : tails) wait(position);
}

void order_after(Stream* later, Position earlier) {
  if (later != earlier.stream && lazy() && !is_done(earlier)) append(later, [] {}, {earlier});
}

// ---- events ------------------------------------------------------------------------------------------------------------
void share_event(Event* event) {
  event->shared_file = memfd_create("fakecuda-event", MFD_CLOEXEC);
  if (event->shared_file < 0 || ftruncate(event->shared_file, sizeof(SharedEvent)) != 0) abort();
  event->shared = static_cast<SharedEvent*>(
      mmap(nullptr, sizeof(SharedEvent), PROT_READ | PROT_WRITE, MAP_SHARED, event->shared_file, 0));
}

void record_event(Event* event, Stream* stream) {
  auto record = std::make_shared<EventRecord>();
  event->record = record;
  record->capture = stream->capture;
  if (record->capture) return;
  SharedEvent* shared = event->shared;
  const uint64_t number = shared ? ++shared->recorded : 0;
  auto complete = [record, shared, number] {
    record->time = now();
    if (shared && shared->completed < number) shared->completed = number;
  };
  if (lazy() && !is_done(tail(stream))) {
    append(stream, complete, {});
    record->position = tail(stream);
  } else {
    complete();
  }
}

cudaError_t stream_wait_event(Stream* stream, Event* event) {
  if (event->shared) {  // its recorder may be another process, of whose streams we know nothing
    SharedEvent* shared = event->shared;
    const uint64_t number = shared->recorded;
    if (event->foreign) {
      if (shared->completed < number)
        enqueue(stream, [shared, number] {
          let_others_run();
          while (shared->completed < number) usleep(200);
        });
      return cudaSuccess;
    }
  }
  const auto record = event->record;
  if (!record) return cudaSuccess;
  if (record->capture) {
    const auto& capture = record->capture;
    if (!capture->origin->capture) return cudaSuccess;  // that capture has ended
    if (stream->capture) return stream->capture == capture ? cudaSuccess : fail(cudaErrorStreamCaptureMerge);
    stream->capture = capture;  // drawn into the capture
    capture->members.push_back(stream);
    return cudaSuccess;
  }
  if (stream->capture) return fail(cudaErrorStreamCaptureIsolation);
  if (record->position.stream && record->position.stream != stream && !is_done(record->position))
    append(stream, [] {}, {record->position});
  return cudaSuccess;
}

cudaError_t event_query(Event* event) {
  if (event->foreign) return event->shared->completed >= event->shared->recorded ? cudaSuccess : cudaErrorNotReady;
  if (!event->record || event->record->capture) return cudaSuccess;
  return is_done(event->record->position) ? cudaSuccess : cudaErrorNotReady;
}

void event_wait(Event* event) {
  if (event->foreign) {
    while (event->shared->completed < event->shared->recorded) usleep(200);
    return;
  }
  const auto record = event->record;
  if (record && !record->capture) wait(record->position);
}

// ---- captures ----------------------------------------------------------------------------------------------------------
cudaError_t begin_capture(Stream* stream, std::shared_ptr<Graph> into) {
  if (stream->capture) return fail(cudaErrorIllegalState);
  if (stream->is_default) return fail(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<Capture>(Capture{capture_ids++, std::move(into), stream, {}});
  captures++;
  return cudaSuccess;
}

cudaError_t end_capture(Stream* stream, std::shared_ptr<Graph>* graph) {
  const auto capture = stream->capture;
  if (!capture) return fail(cudaErrorIllegalState);
  if (capture->origin != stream) return fail(cudaErrorStreamCaptureUnmatched);
  for (Stream* member : capture->members) member->capture = nullptr;
  stream->capture = nullptr;
  captures--;
  *graph = capture->graph;
  return cudaSuccess;
}

}  // namespace fakecuda

using namespace fakecuda;

extern "C" {

int fakecuda_lazy() { return lazy(); }
int fakecuda_any_capture() { return captures.load(); }
int fakecuda_is_capturing(void* stream) {
  return captures.load() && stream_of(static_cast<cudaStream_t>(stream))->capture != nullptr;
}

void fakecuda_enqueue(void* stream, void (*run)(void*), void* context, void (*drop)(void*)) {
  struct Closure {
    void (*run)(void*);
    void* context;
    void (*drop)(void*);
    ~Closure() {
      if (drop) drop(context);
    }
  };
  auto closure = std::shared_ptr<Closure>(new Closure{run, context, drop});
  enqueue(stream_of(static_cast<cudaStream_t>(stream)), [closure] { closure->run(closure->context); });
}

}  // extern "C"
