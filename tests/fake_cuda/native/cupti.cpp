// libcupti.so.13: a profiler without events, so that torch's profiler has the CPU's events alone.
// Every function that is not here is generated and returns success.
#include <stddef.h>
#include <stdint.h>
#include <time.h>

extern "C" {

int cuptiGetVersion(uint32_t* version) {
  *version = 130000;
  return 0;
}
int cuptiGetResultString(int, const char** text) {
  *text = "a result of the fake CUPTI";
  return 0;
}
int cuptiGetTimestamp(uint64_t* nanoseconds) {
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  *nanoseconds = uint64_t(t.tv_sec) * 1000000000u + uint64_t(t.tv_nsec);
  return 0;
}
int cuptiActivityGetNextRecord(uint8_t*, size_t, void**) { return 12; }  // CUPTI_ERROR_MAX_LIMIT_REACHED: no more
int cuptiActivityGetNumDroppedRecords(void*, uint32_t, size_t* dropped) {
  *dropped = 0;
  return 0;
}
int cuptiGetCallbackName(int, uint32_t, const char** name) {
  *name = "callback";
  return 0;
}
int cuptiSubscribe(void** subscriber, void*, void*) {
  static int one;
  *subscriber = &one;
  return 0;
}

}  // extern "C"
