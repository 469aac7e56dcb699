// libcudart.so.13: streams, events and graphs.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <utility>

#include "core.h"

using namespace fakecuda;

namespace {

struct Executable {
  std::shared_ptr<Graph> graph;
};
std::shared_ptr<Graph>& graph_of(cudaGraph_t graph) { return *reinterpret_cast<std::shared_ptr<Graph>*>(graph); }
cudaGraph_t handle_of(std::shared_ptr<Graph> graph) {
  return reinterpret_cast<cudaGraph_t>(new std::shared_ptr<Graph>(std::move(graph)));
}
Event* event_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

struct EventHandle {
  int pid, file;
};

}  // namespace

extern "C" {

// ---- streams -----------------------------------------------------------------------------------------------------------
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = reinterpret_cast<cudaStream_t>(create_stream(flags, priority));
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }  // what is queued still runs, so it stays
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = stream_of(stream)->flags;
  return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  *device = stream_of(stream)->device;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<unsigned long long>(stream_of(stream));
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  if (stream->capture) return fail(cudaErrorStreamCaptureUnsupported);
  if (sticky_error()) return sticky_error();
  return is_done(tail(stream)) ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  fakecuda_count("cudaStreamSynchronize");
  Stream* stream = stream_of(handle);
  if (stream->capture) return fail(cudaErrorStreamCaptureUnsupported);
  if (lazy()) wait_stream(stream);
  return fail(sticky_error());
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return stream_wait_event(stream_of(stream), event_of(event));
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  enqueue(stream_of(stream), [=] { callback(stream, cudaSuccess, data); });
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  enqueue(stream_of(stream), [=] { function(data); });
  return cudaSuccess;
}

// ---- events ------------------------------------------------------------------------------------------------------------
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  auto* made = new Event{flags};
  if (flags & cudaEventInterprocess) share_event(made);
  *event = reinterpret_cast<cudaEvent_t>(made);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  record_event(event_of(event), stream_of(stream));
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return sticky_error() ? sticky_error() : event_query(event_of(event));
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  fakecuda_count("cudaEventSynchronize");
  event_wait(event_of(event));
  return fail(sticky_error());
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event_of(event);  // the shared page, if any, stays: work in the queue may complete it later
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const auto a = event_of(start)->record, b = event_of(end)->record;
  if (!a || !b) return fail(cudaErrorInvalidResourceHandle);
  if (a->time < 0 || b->time < 0) return fail(cudaErrorNotReady);
  *milliseconds = float((b->time - a->time) * 1e3);
  return cudaSuccess;
}
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* out, cudaEvent_t event) {
  if (!event_of(event)->shared) return fail(cudaErrorInvalidResourceHandle);
  const EventHandle handle{getpid(), event_of(event)->shared_file};
  memset(out, 0, sizeof *out);
  memcpy(out, &handle, sizeof handle);
  return cudaSuccess;
}
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t given) {
  EventHandle handle;
  memcpy(&handle, &given, sizeof handle);
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.file);
  const int file = open(path, O_RDWR | O_CLOEXEC);
  void* memory = MAP_FAILED;
  if (file >= 0) {
    memory = mmap(nullptr, sizeof(SharedEvent), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
  }
  if (memory == MAP_FAILED) return fail(cudaErrorMapBufferObjectFailed);
  auto* opened = new Event{cudaEventInterprocess};
  opened->shared = static_cast<SharedEvent*>(memory);
  opened->foreign = true;
  *event = reinterpret_cast<cudaEvent_t>(opened);
  return cudaSuccess;
}

// ---- graphs ------------------------------------------------------------------------------------------------------------
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  fakecuda_count("captures");
  return begin_capture(stream_of(stream), std::make_shared<Graph>());
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) {
  return begin_capture(stream_of(stream), graph_of(graph));
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  std::shared_ptr<Graph> captured;
  *graph = nullptr;
  const cudaError_t error = end_capture(stream_of(stream), &captured);
  if (error == cudaSuccess) *graph = handle_of(captured);
  return error;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream_of(stream)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  const auto capture = stream_of(handle)->capture;
  *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? handle_of(capture->graph) : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(*mode, current);
  return cudaSuccess;
}
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = handle_of(std::make_shared<Graph>());
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Executable{graph_of(graph)});
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Executable*>(executable);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete &graph_of(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  fakecuda_count("cudaGraphLaunch");
  const auto graph = reinterpret_cast<Executable*>(executable)->graph;
  enqueue(stream_of(stream), [graph] {
    for (Work& node : graph->nodes) node();
  });
  return fail(sticky_error());
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!nodes) {
    *count = graph_of(graph)->nodes.size();
    return cudaSuccess;
  }
  for (size_t i = 0; i < *count; i++) nodes[i] = reinterpret_cast<cudaGraphNode_t>(i + 1);
  return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}

}  // extern "C"
