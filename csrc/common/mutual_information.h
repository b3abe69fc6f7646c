#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

// One point of the nearest-neighbour estimate of mutual information.
// picnn_fast/reference/mutual_information.py is the definition.
//
// The k nearest of a value and the value itself are k + 1 neighbours in order, its window. For all
// classes together, a filter is sorted once:
//   own   a point against its own class: its window in the sorted values of its class.
//   rest  a point of another class, against all samples but those of class c: its window among all
//         samples, m = base, unless c has samples there; then the walk outside the window.
// A list of at most 2k + 1 values is searched by brute force in scikit-learn, which rounds
// differently: rounded_distance. Distances are compared as rounded, fl(y - x), never recomputed as
// x + radius. Values are finite.
namespace PICNN_FAST_NAMESPACE {

// One rounding each, on the device too.
PICNN_FAST_HD double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
PICNN_FAST_HD double rounded_sum(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
PICNN_FAST_HD double rounded_root(double a) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(a);
#else
  return sqrt(a);
#endif
}

// Whether scikit-learn searches the k = min(n_neighbors, n - 1) nearest of n by brute force.
PICNN_FAST_HD bool brute_force(int64_t n, int64_t n_neighbors) { return n <= 2 * n_neighbors + 1; }

// The float below a distance, 0 for 0: within it are the points nearer than the distance, and at
// distance 0 the duplicates.
PICNN_FAST_HD double radius_below(double distance) {
  uint64_t bits;
  memcpy(&bits, &distance, sizeof(bits));
  bits -= distance > 0;
  memcpy(&distance, &bits, sizeof(bits));
  return distance;
}

// Where the window of v[j] begins, v ascending with n > k values. `from`: any place at or before
// it, such as 0, or where the window of v[j - 1] begins.
PICNN_FAST_HD int64_t window_begin(const double* v, int64_t n, int64_t j, int64_t k, int64_t from) {
  int64_t begin = from > j - k ? from : j - k;
  while (begin + k + 1 < n && v[j] - v[begin] > v[begin + k + 1] - v[j]) ++begin;
  return begin;
}

// Distance of v[j] to the k-th nearest, given its window.
PICNN_FAST_HD double window_distance(const double* v, int64_t j, int64_t k, int64_t begin) {
  const double below = v[j] - v[begin], above = v[begin + k] - v[j];
  return below > above ? below : above;
}

// (x - y)^2 as scikit-learn's brute force rounds it, the middle term from a matrix product.
PICNN_FAST_HD double rounded_square(double x, double y) {
  const double middle = -2 * rounded_product(x, y);
  const double sum = rounded_sum(rounded_sum(rounded_product(x, x), middle), rounded_product(y, y));
  return sum > 0 ? sum : 0;
}

// As window_distance, but rounded as scikit-learn's brute force does; v in any order. The rounded
// distance does not grow with the distance, so all n count. No memory: O(n) for each of the k, or
// for each bit of the answer where those are fewer.
template <typename Values>  // indexed by place: a pointer, or more
PICNN_FAST_HD double rounded_distance(const Values& v, int64_t n, int64_t j, int64_t k) {
  constexpr int64_t kBits = 63;
  if (k < kBits) {
    double last = -1;
    for (int64_t rank = 0; rank < k;) {
      double next = HUGE_VAL;  // the least above `last`, and how many there are
      int64_t ties = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (i == j) continue;
        const double square = rounded_square(v[j], v[i]);
        if (square > last && square < next) next = square, ties = 0;
        ties += square == next;
      }
      last = next;
      rank += ties;
    }
    return rounded_root(last);
  }
  // Bits of doubles >= 0 are ordered as the doubles are.
  uint64_t bits = 0;
  for (uint64_t bit = uint64_t{1} << (kBits - 1); bit != 0; bit >>= 1) {
    double least;
    const uint64_t trial = bits | bit;
    memcpy(&least, &trial, sizeof(least));
    int64_t below = 0;
    for (int64_t i = 0; i < n; ++i) below += i != j && rounded_square(v[j], v[i]) < least;
    if (below < k) bits = trial;
  }
  double square;
  memcpy(&square, &bits, sizeof(square));
  return rounded_root(square);
}

// The first of the ascending x[floor..at] within radius of `centre`; x[at] is. Galloping from `at`.
PICNN_FAST_HD int64_t first_within(const double* x, int64_t floor, int64_t at, double centre,
                                   double radius) {
  int64_t step = 1;
  while (at - step >= floor && centre - x[at - step] <= radius) {
    at -= step;
    step *= 2;
  }
  int64_t outside = at - step >= floor ? at - step : floor - 1;
  while (at - outside > 1) {
    const int64_t middle = outside + (at - outside) / 2;
    if (centre - x[middle] <= radius)
      at = middle;
    else
      outside = middle;
  }
  return at;
}

// The place behind the last of the ascending x[at..limit) within radius of `centre`; x[at] is.
PICNN_FAST_HD int64_t end_within(const double* x, int64_t at, int64_t limit, double centre,
                                 double radius) {
  int64_t step = 1;
  while (at + step < limit && x[at + step] - centre <= radius) {
    at += step;
    step *= 2;
  }
  int64_t outside = at + step < limit ? at + step : limit;
  while (outside - at > 1) {
    const int64_t middle = at + (outside - at) / 2;
    if (x[middle] - centre <= radius)
      at = middle;
    else
      outside = middle;
  }
  return outside;
}

// One filter, sorted.
struct SortedFilter {
  const double* values;       // ascending
  const int32_t* labels;      // of each value
  const uint32_t* run_begin;  // the run of one label that each value is in: its first place
  const uint32_t* run_end;    // and the place behind its last
  int64_t samples;
};

struct Range {
  int64_t begin, end;
};

// The samples within the radius that place i has when class c, with `missing` > 0 of the places of
// i's window, is no neighbour: places outside the window take their turn, runs of class c skipped
// at once. At least k + 1 samples are not of class c.
PICNN_FAST_HD Range within_without_class(const SortedFilter& f, int64_t i, int64_t k, int64_t begin,
                                         int32_t c, int64_t missing) {
  const double* x = f.values;
  int64_t left = begin - 1, right = begin + k + 1;
  double distance = 0;
  for (; missing > 0; --missing) {
    if (left >= 0 && f.labels[left] == c) left = static_cast<int64_t>(f.run_begin[left]) - 1;
    if (right < f.samples && f.labels[right] == c) right = f.run_end[right];
    const double below = left >= 0 ? x[i] - x[left] : HUGE_VAL;
    const double above = right < f.samples ? x[right] - x[i] : HUGE_VAL;
    if (below <= above) {
      distance = below;
      --left;
    } else {
      distance = above;
      ++right;
    }
  }
  const double radius = radius_below(distance);
  const bool whole = window_distance(x, i, k, begin) <= radius;
  return {first_within(x, 0, whole ? begin : i, x[i], radius),
          end_within(x, whole ? begin + k : i, f.samples, x[i], radius)};
}

}  // namespace PICNN_FAST_NAMESPACE
