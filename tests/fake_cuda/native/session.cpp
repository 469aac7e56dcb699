// State shared by the processes of one run (a directory: memory in use per device, reports), and process settings.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "core.h"

namespace fakecuda {
namespace {

constexpr int kMaxDevices = 64, kMaxProcesses = 1024;

// Bytes in use, one row per process. Rows of dead processes do not count: a killed engine's memory is free.
struct Usage {
  struct Row {
    int pid;
    long bytes[kMaxDevices];
  } rows[kMaxProcesses];
};

struct Counters {
  std::mutex lock;
  std::map<std::string, long> calls;
  std::map<std::string, long> skipped;
};
Counters& counters() {  // never destroyed: threads count until the process ends
  static auto* c = new Counters;
  return *c;
}

thread_local int device = 0;
thread_local cudaError_t last = cudaSuccess;
volatile int sticky = 0;

// Held while rows are summed and changed, over all processes.
struct UsageLock {
  int file;
  UsageLock() {
    file = open((std::string(fakecuda_session()) + "/usage").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || flock(file, LOCK_EX) != 0) {
      fprintf(stderr, "fakecuda: %s/usage: %s\n", fakecuda_session(), strerror(errno));
      abort();
    }
  }
  ~UsageLock() {
    flock(file, LOCK_UN);  // closing is not enough: the mapping below keeps the first of these files open
    close(file);
  }
};

Usage* usage(int file) {
  static Usage* table = nullptr;
  if (!table) {
    if (ftruncate(file, sizeof(Usage)) != 0) abort();
    void* memory = mmap(nullptr, sizeof(Usage), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) abort();
    table = static_cast<Usage*>(memory);
  }
  return table;
}

bool is_gone(int pid) {
  if (kill(pid, 0) != 0) return errno == ESRCH;
  // A zombie holds no memory any more; its parent may never wait for it.
  char path[40], text[256] = {};
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE* stat = fopen(path, "r");
  if (!stat) return true;
  size_t n = fread(text, 1, sizeof text - 1, stat);
  fclose(stat);
  const char* state = n ? strrchr(text, ')') : nullptr;
  return state && (state[2] == 'Z' || state[2] == 'X');
}

long used_locked(Usage* table, int physical) {
  long sum = 0;
  for (auto& row : table->rows) {
    if (row.pid == 0) continue;
    if (row.pid != getpid() && row.bytes[physical] && is_gone(row.pid)) memset(&row, 0, sizeof row);
    sum += row.bytes[physical];
  }
  return sum;
}

Usage::Row* own_row(Usage* table) {
  static Usage::Row* row_of_this = nullptr;
  static int owner = 0;  // not this process any more after a fork
  if (owner == getpid()) return row_of_this;
  Usage::Row* unused = nullptr;
  for (auto& row : table->rows) {
    if (row.pid == getpid()) memset(&row, 0, sizeof row);  // of a process that had this number before
    if (!unused && (row.pid == 0 || is_gone(row.pid))) unused = &row;
  }
  if (!unused) {
    fprintf(stderr, "fakecuda: more than %d processes use devices\n", kMaxProcesses);
    abort();
  }
  memset(unused, 0, sizeof *unused);
  unused->pid = owner = getpid();
  return row_of_this = unused;
}

FILE* session_file(const char* what, const char* mode) {
  std::string path = std::string(fakecuda_session()) + "/" + what + "." + std::to_string(getpid());
  return fopen(path.c_str(), mode);
}

void at_exit() {
  auto& c = counters();
  std::lock_guard<std::mutex> guard(c.lock);
  if (!c.calls.empty())
    if (FILE* f = session_file("report", "w")) {
      for (auto& [name, n] : c.calls) fprintf(f, "%ld %s\n", n, name.c_str());
      for (auto& [name, n] : c.skipped) fprintf(f, "%ld skipped %s\n", n, name.c_str());
      fclose(f);
    }
  if (c.skipped.empty() || !getenv("FAKECUDA_STRICT")) return;
  fprintf(stderr, "fakecuda: process %d skipped work whose result nothing computed:\n", getpid());
  for (auto& [name, n] : c.skipped) fprintf(stderr, "fakecuda:   %ld x %s\n", n, name.c_str());
  fflush(nullptr);
  _exit(86);
}
struct AtExit {
  AtExit() { atexit(at_exit); }
} registered;

}  // namespace

double number_setting(const char* name, double otherwise) {
  const char* value = getenv(name);
  return value && *value ? atof(value) : otherwise;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// CUDA_VISIBLE_DEVICES as the driver reads it: numbers or UUIDs, up to the first that names no device.
const std::vector<int>& visible() {
  static const auto* list = [] {
    auto* found = new std::vector<int>;
    const int count = fakecuda_physical_count();
    const char* setting = getenv("CUDA_VISIBLE_DEVICES");
    if (!setting) {
      for (int i = 0; i < count; i++) found->push_back(i);
      return found;
    }
    std::string rest = setting;
    while (!rest.empty()) {
      const size_t comma = rest.find(',');
      const std::string part = rest.substr(0, comma);
      rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
      char* end = nullptr;
      const bool uuid = part.rfind("GPU-", 0) == 0 && part.size() > 6;
      const long number = strtol(uuid ? part.c_str() + part.size() - 2 : part.c_str(), &end, uuid ? 16 : 10);
      if (part.empty() || *end || number < 0 || number >= count) break;
      found->push_back(int(number));
    }
    return found;
  }();
  return *list;
}

int current_device() { return device; }
cudaError_t set_current_device(int wanted) {
  if (wanted < 0 || wanted >= int(visible().size())) return fail(cudaErrorInvalidDevice);
  device = wanted;
  return cudaSuccess;
}
cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}
cudaError_t sticky_error() { return cudaError_t(sticky); }
cudaError_t last_error(bool clear) {
  if (sticky) return cudaError_t(sticky);
  const cudaError_t error = last;
  if (clear) last = cudaSuccess;
  return error;
}

}  // namespace fakecuda

using namespace fakecuda;

extern "C" {

const char* fakecuda_session() {
  static const std::string* path = [] {
    const char* given = getenv("FAKECUDA_SESSION");
    auto* p = new std::string(given ? given : "/dev/shm/fakecuda-" + std::to_string(getuid()));
    mkdir(p->c_str(), 0700);
    return p;
  }();
  return path->c_str();
}

int fakecuda_visible(int logical) {
  return logical >= 0 && logical < int(visible().size()) ? visible()[logical] : -1;
}
int fakecuda_physical_count() { return std::min(kMaxDevices, int(number_setting("FAKECUDA_DEVICES", 1))); }
size_t fakecuda_capacity() { return size_t(number_setting("FAKECUDA_MEMORY_GB", 80) * (1ull << 30)); }

size_t fakecuda_used(int physical) {
  UsageLock lock;
  return size_t(used_locked(usage(lock.file), physical));
}

int fakecuda_charge(int physical, long bytes) {
  UsageLock lock;
  Usage* table = usage(lock.file);
  if (bytes > 0 && used_locked(table, physical) + bytes > long(fakecuda_capacity())) return 0;
  own_row(table)->bytes[physical] += bytes;
  return 1;
}

void fakecuda_count(const char* what) {
  auto& c = counters();
  std::lock_guard<std::mutex> guard(c.lock);
  c.calls[what]++;
}

void fakecuda_stub(const char* function) { fakecuda_count((std::string("stub ") + function).c_str()); }

void fakecuda_skipped(const char* name) {
  auto& c = counters();
  {
    std::lock_guard<std::mutex> guard(c.lock);
    if (c.skipped[name]++ > 0) return;
  }
  // At once: a process that is killed, or ends by os._exit, has no exit handlers.
  if (FILE* f = session_file("skipped", "a")) {
    fprintf(f, "%s\n", name);
    fclose(f);
  }
  const char* strict = getenv("FAKECUDA_STRICT");
  if (strict && strcmp(strict, "abort") == 0) {
    fprintf(stderr, "fakecuda: skipped: %s\n", name);
    abort();
  }
}

void fakecuda_device_assert(const char* message) {
  fprintf(stderr, "fakecuda: device-side assert: %s\n", message);
  sticky = cudaErrorAssert;
}

}  // extern "C"
