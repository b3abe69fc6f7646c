#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../common/information.h"
#include "histogram_walk.cuh"

// What counts tell of the classes, and the gradient of that: a block a filter. Every sum is added
// up in a fixed order.
namespace picnn_fast {
namespace {

// The type that counts are added up in.
template <typename C>
using Sums = std::conditional_t<std::is_same_v<C, float>, float, double>;

template <typename C>
struct Counts {
  const C* data;                    // [N, bins, K]
  int64_t filter, bin, class_step;  // strides in elements
  int64_t bins, K;
  Sums<C>* per_bin;    // [N, bins], for the kernel to work with
  Sums<C>* per_class;  // [N, K]
};

// How the threads of a block share a table: some neighbours along the classes, as many as there
// are, and the rest along the bins.
struct Share {
  int lanes, lane, row, rows;

  __device__ Share(int64_t K, int most) : lanes(1) {
    while (lanes < K && lanes < most) lanes *= 2;
    lane = threadIdx.x % lanes;
    row = threadIdx.x / lanes;
    rows = kThreads / lanes;
  }
};

// The sum over all rows of a share, for each lane; every thread of the block takes part and gets
// its lane's.
template <typename A>
__device__ A sum_rows(A value, const Share& share) {
  __shared__ A part[kThreads];
  __syncthreads();  // what was asked for before has been read
  part[threadIdx.x] = value;
  for (int half = share.rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (share.row < half) part[threadIdx.x] += part[threadIdx.x + half * share.lanes];
  }
  __syncthreads();
  return part[share.lane];
}

// The marginals of a filter, which every thread then finds in memory, and the counts in all.
template <typename C>
struct Marginals {
  using A = Sums<C>;
  const Counts<C>& counts;
  const C* of_filter;
  A *per_bin, *per_class;
  A total, slack;

  __device__ Marginals(const Counts<C>& counts_)
      : counts(counts_), slack(static_cast<A>(counts_.K) * Binary<A>::kEpsilon) {
    const int64_t n = blockIdx.x, bins = counts.bins, K = counts.K;
    of_filter = counts.data + n * counts.filter;
    per_bin = counts.per_bin + n * bins;
    per_class = counts.per_class + n * K;
    const Share rows(K, 32);
    for (int64_t first = 0; first < bins; first += rows.rows) {
      const int64_t b = first + rows.row;
      A sum{0};
      for (int64_t k = rows.lane; b < bins && k < K; k += rows.lanes) sum += at(b, k);
      sum = sum_warp(sum, rows.lanes);
      if (b < bins && rows.lane == 0) per_bin[b] = sum;
    }
    const Share columns(K, kThreads);
    A all{0};
    for (int64_t first = 0; first < K; first += columns.lanes) {
      const int64_t k = first + columns.lane;
      A sum{0};
      for (int64_t b = columns.row; k < K && b < bins; b += columns.rows) sum += at(b, k);
      sum = sum_rows(sum, columns);
      if (columns.row == 0) {
        if (k < K) per_class[k] = sum;
        all += sum;
      }
    }
    total = sum_rows(all, Share(1, 1));  // and a barrier behind what was written
  }

  __device__ A at(int64_t b, int64_t k) const {
    return static_cast<A>(of_filter[b * counts.bin + k * counts.class_step]);
  }
};

template <typename A>
__device__ A positive(A x) {
  return x > A{0} ? A{1} : A{0};
}

// out: [N, K], or [N] by label.
template <typename C>
__global__ void __launch_bounds__(kThreads)
    find_information(Counts<C> counts, bool by_label, bool corrected, Sums<C>* out) {
  using A = Sums<C>;
  const Marginals<C> m(counts);
  const Share all(1, 1), share(counts.K, kThreads);
  A bins_used{0}, classes_used{0}, used{0}, information{0};
  if (corrected) {
    for (int64_t b = threadIdx.x; b < counts.bins; b += kThreads)
      bins_used += positive(m.per_bin[b]);
    bins_used = sum_rows(bins_used, all);
  }
  for (int64_t first = 0; first < counts.K; first += share.lanes) {
    const int64_t k = first + share.lane;
    const bool inside = k < counts.K;
    const A own = inside ? m.per_class[k] : A{0}, others = m.total - own;
    if (!by_label) information = used = A{0};
    for (int64_t b = share.row; inside && b < counts.bins; b += share.rows) {
      const A joint = m.at(b, k), in_bin = m.per_bin[b];
      information += joint * log_ratio(joint, in_bin, own, m.total);
      used += positive(joint);
      if (by_label) continue;
      const A rest = rest_of(joint, in_bin, m.slack);
      information += rest * log_ratio(rest, in_bin, others, m.total);
      used += positive(rest);
    }
    if (by_label) {
      if (share.row == 0) classes_used += positive(own);
      continue;
    }
    A value = sum_rows(information, share) / m.total;
    if (corrected) {
      const A cells = sum_rows(used, share);
      value += correction(bins_used, positive(own) + positive(others), cells, m.total);
    }
    if (inside && share.row == 0) out[blockIdx.x * counts.K + k] = value;
  }
  if (!by_label) return;
  A value = sum_rows(information, all) / m.total;
  if (corrected) {
    const A classes = sum_rows(classes_used, all), cells = sum_rows(used, all);
    value += correction(bins_used, classes, cells, m.total);
  }
  if (threadIdx.x == 0) out[blockIdx.x] = value;
}

// A number for each filter and class, or, with a step of 0, for each filter.
template <typename A>
struct PerClass {
  const A* data;
  int64_t filter, class_step;

  __device__ A operator()(int64_t k) const { return data[blockIdx.x * filter + k * class_step]; }
};

// out: laid out by the strides of `to`.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    find_slopes(Counts<A> counts, bool by_label, PerClass<A> grad, PerClass<A> information, A* out,
                int64_t filter, int64_t bin, int64_t class_step) {
  const Marginals<A> m(counts);
  A shift{0};  // of all slopes: each count is one of those in all
  for (int64_t k = threadIdx.x; k < (by_label ? 1 : counts.K); k += kThreads)
    shift += grad(k) * information(k);
  shift = sum_rows(shift, Share(1, 1));
  const A over_total = A{1} / m.total;
  const Share share(counts.K, 32);
  const auto own = [&](int64_t b, int64_t k) {
    return slope(m.at(b, k), m.per_bin[b], m.per_class[k], m.total);
  };
  const auto of_rest = [&](int64_t b, int64_t k) {
    return slope(rest_of(m.at(b, k), m.per_bin[b], m.slack), m.per_bin[b], m.total - m.per_class[k],
                 m.total);
  };
  for (int64_t first = 0; first < counts.bins; first += share.rows) {
    const int64_t b = first + share.row;
    const int64_t end = b < counts.bins ? counts.K : 0;
    A every{0};  // what is added to the rest of every class
    if (!by_label) {
      for (int64_t k = share.lane; k < end; k += share.lanes) every += grad(k) * of_rest(b, k);
      every = sum_warp(every, share.lanes);
    }
    for (int64_t k = share.lane; k < end; k += share.lanes) {
      const A slopes = by_label ? own(b, k) : own(b, k) - of_rest(b, k);
      out[blockIdx.x * filter + b * bin + k * class_step] =
          (grad(k) * slopes + every - shift) * over_total;
    }
  }
}

}  // namespace
}  // namespace picnn_fast
