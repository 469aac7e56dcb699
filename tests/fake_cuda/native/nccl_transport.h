// Messages between the ranks of a communicator: files in the session's directory, announced by futexes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

// Names of the calls, by Signature::call.
extern const char* const kCallNames[];

// The call that a message belongs to. Sender and receiver must mean the same call; otherwise the run ends here with a
// description of both, where real NCCL hangs or writes past the end.
struct Signature {
  int call = 0, type = 0, reduction = 0, root = 0;
  uint64_t count = 0;
  double scale = 1;  // of a pre-multiplied sum; each rank has its own
};

class Channel {
 public:
  // Ranks meet by name; the directory goes when the last one leaves.
  Channel(const std::string& name, int rank, int size);

  // Gives a message to `readers`; the data is copied before this returns. Never waits.
  void publish(const std::string& name, const Signature& signature, const void* data, size_t bytes,
               const std::vector<int>& readers);
  // Waits for `name` from rank `from` and calls use(data, sender's signature). Returns early where the channel is aborted.
  void take(const std::string& name, int from, const Signature& expected, size_t bytes,
            const std::function<void(const char*, const Signature&)>& use);
  void abort() { aborted_ = true; }
  bool aborted() const { return aborted_; }
  void leave();
  bool wanted();  // whether a rank has waited for a message of ours since the last call

  const std::string name;
  const int rank, size;

 private:
  struct Control {  // shared by all ranks
    std::atomic<uint32_t> arrivals[256];
    std::atomic<uint32_t> wanted[256];
    std::atomic<int> left;
  };
  std::string path(const std::string& message) const { return directory_ + "/" + message; }

  std::string directory_;
  Control* control_;
  std::atomic<bool> aborted_{false};
};
