// CPU operator of the nearest-neighbour estimate of mutual information.
// picnn_fast/reference/mutual_information.py is the definition; what happens at one point is in
// ../common/mutual_information.h.
//
// A thread works on whole filters, sorting each once and going through it twice:
//   own   each point beside the values of its class, listed in order;
//   rest  each point as one of the rest of every class, correcting the sums of the classes that
//         hold neighbours of it.
// Most points are told apart from their neighbours by distance and by class: they take no branch
// that depends on the data. The others are counted one by one.
// So the time hardly depends on the number of classes, and the sums not at all on that of threads.
#include "../common/mutual_information.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/digamma.h"
#include "tensors.h"

namespace picnn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// psi of the integers, the small ones from memory.
class Digamma {
 public:
  explicit Digamma(int64_t largest) : table_(static_cast<size_t>(std::min(largest, kTable) + 1)) {
    for (size_t n = 1; n < table_.size(); ++n) table_[n] = digamma(static_cast<int64_t>(n));
  }
  double operator()(int64_t n) const {
    return n < static_cast<int64_t>(table_.size()) ? table_[static_cast<size_t>(n)] : digamma(n);
  }

 private:
  static constexpr int64_t kTable = 1 << 14;
  std::vector<double> table_;
};

// What all filters share.
struct Problem {
  explicit Problem(int64_t samples_) : psi(samples_) {}

  int64_t samples, filters, classes, neighbors;
  const double* values;  // [N, M], rows row_stride apart
  int64_t row_stride;
  std::vector<int32_t> labels;   // [M]
  std::vector<int64_t> sizes;    // [K]
  std::vector<int64_t> offsets;  // [K] where a class begins when samples are grouped by class
  bool singletons;               // whether some class has one sample
  Digamma psi;
  double* per_class;  // [K, N]
  double* joint;      // [N]
};

// Bits ordered as the doubles are: -0.0 below 0.0, NaN at either end.
uint64_t sortable(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  constexpr uint64_t kSign = uint64_t{1} << 63;
  return bits ^ ((bits & kSign) != 0 ? ~uint64_t{0} : kSign);
}

double from_sortable(uint64_t bits) {
  constexpr uint64_t kSign = uint64_t{1} << 63;
  bits ^= (bits & kSign) != 0 ? kSign : ~uint64_t{0};
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
std::unique_ptr<T[]> uninitialised(int64_t size) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]);
}

// A sum of m for the classes that a point's neighbours belong to, and where in the window they are.
struct ClassState {
  double rest = 0;          // correction of the sum of psi(m) over the rest
  double without = 0;       // to be added where one neighbour is of the class, and none beside them
  uint32_t in_window = 0;   // places of the class in the window, 0 between points
  uint32_t last_place = 0;  // the last of them
};

// Of the points of a class, psi(m) summed, without singletons for the joint estimate.
struct OwnSums {
  double sum = 0, joint_sum = 0;
};

// Without a branch, whatever the compiler thinks of the odds.
int64_t choose(bool first, int64_t a, int64_t b) {
  return b ^ ((a ^ b) & -static_cast<int64_t>(first));
}

// From one place outwards to the last that is within a radius of a centre.
struct Search {
  const double* from;
  int64_t direction;  // 1 or -1
  int64_t most;       // places that may be within
  double centre, radius;
  int64_t within;  // places that are
};

// Some at once, so that none waits for the memory of another.
void run_searches(Search* searches, int64_t count) {
  int64_t most = 0, step = 1;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, searches[i].most);
  while (2 * step <= most) step *= 2;
  for (; step > 0; step /= 2) {
    for (int64_t i = 0; i < count; ++i) {
      Search& s = searches[i];
      const int64_t to = std::min(s.within + step, s.most);
      const bool within = std::abs(s.from[s.direction * to] - s.centre) <= s.radius;
      s.within += (to - s.within) & -static_cast<int64_t>(within);
    }
  }
}

class FilterEstimate {
 public:
  explicit FilterEstimate(const Problem& problem)
      : p_(problem),
        keys_{uninitialised<uint64_t>(p_.samples), uninitialised<uint64_t>(p_.samples)},
        carried_{uninitialised<int32_t>(p_.samples), uninitialised<int32_t>(p_.samples)},
        values_(uninitialised<double>(p_.samples)),
        own_values_(uninitialised<double>(p_.samples)),
        own_places_(uninitialised<uint32_t>(p_.samples)),
        distinct_until_(uninitialised<uint32_t>(p_.samples)),
        run_begin_(uninitialised<uint32_t>(p_.samples)),
        run_end_(uninitialised<uint32_t>(p_.samples)),
        singletons_before_(uninitialised<uint32_t>(p_.singletons ? p_.samples + 1 : 0)),
        next_(static_cast<size_t>(p_.classes)),
        own_(static_cast<size_t>(p_.classes)),
        states_(static_cast<size_t>(p_.classes)) {}

  void operator()(int64_t filter) {
    sort(p_.values + filter * p_.row_stride);
    double* per_class = p_.per_class + filter;
    if (p_.samples > 0 && !(std::isfinite(values_[0]) && std::isfinite(values_[p_.samples - 1]))) {
      constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
      for (int64_t c = 0; c < p_.classes; ++c) per_class[c * p_.filters] = kNan;
      p_.joint[filter] = kNan;
      return;
    }
    group();
    p_.joint[filter] = sum_own();
    sum_rest();
    double empty = -1;  // the row of every class without a sample
    for (int64_t c = 0; c < p_.classes; ++c) {
      const bool is_empty = p_.sizes[c] == 0;
      double& row = per_class[c * p_.filters];
      row = is_empty && empty >= 0 ? empty : estimate(c);
      if (is_empty) empty = row;
    }
  }

 private:
  static constexpr int64_t kNearest = 4;
  static constexpr int kDigit = 11;

  // Sorts values, carrying labels; equal ones stay in order. By the upper 33 bits that tell them
  // apart, after which hardly one is out of place; else by all.
  void sort(const double* row) {
    const int64_t samples = p_.samples;
    uint64_t least = ~uint64_t{0}, most = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const uint64_t key = keys_[0][i] = sortable(row[i]);
      least = std::min(least, key);
      most = std::max(most, key);
    }
    for (int64_t i = 0; i < samples; ++i) keys_[0][i] -= least;
    int bits = 0;
    while (bits < 64 && samples > 0 && (most - least) >> bits != 0) ++bits;
    sorted_keys_ = 0;
    labels_ = p_.labels.data();
    const int lowest = std::max(0, bits - 3 * kDigit);
    sort_by_digits(lowest, bits);
    if (lowest > 0 && !put_in_place()) sort_by_digits(0, bits);
    const uint64_t* keys = keys_[sorted_keys_].get();
    for (int64_t i = 0; i < samples; ++i) values_[i] = from_sortable(keys[i] + least);
  }

  // By the bits from `lowest` up to `bits`, a digit at a time.
  void sort_by_digits(int lowest, int bits) {
    constexpr uint64_t kLast = (1 << kDigit) - 1;
    const int64_t samples = p_.samples;
    const int passes = (bits - lowest + kDigit - 1) / kDigit;
    for (int pass = 0; pass < passes; ++pass) counts_[static_cast<size_t>(pass)].fill(0);
    for (int64_t i = 0; i < samples; ++i) {
      uint64_t key = keys_[sorted_keys_][i] >> lowest;
      for (int pass = 0; pass < passes; ++pass, key >>= kDigit) {
        ++counts_[static_cast<size_t>(pass)][key & kLast];
      }
    }
    for (int pass = 0; pass < passes; ++pass) {
      auto& counts = counts_[static_cast<size_t>(pass)];
      const int shift = lowest + pass * kDigit;
      const uint64_t* keys = keys_[sorted_keys_].get();
      if (counts[keys[0] >> shift & kLast] == samples) continue;  // all alike
      uint32_t before = 0;
      for (uint32_t& count : counts) before += std::exchange(count, before);
      sorted_keys_ = 1 - sorted_keys_;
      uint64_t* to_keys = keys_[sorted_keys_].get();
      int32_t* to_labels = carried_[sorted_keys_].get();
      for (int64_t i = 0; i < samples; ++i) {
        const uint32_t to = counts[keys[i] >> shift & kLast]++;
        to_keys[to] = keys[i];
        to_labels[to] = labels_[i];
      }
      labels_ = to_labels;
    }
  }

  // By insertion. False, with some yet out of place, where that takes too many steps.
  bool put_in_place() {
    uint64_t* keys = keys_[sorted_keys_].get();
    int32_t* labels = carried_[sorted_keys_].get();
    int64_t steps = 4 * p_.samples;
    for (int64_t i = 1; i < p_.samples; ++i) {
      const uint64_t key = keys[i];
      if (key >= keys[i - 1]) continue;
      const int32_t label = labels[i];
      int64_t to = i;
      for (; to > 0 && keys[to - 1] > key; --to) {
        keys[to] = keys[to - 1];
        labels[to] = labels[to - 1];
      }
      keys[to] = key;
      labels[to] = label;
      steps -= i - to;
      if (steps < 0) return false;
    }
    return true;
  }

  // The sorted samples as the device-independent routines want them, and grouped by class.
  void group() {
    const int64_t samples = p_.samples;
    std::copy_n(p_.offsets.begin(), p_.classes, next_.begin());
    uint32_t run = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const int32_t c = labels_[i];
      const int64_t to = next_[c]++;
      own_values_[to] = values_[i];
      own_places_[to] = static_cast<uint32_t>(i);
      if (i > 0 && labels_[i - 1] != c) run = static_cast<uint32_t>(i);
      run_begin_[i] = run;
    }
    run = static_cast<uint32_t>(samples);
    uint32_t distinct = run;
    std::fill(next_.begin(), next_.end(), samples);
    for (int64_t i = samples; i-- > 0;) {
      if (i + 1 < samples && labels_[i + 1] != labels_[i]) run = static_cast<uint32_t>(i + 1);
      run_end_[i] = run;
      distinct = std::min(distinct, static_cast<uint32_t>(std::exchange(next_[labels_[i]], i)));
      distinct_until_[i] = distinct;
    }
    if (p_.singletons) {
      singletons_before_[0] = 0;
      for (int64_t i = 0; i < samples; ++i) {
        singletons_before_[i + 1] = singletons_before_[i] + (p_.sizes[labels_[i]] == 1);
      }
    }
    sorted_ = {values_.get(), labels_, run_begin_.get(), run_end_.get(), samples};
  }

  // m of each point against its own class, summed as psi in own_; returns the joint estimate.
  double sum_own() {
    double total = 0;
    int64_t kept = 0;
    for (int64_t c = 0; c < p_.classes; ++c) {
      const int64_t n = p_.sizes[c];
      own_[c] = OwnSums{};
      if (n < 2) continue;
      if (brute_force(n, p_.neighbors)) {
        sum_own_by_force(c);
      } else {
        sum_own_by_order(c);
      }
      const double joint_sum = p_.singletons ? own_[c].joint_sum : own_[c].sum;
      // A rest of one sample is left out of the row of c, and is a singleton in the joint one too.
      if (p_.samples - n == 1) own_[c].sum = joint_sum;
      total += static_cast<double>(n) * (p_.psi(std::min(p_.neighbors, n - 1)) - p_.psi(n));
      total -= joint_sum;
      kept += n;
    }
    return floored(total, kept);
  }

  void add_own(OwnSums& own, const Range& range) const {
    const int64_t m = range.end - range.begin;
    own.sum += p_.psi(m);
    if (p_.singletons) {
      own.joint_sum +=
          p_.psi(m - (singletons_before_[range.end] - singletons_before_[range.begin]));
    }
  }

  void sum_own_by_force(int64_t c) {
    const int64_t n = p_.sizes[c], k = std::min(p_.neighbors, n - 1);
    const double* values = &own_values_[p_.offsets[c]];
    const uint32_t* places = &own_places_[p_.offsets[c]];
    for (int64_t j = 0; j < n; ++j) {
      add_own(own_[c], within(places[j], radius_below(brute_distance(values, n, j, k))));
    }
  }

  // The samples nearer than the k-th neighbour in the class: from beside that neighbour to, on the
  // other side, beyond the window's end, before the next sample of the class.
  void sum_own_by_order(int64_t c) {
    constexpr int64_t kTogether = 32;
    const int64_t n = p_.sizes[c], k = p_.neighbors;
    const double *values = &own_values_[p_.offsets[c]], *x = values_.get();
    const uint32_t* places = &own_places_[p_.offsets[c]];
    Search searches[kTogether];
    int64_t windows[kTogether], besides[kTogether];
    bool simple[kTogether];
    OwnSums own;
    for (int64_t first = 0, begin = 0; first < n; first += kTogether) {
      const int64_t count = std::min(kTogether, n - first);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t j = first + t;
        begin = windows[t] = next_window(values, n, j, k, begin);
        const int64_t end = begin + k;
        const double centre = values[j];
        const double below = centre - values[begin], above = values[end] - centre;
        const bool upwards = below > above;  // the k-th neighbour is the lower end
        const double radius = radius_below(std::max(below, above));
        const int64_t low = places[begin], high = places[end];
        const int64_t before = begin > 0 ? static_cast<int64_t>(places[begin - 1]) : -1;
        const int64_t behind = end + 1 < n ? static_cast<int64_t>(places[end + 1]) : p_.samples;
        const int64_t from = choose(upwards, high, low);
        const int64_t most = choose(upwards, behind - high, low - before) - 1;
        const int64_t beside = besides[t] = choose(upwards, low + 1, high - 1);
        // Neither duplicates nor both ends at the same distance, nor others just as far.
        simple[t] = (below != above) & (radius > 0) & (std::abs(x[beside] - centre) <= radius);
        searches[t] = {x + from, choose(upwards, 1, -1), most, centre, radius, 0};
      }
      run_searches(searches, count);
      for (int64_t t = 0; t < count; ++t) {
        const Search& s = searches[t];
        const int64_t near = besides[t], far = (s.from - x) + s.direction * s.within;
        Range range{std::min(near, far), std::max(near, far) + 1};
        if (!simple[t]) range = within_window(values, places, n, first + t, k, windows[t]);
        add_own(own, range);
      }
    }
    own_[c] = own;
  }

  // base_ and the corrections to it: the sums of psi(m) over the rest of each class, for the
  // classes whose rest is searched by order.
  void sum_rest() {
    const int64_t samples = p_.samples, k = p_.neighbors;
    const double* x = values_.get();
    std::fill(states_.begin(), states_.end(), ClassState{});
    base_ = 0;
    if (brute_force(samples, k)) return;
    const double psi_whole_window = p_.psi(k + 1), psi_window = p_.psi(k);
    for (int64_t c = 0; c < p_.classes; ++c) {
      states_[c].without = (p_.sizes[c] == 1 ? psi_window : psi_whole_window) - psi_window;
    }
    duplicates_ = {0, 0};
    double base = 0;
    for (int64_t i = 0, begin = 0; i < samples; ++i) {
      begin = next_window(x, samples, i, k, begin);
      const int64_t end = begin + k + 1;
      const double below = x[i] - x[begin], above = x[end - 1] - x[i];
      const double distance = std::max(below, above);
      const double left = begin > 0 ? x[i] - x[begin - 1] : HUGE_VAL;
      const double right = end < samples ? x[end] - x[i] : HUGE_VAL;
      // One neighbour is the farthest, and nearer than all outside. Where no class is there twice,
      // the nearest outside takes the place of any neighbour whose class is left out.
      const bool one_farthest =
          (below != above) & (x[i] - x[begin + 1] < distance) & (x[end - 2] - x[i] < distance);
      const bool separate = (left > distance) & (right > distance);
      const int64_t first = std::max<int64_t>(begin - 1, 0), last = std::min(end, samples - 1);
      if (one_farthest & separate & (distinct_until_[first] > last)) {
        base += psi_window;
        ClassState& own = states_[labels_[i]];
        const double without = std::exchange(own.without, -psi_window);
        for (int64_t place = begin; place < end; ++place) {
          ClassState& state = states_[labels_[place]];
          state.rest += state.without;
        }
        own.without = without;
      } else {
        base += sum_rest_of_point(i, begin, distance, one_farthest, separate);
      }
    }
    base_ = base;
  }

  // The classes of the samples nearest to place i outside its window, in order, as far as they are
  // farther than `distance` and each farther than the one before; returns how many.
  int64_t nearest_outside(int64_t i, int64_t begin, double distance, int32_t* classes) const {
    const double* x = values_.get();
    int64_t left = begin - 1, right = begin + p_.neighbors + 1, count = 0;
    for (; count < kNearest; ++count) {
      const double below = left >= 0 ? x[i] - x[left] : HUGE_VAL;
      const double above = right < p_.samples ? x[right] - x[i] : HUGE_VAL;
      const double next = std::min(below, above);
      if (next == distance || next == HUGE_VAL) break;
      const bool downwards = below <= above;
      classes[count] = labels_[choose(downwards, left, right)];
      left -= downwards;
      right += !downwards;
      distance = next;
    }
    return count;
  }

  // Corrects the sums for place i and returns its psi(m). `one_farthest`: whether one place alone
  // of the window that begins at `begin` is at `distance`, the others nearer; `separate`: whether
  // all places outside are farther.
  double sum_rest_of_point(int64_t i, int64_t begin, double distance, bool one_farthest,
                           bool separate) {
    const int64_t k = p_.neighbors, end = begin + k + 1;
    const double* x = values_.get();
    int64_t m = k;
    if (distance == 0) {
      if (i >= duplicates_.end) duplicates_ = within(i, 0);
      m = duplicates_.end - duplicates_.begin;
    } else if (!one_farthest) {
      int64_t first = begin, last = end - 1;
      while (x[i] - x[first] >= distance) ++first;
      while (x[last] - x[i] >= distance) --last;
      m = last - first + 1;
    }
    const double psi = p_.psi(m);
    const int32_t y = labels_[i];
    states_[y].rest -= psi;
    // Enough duplicates that their radius stays 0 without a singleton among them.
    const bool settled = distance == 0 && m > k + 1;
    if (settled && p_.sizes[y] == 1) {
      states_[y].rest += static_cast<double>(m - 1) * (p_.psi(m - 1) - psi);
    }
    for (int64_t place = begin; place < end; ++place) {
      ClassState& state = states_[labels_[place]];
      ++state.in_window;
      state.last_place = static_cast<uint32_t>(place);
    }
    // Those of one class leave, and as many of the nearest outside take their places.
    int32_t nearest[kNearest];
    const int64_t told_apart = separate ? nearest_outside(i, begin, distance, nearest) : 0;
    for (int64_t place = begin; place < end; ++place) {
      const int32_t c = labels_[place];
      ClassState& state = states_[c];
      if (state.last_place != place) continue;  // of several, the last
      const int64_t missing = std::exchange(state.in_window, 0);
      if (c == y) continue;
      const bool singleton = p_.singletons && p_.sizes[c] == 1;
      int64_t taken = 0, left = missing;
      while (left > 0 && taken < told_apart) left -= nearest[taken++] != c;
      if (left == 0) {
        state.rest += p_.psi(k + taken - singleton) - psi;
      } else if (!(singleton && settled)) {
        const Range range = within_without_class(sorted_, i, k, begin, c, missing);
        const bool counted = singleton && range.begin <= place && place < range.end;
        state.rest += p_.psi(range.end - range.begin - counted) - psi;
      }
    }
    return psi;
  }

  // The sum of psi(m) over a rest of at most 2k + 1 samples.
  double sum_few(int64_t c) {
    few_values_.clear();
    few_places_.clear();
    for (int64_t i = 0; i < p_.samples; ++i) {
      if (labels_[i] == c) continue;
      few_values_.push_back(values_[i]);
      few_places_.push_back(i);
    }
    const int64_t n = static_cast<int64_t>(few_values_.size()), k = std::min(p_.neighbors, n - 1);
    const int64_t left_out = p_.sizes[c] == 1 ? own_places_[p_.offsets[c]] : -1;
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const Range range = within(few_places_[static_cast<size_t>(j)],
                                 radius_below(brute_distance(few_values_.data(), n, j, k)));
      const bool counted = range.begin <= left_out && left_out < range.end;
      sum += p_.psi(range.end - range.begin - counted);
    }
    return sum;
  }

  double estimate(int64_t c) {
    double total = 0;
    int64_t kept = 0;
    const auto add = [&](int64_t n, double sum) {
      total += static_cast<double>(n) * (p_.psi(std::min(p_.neighbors, n - 1)) - p_.psi(n)) - sum;
      kept += n;
    };
    const int64_t own = p_.sizes[c], rest = p_.samples - own;
    if (own > 1) add(own, own_[c].sum);
    if (rest > 1) {
      add(rest, brute_force(rest, p_.neighbors) ? sum_few(c) : base_ + states_[c].rest);
    }
    return floored(total, kept);
  }

  double floored(double total, int64_t kept) const {
    if (kept == 0) return std::numeric_limits<double>::quiet_NaN();
    return std::max(0.0, p_.psi(kept) + total / static_cast<double>(kept));
  }

  // As rounded_distance, in O(n) for every k with memory at hand.
  double brute_distance(const double* values, int64_t n, int64_t j, int64_t k) {
    squares_.resize(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      squares_[static_cast<size_t>(i)] = rounded_square(values[j], values[i]);
    }
    // One of them is the value itself, exactly 0.
    std::nth_element(squares_.begin(), squares_.begin() + k, squares_.end());
    return rounded_root(squares_[static_cast<size_t>(k)]);
  }

  // As window_begin, the next after the one at `from`; without a branch where k is small.
  static int64_t next_window(const double* v, int64_t n, int64_t j, int64_t k, int64_t from) {
    constexpr int64_t kFew = 8;
    if (k > kFew) return window_begin(v, n, j, k, from);
    const int64_t first = std::max<int64_t>(0, j - k), last = std::min(j, n - k - 1);
    int64_t begin = first;
    for (int64_t b = first; b < last; ++b) begin += v[j] - v[b] > v[b + k + 1] - v[j];
    return begin;
  }

  // The samples within a radius of place i.
  Range within(int64_t i, double radius) const {
    const double* x = values_.get();
    return {first_within(x, 0, i, x[i], radius), end_within(x, i, p_.samples, x[i], radius)};
  }

  // The samples nearer than the k-th neighbour of j in its class. They end beside the window's ends
  // or, where the k-th neighbour is at the other end, before the next sample of the class.
  Range within_window(const double* values, const uint32_t* places, int64_t n, int64_t j, int64_t k,
                      int64_t begin) const {
    const double* x = values_.get();
    const double centre = values[j], radius = radius_below(window_distance(values, j, k, begin));
    const int64_t i = places[j], end = begin + k;
    if (radius == 0) return within(i, 0);  // the class may have more duplicates
    Range range;
    int64_t inside = places[begin];
    if (centre - values[begin] <= radius) {
      const int64_t outside = begin > 0 ? static_cast<int64_t>(places[begin - 1]) : -1;
      for (int64_t count = inside - outside - 1; count > 0; count /= 2) {
        const int64_t half = (count + 1) / 2;
        inside -= centre - x[inside - half] <= radius ? half : 0;
      }
      range.begin = inside;
    } else if (centre - x[inside + 1] <= radius) {
      range.begin = inside + 1;
    } else {
      range.begin = first_within(x, inside + 2, i, centre, radius);
    }
    inside = places[end];
    if (values[end] - centre <= radius) {
      const int64_t outside = end + 1 < n ? places[end + 1] : p_.samples;
      for (int64_t count = outside - inside - 1; count > 0; count /= 2) {
        const int64_t half = (count + 1) / 2;
        inside += x[inside + half] - centre <= radius ? half : 0;
      }
      range.end = inside + 1;
    } else if (x[inside - 1] - centre <= radius) {
      range.end = inside;
    } else {
      range.end = end_within(x, i, inside - 1, centre, radius);
    }
    return range;
  }

  const Problem& p_;
  std::array<std::array<uint32_t, 1 << kDigit>, 6> counts_;  // of each digit
  std::unique_ptr<uint64_t[]> keys_[2];
  std::unique_ptr<int32_t[]> carried_[2];
  int sorted_keys_ = 0;              // which of the two
  const int32_t* labels_ = nullptr;  // sorted by value, as all that follow
  std::unique_ptr<double[]> values_;
  std::unique_ptr<double[]> own_values_;    // grouped by class
  std::unique_ptr<uint32_t[]> own_places_;  // of own_values_ in values_
  // The first place whose class is one of the places' from here on before it.
  std::unique_ptr<uint32_t[]> distinct_until_;
  std::unique_ptr<uint32_t[]> run_begin_, run_end_;
  std::unique_ptr<uint32_t[]> singletons_before_;
  SortedFilter sorted_{};
  std::vector<int64_t> next_;
  std::vector<OwnSums> own_;        // [K]
  std::vector<ClassState> states_;  // [K]
  Range duplicates_{0, 0};          // of the last point that had some
  double base_ = 0;  // sum of psi(m) over all points, none of whose neighbours is left out
  std::vector<double> squares_;
  std::vector<double> few_values_;
  std::vector<int64_t> few_places_;
};

std::tuple<Tensor, Tensor> knn_mutual_information(const Tensor& values, const Tensor& labels,
                                                  int64_t num_classes, int64_t n_neighbors) {
  STD_TORCH_CHECK(values.dim() == 2, "values: want [filters, samples]");
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Double, "values: want float64");
  const int64_t filters = values.size(0), samples = values.size(1);
  STD_TORCH_CHECK(filters == 0 || samples < 2 || values.stride(1) == 1,
                  "values: want contiguous rows");
  STD_TORCH_CHECK(samples < std::numeric_limits<uint32_t>::max(), "values: got ", samples,
                  " samples, want less than 2^32 - 1");
  STD_TORCH_CHECK(num_classes >= 0 && num_classes <= std::numeric_limits<int32_t>::max(),
                  "num_classes: got ", num_classes, ", want [0, 2^31)");
  STD_TORCH_CHECK(n_neighbors >= 1, "n_neighbors: got ", n_neighbors, ", want at least 1");
  const Tensor indices = class_indices(labels, "labels", {samples}, num_classes);
  const size_t classes = static_cast<size_t>(num_classes);
  std::vector<int32_t> narrow(static_cast<size_t>(samples));
  std::vector<int64_t> sizes(classes), offsets(classes);
  const int64_t* label = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t c = label[i];
    narrow[static_cast<size_t>(i)] = static_cast<int32_t>(c);
    ++sizes[static_cast<size_t>(c)];
  }
  bool singletons = false;
  int64_t offset = 0;
  for (size_t c = 0; c < classes; ++c) {
    offsets[c] = offset;
    offset += sizes[c];
    singletons |= sizes[c] == 1;
  }
  Tensor per_class = allocate({num_classes, filters}, values.scalar_type());
  Tensor joint = allocate({filters}, values.scalar_type());
  Problem problem(samples);
  problem.samples = samples;
  problem.filters = filters;
  problem.classes = num_classes;
  problem.neighbors = std::min(n_neighbors, samples);
  problem.values = static_cast<const double*>(values.const_data_ptr());
  problem.row_stride = values.stride(0);
  problem.labels = std::move(narrow);
  problem.sizes = std::move(sizes);
  problem.offsets = std::move(offsets);
  problem.singletons = singletons;
  problem.per_class = static_cast<double*>(per_class.mutable_data_ptr());
  problem.joint = static_cast<double*>(joint.mutable_data_ptr());
  torch::stable::parallel_for(0, filters, 1, [&](int64_t begin, int64_t end) {
    FilterEstimate estimate(problem);
    for (int64_t filter = begin; filter < end; ++filter) estimate(filter);
  });
  return {per_class, joint};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(picnn_fast, CPU, m) {
  m.impl("knn_mutual_information", TORCH_BOX(&knn_mutual_information));
}

}  // namespace picnn_fast
