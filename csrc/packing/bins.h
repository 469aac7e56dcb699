// The state of a plan in progress: the sequences of each bin (a microbatch without a rank yet).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace megarl::packing {

struct Bins {
  const std::vector<int64_t>& lengths;
  const std::vector<double>& costs;
  int64_t max_tokens;
  std::vector<std::vector<int32_t>> members;
  std::vector<int64_t> loads;  // tokens per bin
  std::vector<double> totals;  // cost per bin

  Bins(const std::vector<int64_t>& lengths, const std::vector<double>& costs, int64_t max_tokens, size_t num_bins)
      : lengths(lengths), costs(costs), max_tokens(max_tokens), members(num_bins), loads(num_bins), totals(num_bins) {}

  size_t size() const { return members.size(); }

  void clear() {
    for (size_t bin = 0; bin < size(); ++bin) {
      members[bin].clear();
      loads[bin] = 0;
      totals[bin] = 0.0;
    }
  }

  void add(int32_t bin, int32_t item) {
    members[bin].push_back(item);
    loads[bin] += lengths[item];
    totals[bin] += costs[item];
  }

  void remove(int32_t bin, int32_t item) {
    auto& items = members[bin];
    items.erase(std::find(items.begin(), items.end(), item));
    loads[bin] -= lengths[item];
    totals[bin] -= costs[item];
  }
};

// Costliest first; equal costs in the order of their first sequences.
std::vector<int32_t> by_cost(const Bins& bins, const std::vector<int32_t>& ids);

// Exchanges sequences between the costliest group of bins and the cheapest ones until no exchange helps.
void refine(Bins& bins, std::vector<std::vector<int32_t>>& groups, int64_t steps);

}  // namespace megarl::packing
