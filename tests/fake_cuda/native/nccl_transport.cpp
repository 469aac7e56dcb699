#include "nccl_transport.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fake.h"

namespace {

struct Header {
  Signature signature;
  uint64_t bytes;
  std::atomic<int> readers;  // that have not read it yet
};

[[noreturn]] void die(const std::string& what) {
  fprintf(stderr, "fakenccl: %s: %s\n", what.c_str(), strerror(errno));
  abort();
}

void write_all(int file, const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes) {
    const ssize_t n = write(file, at, bytes);
    if (n <= 0) die("write");
    at += n;
    bytes -= size_t(n);
  }
}

std::string text(const Signature& s, size_t bytes) {
  char buffer[160];
  snprintf(buffer, sizeof buffer, "%s of %llu elements of type %d, reduction %d, root %d, %zu bytes", kCallNames[s.call],
           (unsigned long long)s.count, s.type, s.reduction, s.root, bytes);
  return buffer;
}

}  // namespace

Channel::Channel(const std::string& name_, int rank_, int size_) : name(name_), rank(rank_), size(size_) {
  directory_ = std::string(fakecuda_session()) + "/nccl-" + name;
  if (mkdir(directory_.c_str(), 0700) != 0 && errno != EEXIST) die(directory_);
  const int file = open(path("control").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0 || ftruncate(file, sizeof(Control)) != 0) die(path("control"));
  void* memory = mmap(nullptr, sizeof(Control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) die("mmap");
  close(file);
  control_ = static_cast<Control*>(memory);
}

void Channel::publish(const std::string& message, const Signature& signature, const void* data, size_t bytes,
                      const std::vector<int>& readers) {
  if (readers.empty() || aborted_) return;
  const std::string final_path = path(message), partial = final_path + ".part";
  const int file = open(partial.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600);
  if (file < 0) die(partial);
  Header header;
  header.signature = signature;
  header.bytes = bytes;
  header.readers = int(readers.size());
  write_all(file, &header, sizeof header);
  write_all(file, data, bytes);
  close(file);
  if (rename(partial.c_str(), final_path.c_str()) != 0) die(final_path);
  for (int reader : readers) {
    auto& arrivals = control_->arrivals[reader];
    arrivals++;
    syscall(SYS_futex, &arrivals, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
  }
}

void Channel::take(const std::string& message, int from, const Signature& expected, size_t bytes,
                   const std::function<void(const char*, const Signature&)>& use) {
  const std::string file_path = path(message);
  int file;
  for (bool waited = false;; waited = true) {
    const uint32_t seen = control_->arrivals[rank];
    file = open(file_path.c_str(), O_RDWR | O_CLOEXEC);
    // A request left behind would run the sender's next call too early. Other ranks repeat theirs.
    if (waited && (file >= 0 || aborted_)) control_->wanted[from] = 0;
    if (file >= 0) break;
    if (aborted_) return;
    control_->wanted[from] = 1;
    const timespec patience{0, 20'000'000};  // then look whether the communicator was aborted
    syscall(SYS_futex, &control_->arrivals[rank], FUTEX_WAIT, seen, &patience, nullptr, 0);
  }
  struct stat status;
  fstat(file, &status);
  void* memory = mmap(nullptr, size_t(status.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) die(file_path);
  close(file);
  auto* header = static_cast<Header*>(memory);
  const Signature& s = header->signature;
  const bool same = s.call == expected.call && s.type == expected.type && s.reduction == expected.reduction &&
                    s.root == expected.root && s.count == expected.count && header->bytes == bytes;
  if (!same) {
    fprintf(stderr, "fakenccl: mismatched collective: rank %d has %s; rank %d sent %s\n", rank,
            text(expected, bytes).c_str(), from, text(s, header->bytes).c_str());
    ::abort();
  }
  use(static_cast<const char*>(memory) + sizeof(Header), s);
  if (--header->readers == 0) unlink(file_path.c_str());
  munmap(memory, size_t(status.st_size));
}

bool Channel::wanted() { return control_->wanted[rank].exchange(0) != 0; }

void Channel::leave() {
  if (++control_->left < size) return;
  if (DIR* directory = opendir(directory_.c_str())) {
    while (const dirent* entry = readdir(directory)) unlink(path(entry->d_name).c_str());
    closedir(directory);
  }
  rmdir(directory_.c_str());
}
