// Steps 1 to 3 of the planner (see planner.h): count, fill, assign to ranks.

#include "packing/planner.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <numeric>
#include <optional>
#include <queue>
#include <stdexcept>
#include <utility>

#include "packing/bins.h"

namespace megarl::packing {
namespace {

constexpr int64_t kFillMaxSequences = 65'536;
constexpr int64_t kFillPopsPerSequence = 8;
constexpr int64_t kRefineMaxBins = 512;
constexpr int64_t kRefineWork = int64_t{1} << 24;
constexpr int64_t kRefineMinSteps = 8;
constexpr int64_t kMaxRoom = int64_t{1} << 28;  // 1 GiB of bucket heads

using Ids = std::vector<int32_t>;

template <typename T>
using MinHeap = std::priority_queue<T, std::vector<T>, std::greater<T>>;

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

std::vector<double> sequence_costs(const PlanRequest& request) {
  std::vector<double> costs(request.n);
  for (int64_t i = 0; i < request.n; ++i) {
    const double length = static_cast<double>(request.lengths[i]);
    // volatile: no fused multiply-add, which would round differently from the Python reference.
    const volatile double linear = request.a * length;
    const volatile double quadratic = request.b * (length * length);
    costs[i] = linear + quadratic;
  }
  return costs;
}

// Longest first, equal lengths in the caller's order. Counting sort, unless lengths are few and sparse.
Ids longest_first(const std::vector<int64_t>& lengths) {
  Ids order(lengths.size());
  if (lengths.empty()) {
    return order;
  }
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  if (longest > std::max<int64_t>(4 * static_cast<int64_t>(lengths.size()), 1 << 16)) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return lengths[x] > lengths[y]; });
    return order;
  }
  std::vector<int32_t> next(longest + 2);
  for (const int64_t length : lengths) {
    ++next[longest - length + 1];
  }
  std::partial_sum(next.begin(), next.end(), next.begin());
  for (size_t i = 0; i < lengths.size(); ++i) {
    order[next[longest - lengths[i]]++] = static_cast<int32_t>(i);
  }
  return order;
}

// A set of small integers that finds its least element at or above a bound by scanning a few words.
class OrderedSet {
 public:
  explicit OrderedSet(int64_t size) {
    do {
      size = ceil_div(size, 64);
      levels_.emplace_back(size);
    } while (size > 1);
  }

  void insert(int64_t value) {
    for (auto& level : levels_) {
      const bool present = level[value / 64] != 0;
      level[value / 64] |= uint64_t{1} << (value % 64);
      if (present) {
        return;
      }
      value /= 64;
    }
  }

  void erase(int64_t value) {
    for (auto& level : levels_) {
      level[value / 64] &= ~(uint64_t{1} << (value % 64));
      if (level[value / 64] != 0) {
        return;
      }
      value /= 64;
    }
  }

  // -1 if there is none.
  int64_t least_from(int64_t bound) const {
    for (size_t height = 0; height < levels_.size(); ++height) {
      const int64_t word = bound / 64;
      if (word >= static_cast<int64_t>(levels_[height].size())) {
        return -1;
      }
      const uint64_t rest = levels_[height][word] & (~uint64_t{0} << (bound % 64));
      if (rest != 0) {
        return descend(height, word * 64 + std::countr_zero(rest));
      }
      bound = word + 1;
    }
    return -1;
  }

 private:
  int64_t descend(size_t height, int64_t value) const {
    while (height-- > 0) {
      value = value * 64 + std::countr_zero(levels_[height][value]);
    }
    return value;
  }

  std::vector<std::vector<uint64_t>> levels_;
};

struct Packed {
  Ids bin_of;  // [n]
  int32_t num_bins = 0;
};

// Each sequence into the fullest bin with room. Bins with equal room form a stack, linked through `below`.
Packed best_fit_decreasing(const std::vector<int64_t>& lengths, const Ids& order, int64_t max_tokens) {
  const int64_t sum = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  const int64_t capacity = std::min(max_tokens, sum);  // a budget above the sum changes nothing
  if (capacity > kMaxRoom) {
    throw std::invalid_argument("packing: token budgets beyond 268,435,456 are not supported");
  }
  Packed packed{Ids(lengths.size())};
  Ids top(capacity + 1, -1);
  Ids below;
  OrderedSet rooms(capacity + 1);
  for (const int32_t item : order) {
    const int64_t length = lengths[item];
    int64_t room = rooms.least_from(length);
    int32_t bin;
    if (room >= 0) {
      bin = top[room];
      top[room] = below[bin];
      if (top[room] < 0) {
        rooms.erase(room);
      }
    } else {
      room = capacity;
      bin = packed.num_bins++;
      below.push_back(-1);
    }
    packed.bin_of[item] = bin;
    room -= length;
    below[bin] = top[room];
    if (below[bin] < 0) {
      rooms.insert(room);
    }
    top[room] = bin;
  }
  return packed;
}

int64_t count_bins(int64_t needed, const PlanRequest& request) {
  if (!request.equal_counts) {
    return std::max(needed, std::min(request.n, request.num_ranks));
  }
  const int64_t per_rank = ceil_div(needed, request.num_ranks);
  return request.num_ranks * request.group * ceil_div(per_rank, request.group);
}

// Costliest first into the cheapest bin with room; empty if the budget is too tight.
bool fill(Bins& bins, const Ids& order) {
  using Entry = std::pair<double, int32_t>;
  MinHeap<Entry> heap;
  for (size_t i = 0; i < bins.size(); ++i) {
    heap.emplace(0.0, static_cast<int32_t>(i));
  }
  int64_t pops = kFillPopsPerSequence * static_cast<int64_t>(order.size());
  std::vector<Entry> skipped;
  for (const int32_t item : order) {
    while (!heap.empty() && bins.loads[heap.top().second] + bins.lengths[item] > bins.max_tokens) {
      skipped.push_back(heap.top());
      heap.pop();
      --pops;
    }
    if (heap.empty() || pops < 0) {
      return false;
    }
    const int32_t bin = heap.top().second;
    heap.pop();
    bins.add(bin, item);
    heap.emplace(bins.totals[bin], bin);
    for (const Entry& entry : skipped) {
      heap.push(entry);
    }
    skipped.clear();
  }
  return true;
}

// The bins of best fit, the costliest ones split in two until no spare bin is empty.
void spread(Bins& bins, const Ids& order, const Packed& packed) {
  std::vector<int32_t> counts(packed.num_bins);
  for (const int32_t bin : packed.bin_of) {
    ++counts[bin];
  }
  for (int32_t bin = 0; bin < packed.num_bins; ++bin) {
    bins.members[bin].reserve(counts[bin]);
  }
  for (const int32_t item : order) {
    bins.add(packed.bin_of[item], item);
  }
  using Entry = std::pair<double, int32_t>;
  MinHeap<Entry> heap;
  auto offer = [&](int32_t bin) {
    if (bins.members[bin].size() > 1) {
      heap.emplace(-bins.totals[bin], bin);
    }
  };
  if (static_cast<int64_t>(bins.size()) > packed.num_bins) {
    for (int32_t bin = 0; bin < packed.num_bins; ++bin) {
      offer(bin);
    }
  }
  for (auto spare = packed.num_bins; spare < static_cast<int32_t>(bins.size()) && !heap.empty(); ++spare) {
    const int32_t bin = heap.top().second;
    heap.pop();
    const auto items = std::exchange(bins.members[bin], {});
    bins.loads[bin] = 0;
    bins.totals[bin] = 0.0;
    for (const int32_t item : items) {
      bins.add(bins.totals[spare] < bins.totals[bin] ? spare : bin, item);
    }
    offer(bin);
    offer(spare);
  }
}

Ids all_of(size_t count) {
  Ids ids(count);
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

// Rows of one bin per rank, the costliest of a row to the rank with the least cost.
std::vector<Ids> deal_rows(const Bins& bins, int64_t num_ranks) {
  std::vector<Ids> ranks(num_ranks);
  std::vector<double> totals(num_ranks);
  Ids cheapest_first = all_of(num_ranks);
  const Ids order = by_cost(bins, all_of(bins.size()));
  for (size_t row = 0; row < order.size(); row += num_ranks) {
    std::sort(cheapest_first.begin(), cheapest_first.end(),
              [&](int32_t x, int32_t y) { return totals[x] != totals[y] ? totals[x] < totals[y] : x < y; });
    for (int64_t i = 0; i < num_ranks; ++i) {
      const int32_t bin = order[row + i];
      ranks[cheapest_first[i]].push_back(bin);
      totals[cheapest_first[i]] += bins.totals[bin];
    }
  }
  return ranks;
}

// Each bin to the rank with the least cost, without equal counts.
std::vector<Ids> deal_freely(const Bins& bins, int64_t num_ranks) {
  std::vector<Ids> ranks(num_ranks);
  MinHeap<std::pair<double, int32_t>> heap;
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    heap.emplace(0.0, rank);
  }
  for (const int32_t bin : by_cost(bins, all_of(bins.size()))) {
    const auto [total, rank] = heap.top();
    heap.pop();
    ranks[rank].push_back(bin);
    heap.emplace(total + bins.totals[bin], rank);
  }
  return ranks;
}

Plan write_out(Bins& bins, const std::vector<Ids>& ranks) {
  Plan plan;
  plan.indices.reserve(bins.lengths.size());
  plan.offsets.reserve(bins.size() + 1);
  plan.offsets.push_back(0);
  for (const Ids& rank : ranks) {
    plan.rank_counts.push_back(static_cast<int64_t>(rank.size()));
    for (const int32_t bin : by_cost(bins, rank)) {
      auto& items = bins.members[bin];
      std::sort(items.begin(), items.end());
      plan.indices.insert(plan.indices.end(), items.begin(), items.end());
      plan.offsets.push_back(static_cast<int64_t>(plan.indices.size()));
    }
  }
  return plan;
}

}  // namespace

Plan plan_microbatches(const PlanRequest& request) {
  const std::vector<int64_t> lengths(request.lengths, request.lengths + request.n);
  const std::vector<double> costs = sequence_costs(request);
  const Ids order = longest_first(lengths);
  const Packed packed = best_fit_decreasing(lengths, order, request.max_tokens);
  const int64_t num_bins = count_bins(packed.num_bins, request);

  Bins bins(lengths, costs, request.max_tokens, num_bins);
  if (request.n > kFillMaxSequences || !fill(bins, order)) {
    bins.clear();
    spread(bins, order, packed);
  }
  const int64_t affordable = std::max(kRefineMinSteps, kRefineWork / std::max<int64_t>(request.n, 1));
  if (num_bins <= kRefineMaxBins) {
    std::vector<Ids> single;
    for (const int32_t bin : all_of(num_bins)) {
      single.push_back({bin});
    }
    refine(bins, single, std::min(2 * num_bins, affordable));
  }
  auto ranks = request.equal_counts ? deal_rows(bins, request.num_ranks) : deal_freely(bins, request.num_ranks);
  refine(bins, ranks, std::min(16 * request.num_ranks, affordable));
  return write_out(bins, ranks);
}

}  // namespace megarl::packing
