// Shared by the fake CUDA libraries and the operator layer. All of it is in libfakecuda.so, on which the fake
// libcudart.so.13, libcuda.so.1, libnvidia-ml.so.1 and libnccl.so.2 depend.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- work on streams -------------------------------------------------------------------------------------------------
// Submits `run(context)` to a stream; `drop(context)` follows when the work will not run again (drop may be null).
//   the stream captures: a node of the graph, run at every replay and dropped with the graph;
//   FAKECUDA_STREAM_ORDER=eager (default): run now, on the calling thread;
//   FAKECUDA_STREAM_ORDER=lazy: queued, and run by a thread of the runtime when a synchronisation needs it.
// Outputs must be allocated before. Host memory that may change afterwards must be copied into the context.
void fakecuda_enqueue(void* stream, void (*run)(void*), void* context, void (*drop)(void*));
int fakecuda_is_capturing(void* stream);
int fakecuda_any_capture(void);
int fakecuda_lazy(void);

// ---- kernels ---------------------------------------------------------------------------------------------------------
// Between begin and end (per thread, they nest), launches are parts of an operator that the caller computes itself.
// Any other launch without a host implementation is skipped: reported, and under FAKECUDA_STRICT=1 the process fails.
void fakecuda_begin_op(const char* name);
void fakecuda_end_op(void);
// Reports any other result that was not computed, for example an operator's.
void fakecuda_skipped(const char* name);

struct fakecuda_launch {
  unsigned grid[3], block[3];
  size_t shared_bytes;
  void** arguments;  // addresses of the parameters, valid during bind only
};
struct fakecuda_work {
  void (*run)(void*);
  void* context;
  void (*drop)(void*);
};
// A host implementation of the kernel of that mangled name: bind copies the parameters into work.
typedef void (*fakecuda_bind)(const struct fakecuda_launch*, struct fakecuda_work*);
void fakecuda_register_kernel(const char* mangled, fakecuda_bind bind);
// Calls visit with the mangled name of every host implementation.
void fakecuda_visit_implementations(void (*visit)(void* context, const char* mangled), void* context);
// Checks, counts and enqueues a launch. Returns a cudaError_t; 0 is success.
int fakecuda_launch_kernel(const char* mangled, const struct fakecuda_launch* launch, size_t max_shared_bytes, void* stream);
// A kernel detected an error: it is printed, and returned as cudaErrorAssert by every later call that can fail.
void fakecuda_device_assert(const char* message);

// ---- memory ----------------------------------------------------------------------------------------------------------
// Calls visit for each block that kernels may touch, in the order of addresses.
void fakecuda_visit_memory(void (*visit)(void* context, void* base, size_t bytes), void* context);

// ---- devices, sessions and reports -----------------------------------------------------------------------------------
int fakecuda_visible(int logical);  // physical number of a visible device, -1 past the last one
int fakecuda_physical_count(void);
int fakecuda_attribute(int attribute, int physical);  // CUdevice_attribute and cudaDeviceAttr share their numbers
const char* fakecuda_device_name(void);
void fakecuda_uuid(unsigned char* out, int physical);  // 16 bytes
size_t fakecuda_capacity(void);                        // bytes per device
size_t fakecuda_used(int physical);                    // bytes on it, of all processes of the session
int fakecuda_charge(int physical, long bytes);         // 0 where it does not fit; negative gives back
const char* fakecuda_session(void);                    // directory that all processes of a run share
void fakecuda_count(const char* what);                 // a counter of the report
void fakecuda_stub(const char* function);              // a function was called that only returns success

#ifdef __cplusplus
}
#endif
