// Step 4 of the planner: local search between groups of bins (ranks, or single bins).

#include <cmath>
#include <limits>
#include <numeric>

#include "packing/bins.h"

namespace megarl::packing {
namespace {

constexpr double kTolerance = 1e-3;
constexpr size_t kPartners = 4;
constexpr int64_t kNeighbours = 4;

struct Exchange {
  int32_t give_bin = -1;
  int32_t give_item = -1;  // -1: the whole bin
  int32_t take_bin = -1;
  int32_t take_item = -1;  // -1: nothing, or the whole bin
};

// Candidates of the cheaper group, sorted by cost.
struct Offer {
  double cost;
  int32_t item;
  int32_t bin;
  bool operator<(const Offer& other) const {
    return cost != other.cost ? cost < other.cost : item != other.item ? item < other.item : bin < other.bin;
  }
};

class ExchangeSearch {
 public:
  ExchangeSearch(const Bins& bins, const std::vector<int32_t>& high, const std::vector<int32_t>& low, double gap)
      : bins_(bins), high_(high), low_(low), half_(gap / 2), error_(gap / 2 * (1.0 - kTolerance)) {}

  bool run(Exchange& best) {
    best_ = &best;
    whole_bins();
    single_sequences();
    return found_;
  }

 private:
  void consider(double delta, const Exchange& exchange) {
    const double error = std::abs(delta - half_);
    if (error < error_) {
      error_ = error;
      *best_ = exchange;
      found_ = true;
    }
  }

  // Calls visit on the offers whose cost is nearest to `ideal`, cheapest first.
  template <typename Visit>
  static void nearest(const std::vector<Offer>& offers, double ideal, Visit visit) {
    const auto middle = std::lower_bound(offers.begin(), offers.end(), ideal,
                                         [](const Offer& offer, double cost) { return offer.cost < cost; }) -
                        offers.begin();
    const auto first = std::max<int64_t>(0, middle - kNeighbours);
    const auto last = std::min<int64_t>(offers.size(), middle + kNeighbours);
    for (auto i = first; i < last; ++i) {
      visit(offers[i]);
    }
  }

  void whole_bins() {
    std::vector<Offer> offers;
    for (const int32_t bin : low_) {
      offers.push_back({bins_.totals[bin], -1, bin});
    }
    std::sort(offers.begin(), offers.end());
    for (const int32_t give : high_) {
      nearest(offers, bins_.totals[give] - half_, [&](const Offer& offer) {
        consider(bins_.totals[give] - offer.cost, {give, -1, offer.bin, -1});
      });
    }
  }

  void single_sequences() {
    std::vector<Offer> offers;
    for (const int32_t bin : low_) {
      for (const int32_t item : bins_.members[bin]) {
        offers.push_back({bins_.costs[item], item, bin});
      }
    }
    std::sort(offers.begin(), offers.end());
    for (const int32_t give : high_) {
      for (const int32_t item : bins_.members[give]) {
        move(give, item);
        nearest(offers, bins_.costs[item] - half_, [&](const Offer& offer) {
          if (bins_.loads[offer.bin] - bins_.lengths[offer.item] + bins_.lengths[item] <= bins_.max_tokens) {
            consider(bins_.costs[item] - offer.cost, {give, item, offer.bin, offer.item});
          }
        });
      }
    }
  }

  // The sequence moves without an exchange; a bin must not end up empty.
  void move(int32_t give, int32_t item) {
    if (bins_.members[give].size() < 2) {
      return;
    }
    for (const int32_t take : low_) {
      if (bins_.loads[take] + bins_.lengths[item] <= bins_.max_tokens) {
        consider(bins_.costs[item], {give, item, take, -1});
        return;
      }
    }
  }

  const Bins& bins_;
  const std::vector<int32_t>& high_;
  const std::vector<int32_t>& low_;
  double half_;
  double error_;
  Exchange* best_ = nullptr;
  bool found_ = false;
};

void apply(Bins& bins, std::vector<int32_t>& high, std::vector<int32_t>& low, const Exchange& exchange) {
  const int32_t give = exchange.give_bin;
  const int32_t take = exchange.take_bin;
  if (exchange.give_item < 0) {
    *std::find(high.begin(), high.end(), give) = take;
    *std::find(low.begin(), low.end(), take) = give;
    return;
  }
  bins.remove(give, exchange.give_item);
  if (exchange.take_item >= 0) {
    bins.remove(take, exchange.take_item);
    bins.add(give, exchange.take_item);
  }
  bins.add(take, exchange.give_item);
}

}  // namespace

std::vector<int32_t> by_cost(const Bins& bins, const std::vector<int32_t>& ids) {
  struct Key {
    double cost;
    int32_t first;
    int32_t id;
  };
  std::vector<Key> keys;
  keys.reserve(ids.size());
  for (const int32_t id : ids) {
    const auto& items = bins.members[id];
    const int32_t none = std::numeric_limits<int32_t>::max();
    keys.push_back({bins.totals[id], items.empty() ? none : *std::min_element(items.begin(), items.end()), id});
  }
  std::sort(keys.begin(), keys.end(), [](const Key& x, const Key& y) {
    return x.cost != y.cost ? x.cost > y.cost : x.first != y.first ? x.first < y.first : x.id < y.id;
  });
  std::vector<int32_t> sorted;
  sorted.reserve(ids.size());
  for (const Key& key : keys) {
    sorted.push_back(key.id);
  }
  return sorted;
}

void refine(Bins& bins, std::vector<std::vector<int32_t>>& groups, int64_t steps) {
  const size_t count = groups.size();
  if (count < 2) {
    return;
  }
  std::vector<double> totals(count);
  std::vector<int32_t> cheapest_first(count);
  for (; steps > 0; --steps) {
    double sum = 0.0;
    for (size_t g = 0; g < count; ++g) {
      totals[g] = 0.0;
      for (const int32_t bin : groups[g]) {
        totals[g] += bins.totals[bin];
      }
      sum += totals[g];
    }
    const auto high = std::max_element(totals.begin(), totals.end()) - totals.begin();
    if (totals[high] <= sum / static_cast<double>(count) * (1.0 + kTolerance)) {
      return;
    }
    const size_t partners = std::min(kPartners, count);
    std::iota(cheapest_first.begin(), cheapest_first.end(), 0);
    std::partial_sort(cheapest_first.begin(), cheapest_first.begin() + partners, cheapest_first.end(),
                      [&](int32_t x, int32_t y) { return totals[x] != totals[y] ? totals[x] < totals[y] : x < y; });
    bool improved = false;
    for (size_t i = 0; i < partners && !improved; ++i) {
      auto& low = groups[cheapest_first[i]];
      Exchange exchange;
      improved = ExchangeSearch(bins, groups[high], low, totals[high] - totals[cheapest_first[i]]).run(exchange);
      if (improved) {
        apply(bins, groups[high], low, exchange);
      }
    }
    if (!improved) {
      return;
    }
  }
}

}  // namespace megarl::packing
