// libnccl.so.2 between processes of one host. A call has two halves: `post` copies its data for the others without
// waiting, `finish` waits for theirs. All posts of a group precede its first finish, so order in a group is free.
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <thread>

#include "core.h"
#include "nccl_reduce.h"
#include "nccl_transport.h"

using fakecuda::Position;
using fakecuda::Stream;

struct ncclComm {
  ncclComm(const std::string& name, int rank, int size, int device_)
      : channel(name, rank, size), device(device_), sent(size), received(size) {}
  Channel channel;
  int device;
  uint64_t collectives = 0, setups = 0, splits = 0;
  std::vector<uint64_t> sent, received;
  std::map<int, double> scales;  // of pre-multiplied sums
  int next_op = ncclNumOps;
  // Where work is delayed: the calls in the queue. Those of one communicator run in order, whatever their streams.
  std::deque<Position> pending;
};

const char* const kCallNames[] = {"ncclAllReduce", "ncclReduce",  "ncclBroadcast", "ncclAllGather", "ncclReduceScatter",
                                  "ncclAlltoAll",  "ncclGather",  "ncclScatter",   "ncclSend",      "ncclRecv"};

namespace {

using namespace fakenccl;

thread_local char error_text[512] = "no error";
std::mutex& lock = *new std::mutex;  // of the communicators and their queues
std::vector<ncclComm*>& communicators = *new std::vector<ncclComm*>;

// In the order of kCallNames.
enum class Kind { kAllReduce, kReduce, kBroadcast, kAllGather, kReduceScatter, kAllToAll, kGather, kScatter, kSend, kRecv };

struct Call {
  Kind kind;
  ncclComm* comm;
  const void* in;
  void* out;
  size_t count;
  ncclDataType_t type;
  int op = ncclSum;
  int root = 0;  // or the peer
  std::string message = {};

  size_t bytes() const { return count * element_size(type); }
  int size() const { return comm->channel.size; }
  int rank() const { return comm->channel.rank; }
  bool is_root() const { return rank() == root; }
  bool to_pair() const { return kind == Kind::kSend || kind == Kind::kRecv; }
  const char* own(int part) const { return static_cast<const char*>(in) + size_t(part) * bytes(); }
  char* slot(int part) const { return static_cast<char*>(out) + size_t(part) * bytes(); }
  Signature signature() const {
    const auto scale = comm->scales.find(op);
    // A reduction of the communicator's own has another number on each rank.
    return {to_pair() ? int(Kind::kSend) : int(kind), int(type), std::min(op, int(ncclNumOps)), to_pair() ? 0 : root, count,
            scale == comm->scales.end() ? 1 : scale->second};
  }

  std::vector<int> others() const {
    std::vector<int> ranks;
    for (int r = 0; r < size(); r++)
      if (r != rank()) ranks.push_back(r);
    return ranks;
  }

  void post() {
    auto publish = [&](const std::vector<int>& readers, size_t parts) {
      comm->channel.publish(message + "-" + std::to_string(rank()), signature(), in, bytes() * parts, readers);
    };
    if (kind == Kind::kSend) {
      message = "p" + std::to_string(comm->sent[root]++) + "-to" + std::to_string(root);
      return publish({root}, 1);
    }
    if (kind == Kind::kRecv) {
      message = "p" + std::to_string(comm->received[root]++) + "-to" + std::to_string(rank());
      return;
    }
    message = "c" + std::to_string(comm->collectives++);
    switch (kind) {
      case Kind::kAllReduce: case Kind::kAllGather: return publish(others(), 1);
      case Kind::kReduceScatter: case Kind::kAllToAll: return publish(others(), size_t(size()));
      case Kind::kReduce: case Kind::kGather: return is_root() ? void() : publish({root}, 1);
      case Kind::kBroadcast: return is_root() ? publish(others(), 1) : void();
      case Kind::kScatter: return is_root() ? publish(others(), size_t(size())) : void();
      default: return;
    }
  }

  // Calls use(rank, data, signature) for each of `ranks`; a message holds `parts` buffers of bytes().
  template <class Use>
  void take(const std::vector<int>& ranks, size_t parts, Use use) const {
    for (int r : ranks)
      comm->channel.take(message + "-" + std::to_string(r), r, signature(), bytes() * parts,
                         [&](const char* data, const Signature& theirs) { use(r, data, theirs); });
  }

  void reduce_parts(size_t parts, int part) const {
    std::vector<std::string> copies(size());
    std::vector<Part> all(size());
    all[rank()] = {own(parts > 1 ? part : 0), signature().scale};
    take(others(), parts, [&](int r, const char* data, const Signature& theirs) {
      copies[r].assign(data + size_t(parts > 1 ? part : 0) * bytes(), bytes());
      all[r] = {copies[r].data(), theirs.scale};
    });
    if (!comm->channel.aborted()) reduce(out, all, count, type, op);
  }

  void finish() const {
    auto copy = [&](void* to, const char* from) { memmove(to, from, bytes()); };
    switch (kind) {
      case Kind::kSend: return;
      case Kind::kRecv: return take({root}, 1, [&](int, const char* data, auto&) { copy(out, data); });
      case Kind::kAllReduce: return reduce_parts(1, 0);
      case Kind::kReduce: return is_root() ? reduce_parts(1, 0) : void();
      case Kind::kReduceScatter: return reduce_parts(size_t(size()), rank());
      case Kind::kBroadcast:
        return is_root() ? copy(out, own(0)) : take({root}, 1, [&](int, const char* data, auto&) { copy(out, data); });
      case Kind::kScatter:
        return is_root() ? copy(out, own(root)) : take({root}, size_t(size()), [&](int, const char* data, auto&) {
          copy(out, data + size_t(rank()) * bytes());
        });
      case Kind::kGather:
        if (!is_root()) return;
        [[fallthrough]];
      case Kind::kAllGather:
        copy(slot(rank()), own(0));
        return take(others(), 1, [&](int r, const char* data, auto&) { copy(slot(r), data); });
      case Kind::kAllToAll:
        copy(slot(rank()), own(rank()));
        return take(others(), size_t(size()), [&](int r, const char* data, auto&) {
          copy(slot(r), data + size_t(rank()) * bytes());
        });
    }
  }
};

void perform(std::vector<Call> calls) {
  for (Call& call : calls) call.post();
  fakecuda::let_others_run();
  for (Call& call : calls) call.finish();
}

// A rank that waits for a message announces it; the sending rank then runs its next delayed call, as a GPU would
// without a synchronisation.
void serve_waiting_ranks() {
  for (;;) {
    usleep(5000);
    std::lock_guard<std::mutex> guard(lock);
    for (ncclComm* comm : communicators) {
      while (!comm->pending.empty() && is_done(comm->pending.front())) comm->pending.pop_front();
      if (!comm->pending.empty() && comm->channel.wanted()) demand(comm->pending.front());
    }
  }
}

void enqueue(Stream* stream, std::vector<Call> calls) {
  const bool queued = fakecuda::lazy() && !stream->capture;
  if (queued) {
    std::lock_guard<std::mutex> guard(lock);
    for (const Call& call : calls)
      if (!call.comm->pending.empty()) fakecuda::order_after(stream, call.comm->pending.back());
  }
  fakecuda::enqueue(stream, [calls] { perform(calls); });
  if (!queued) return;
  static std::once_flag once;
  std::call_once(once, [] { std::thread(serve_waiting_ranks).detach(); });
  std::lock_guard<std::mutex> guard(lock);
  for (const Call& call : calls) call.comm->pending.push_back(fakecuda::tail(stream));
}

// The group of this thread: the outermost ncclGroupEnd gives each stream its calls.
thread_local int depth = 0;
thread_local std::vector<std::pair<Stream*, Call>> grouped;

void end_group() {
  auto all = std::move(grouped);
  grouped.clear();
  // Eager: work is done right here, so every post of the group precedes every finish, over all streams.
  if (!fakecuda::lazy()) {
    std::vector<Call> now;
    for (auto& [stream, call] : all)
      if (!stream->capture) now.push_back(call);
    perform(now);
    all.erase(std::remove_if(all.begin(), all.end(), [](auto& entry) { return !entry.first->capture; }), all.end());
  }
  while (!all.empty()) {
    Stream* stream = all.front().first;
    std::vector<Call> calls;
    for (auto& entry : all)
      if (entry.first == stream) calls.push_back(entry.second);
    all.erase(std::remove_if(all.begin(), all.end(), [&](auto& entry) { return entry.first == stream; }), all.end());
    enqueue(stream, calls);
  }
}

ncclResult_t submit(Call call, cudaStream_t handle) {
  if (!call.comm || call.root < 0 || call.root >= call.size()) return ncclInvalidArgument;
  fakecuda_count(kCallNames[int(call.kind)]);
  Stream* stream = fakecuda::stream_of(handle);
  if (depth)
    grouped.push_back({stream, call});
  else
    enqueue(stream, {call});
  return ncclSuccess;
}

// The data of every rank at the creation of communicators; waits for all of them.
template <class T>
std::vector<T> exchange(ncclComm* comm, const T& mine) {
  const std::string message = "s" + std::to_string(comm->setups++) + "-";
  std::vector<T> all(size_t(comm->channel.size), mine);
  std::vector<int> others;
  for (int r = 0; r < comm->channel.size; r++)
    if (r != comm->channel.rank) others.push_back(r);
  comm->channel.publish(message + std::to_string(comm->channel.rank), {}, &mine, sizeof mine, others);
  for (int r : others)
    comm->channel.take(message + std::to_string(r), r, {}, sizeof mine,
                       [&](const char* data, auto&) { memcpy(&all[size_t(r)], data, sizeof mine); });
  return all;
}

ncclComm* register_communicator(ncclComm* comm) {
  std::lock_guard<std::mutex> guard(lock);
  communicators.push_back(comm);
  return comm;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclSuccess ? "no error" : result == ncclInvalidUsage ? "invalid usage" : "an error of the fake NCCL";
}
const char* ncclGetLastError(ncclComm_t) { return error_text; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::random_device random;
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "%08x%08x", random(), random());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* out, int size, ncclUniqueId id, int rank) {
  if (rank < 0 || rank >= size) return ncclInvalidArgument;
  auto* comm = new ncclComm(id.internal, rank, size, fakecuda::current_device());
  const int gpu = fakecuda_visible(comm->device);
  const auto gpus = exchange(comm, gpu);
  for (int r = 0; r < size; r++)
    if (r != rank && gpus[size_t(r)] == gpu) {
      snprintf(error_text, sizeof error_text, "Duplicate GPU detected : rank %d and rank %d both on CUDA device %x000", rank,
               r, 0x10 + gpu);
      fprintf(stderr, "fakenccl: %s\n", error_text);
      return ncclInvalidUsage;
    }
  *out = register_communicator(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
  return ncclCommInitRank(out, size, id, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* out, int size, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return ncclCommInitRank(out, size, *ids, rank);
}
ncclResult_t ncclCommInitAll(ncclComm_t*, int, const int*) { return ncclInvalidUsage; }  // one process, several ranks

ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t* out, ncclConfig_t*) {
  struct Choice {
    int color, key;
  };
  const auto all = exchange(parent, Choice{color, key});
  const uint64_t number = parent->splits++;
  *out = nullptr;
  if (color == NCCL_SPLIT_NOCOLOR) return ncclSuccess;
  int rank = 0, size = 0;
  for (int r = 0; r < parent->channel.size; r++) {
    if (all[size_t(r)].color != color) continue;
    size++;
    rank += std::pair(all[size_t(r)].key, r) < std::pair(key, parent->channel.rank);
  }
  const std::string name = parent->channel.name + "." + std::to_string(number) + "c" + std::to_string(color);
  *out = register_communicator(new ncclComm(name, rank, size, parent->device));
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t comm) {  // the object stays: queued calls and graphs may still name it
  std::lock_guard<std::mutex> guard(lock);
  communicators.erase(std::remove(communicators.begin(), communicators.end(), comm), communicators.end());
  comm->channel.leave();
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  comm->channel.abort();
  return ncclCommDestroy(comm);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* result) {
  *result = ncclSuccess;
  return ncclSuccess;
}
ncclResult_t ncclCommCount(ncclComm_t comm, int* size) {
  *size = comm->channel.size;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) {
  *rank = comm->channel.rank;
  return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(ncclComm_t comm, int* device) {
  *device = comm->device;
  return ncclSuccess;
}
ncclResult_t ncclMemAlloc(void** p, size_t n) { return cudaMalloc(p, n) ? ncclUnhandledCudaError : ncclSuccess; }
ncclResult_t ncclMemFree(void* p) { return cudaFree(p) ? ncclUnhandledCudaError : ncclSuccess; }
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void* scalar, ncclDataType_t type, ncclScalarResidence_t,
                                      ncclComm_t comm) {
  double scale = 0;
  if (type == ncclFloat64) memcpy(&scale, scalar, 8);
  else if (type == ncclFloat32) scale = *static_cast<float*>(scalar);
  else if (type == ncclFloat16) scale = double(*static_cast<_Float16*>(scalar));
  else if (type == ncclBfloat16) scale = float(*static_cast<BFloat16*>(scalar));
  else return ncclInvalidArgument;
  comm->scales[comm->next_op] = scale;
  *op = ncclRedOp_t(comm->next_op++);
  return ncclSuccess;
}
ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }

ncclResult_t ncclGroupStart() {
  depth++;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (depth == 0) return ncclInvalidUsage;
  if (--depth == 0) end_group();
  return ncclSuccess;
}

ncclResult_t ncclSend(const void* in, size_t n, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return submit({Kind::kSend, comm, in, nullptr, n, type, ncclSum, peer}, stream);
}
ncclResult_t ncclRecv(void* out, size_t n, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return submit({Kind::kRecv, comm, nullptr, out, n, type, ncclSum, peer}, stream);
}
ncclResult_t ncclAllReduce(const void* in, void* out, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream) {
  return submit({Kind::kAllReduce, comm, in, out, n, type, op}, stream);
}
ncclResult_t ncclReduce(const void* in, void* out, size_t n, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream) {
  return submit({Kind::kReduce, comm, in, out, n, type, op, root}, stream);
}
ncclResult_t ncclBroadcast(const void* in, void* out, size_t n, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return submit({Kind::kBroadcast, comm, in, out, n, type, ncclSum, root}, stream);
}
ncclResult_t ncclBcast(void* data, size_t n, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(data, data, n, type, root, comm, stream);
}
ncclResult_t ncclAllGather(const void* in, void* out, size_t n, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return submit({Kind::kAllGather, comm, in, out, n, type}, stream);
}
ncclResult_t ncclReduceScatter(const void* in, void* out, size_t n, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                               cudaStream_t stream) {
  return submit({Kind::kReduceScatter, comm, in, out, n, type, op}, stream);
}
ncclResult_t ncclAlltoAll(const void* in, void* out, size_t n, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  return submit({Kind::kAllToAll, comm, in, out, n, type}, stream);
}
ncclResult_t ncclGather(const void* in, void* out, size_t n, ncclDataType_t type, int root, ncclComm_t comm,
                        cudaStream_t stream) {
  return submit({Kind::kGather, comm, in, out, n, type, ncclSum, root}, stream);
}
ncclResult_t ncclScatter(const void* in, void* out, size_t n, ncclDataType_t type, int root, ncclComm_t comm,
                         cudaStream_t stream) {
  return submit({Kind::kScatter, comm, in, out, n, type, ncclSum, root}, stream);
}

}  // extern "C"
