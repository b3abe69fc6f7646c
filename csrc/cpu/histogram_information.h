#pragma once

#include <cstdint>
#include <cstring>

#include "../common/information.h"
#include "histogram_kernels.h"
#include "scalar.h"

// What counts tell of the classes, and the gradient of that.
namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::Counts;
using picnn_fast::Information;
using picnn_fast::InformationBackward;
using picnn_fast::kInformationLanes;
using picnn_fast::padded_bins;
using picnn_fast::Sums;

// Calls visit(b) for a row's bins. A loop of few is vectorised only where it is known how many they
// are, and not unrolled before.
template <typename Visit>
PICNN_FAST_HD void for_bins(int64_t bins, const Visit& visit) {
  if (bins == 4) {
    _Pragma("GCC unroll 1") for (int64_t b = 0; b < 4; ++b) visit(b);
  } else if (bins == 8) {
    _Pragma("GCC unroll 1") for (int64_t b = 0; b < 8; ++b) visit(b);
  } else {
    for (int64_t b = 0; b < bins; ++b) visit(b);
  }
}

// In lanes of their own, and so a sum that compilers take in vectors.
template <typename A>
A sum_row(const A* row, int64_t bins) {
  if (bins == 4) return (row[0] + row[2]) + (row[1] + row[3]);
  alignas(64) A lane[kInformationLanes] = {};
  const int64_t step = bins < kInformationLanes ? bins : kInformationLanes;
  for (int64_t b = 0; b < bins; b += step) {
    for (int64_t l = 0; l < step; ++l) lane[l] += row[b + l];
  }
  for (int64_t half = step / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

// Visits the counts of a filter some classes at a time: rows of their own, a class each, lie a
// power of two apart, and so few stay in the first-level cache.
template <typename Visit>
void for_cells(int64_t bins, int64_t classes, const Visit& visit) {
  constexpr int64_t kClasses = 8;
  for (int64_t first = 0; first < classes; first += kClasses) {
    const int64_t last = first + kClasses < classes ? first + kClasses : classes;
    for (int64_t b = 0; b < bins; ++b) {
      for (int64_t k = first; k < last; ++k) visit(b, k);
    }
  }
}

// The counts of a filter, a row a class, those of the bins and of the classes, and of all.
template <typename A>
struct Marginals {
  A* counts;     // [classes, bins]
  A* per_bin;    // [bins]
  A* spare;      // [bins], 0
  A* per_class;  // [classes]
  A total;
  int64_t bins;  // padded; nothing is in those beyond the last

  template <typename C>
  Marginals(const Counts<C>& in, int64_t n, A* scratch) : bins(padded_bins(in.bins)) {
    counts = scratch;
    per_bin = counts + bins * in.classes;
    spare = per_bin + bins;
    per_class = spare + bins;
    std::memset(scratch, 0, bins * (in.classes + 2) * sizeof(A));
    const C* from = in.counts + n * in.filter_stride;
    for_cells(in.bins, in.classes, [&](int64_t b, int64_t k) {
      counts[k * bins + b] = static_cast<A>(from[b * in.bin_stride + k * in.class_stride]);
    });
    total = A{0};
    for (int64_t k = 0; k < in.classes; ++k) {
      const A* row = counts + k * bins;
      for (int64_t b = 0; b < bins; ++b) per_bin[b] += row[b];
      per_class[k] = sum_row(row, bins);
      total += per_class[k];
    }
  }
};

template <typename A>
PICNN_FAST_HD A positive(A x) {
  return x > A{0} ? A{1} : A{0};
}

// Of one class, and of it against the rest: the information times the total, and, if it is asked
// for, how many cells are in use.
template <typename A>
struct ClassSums {
  A information, used;
};
template <bool kRest, typename A>
ClassSums<A> sum_class(const Marginals<A>& m, int64_t k, A slack, bool corrected) {
  const A* __restrict__ row = m.counts + k * m.bins;
  const A* __restrict__ per_bin = m.per_bin;
  A* __restrict__ terms = m.spare;
  const A own = m.per_class[k], total = m.total, others = total - own;
  for_bins(m.bins, [=](int64_t b) {
    A term = row[b] * log_ratio(row[b], per_bin[b], own, total);
    if constexpr (kRest) {
      const A rest = rest_of(row[b], per_bin[b], slack);
      term += rest * log_ratio(rest, per_bin[b], others, total);
    }
    terms[b] = term;
  });
  ClassSums<A> sums{sum_row(terms, m.bins), A{0}};
  if (!corrected) return sums;
  for (int64_t b = 0; b < m.bins; ++b) {
    terms[b] = positive(row[b]) + (kRest ? positive(rest_of(row[b], per_bin[b], slack)) : A{0});
  }
  sums.used = sum_row(terms, m.bins);
  return sums;
}

template <typename C>
void information(const Information<C>& h, Sums<C>* scratch, int64_t begin, int64_t end) {
  using A = Sums<C>;
  const int64_t classes = h.in.classes;
  const A slack = static_cast<A>(classes) * Binary<A>::kEpsilon;
  for (int64_t n = begin; n < end; ++n) {
    const Marginals<A> m(h.in, n, scratch);
    A bins_used{0}, classes_used{0};
    for (int64_t b = 0; h.corrected && b < m.bins; ++b) bins_used += positive(m.per_bin[b]);
    ClassSums<A> all{};
    for (int64_t k = 0; k < classes; ++k) {
      if (h.by_label) {
        const ClassSums<A> sums = sum_class<false>(m, k, slack, h.corrected);
        all.information += sums.information;
        all.used += sums.used;
        classes_used += positive(m.per_class[k]);
        continue;
      }
      const ClassSums<A> sums = sum_class<true>(m, k, slack, h.corrected);
      A& out = h.out[n * classes + k];
      out = sums.information / m.total;
      if (!h.corrected) continue;
      const A two = positive(m.per_class[k]) + positive(m.total - m.per_class[k]);
      out += correction(bins_used, two, sums.used, m.total);
    }
    if (!h.by_label) continue;
    h.out[n] = all.information / m.total;
    if (h.corrected) h.out[n] += correction(bins_used, classes_used, all.used, m.total);
  }
}

// Of a class, in place of its counts: what only they add to the gradient times the total; and to
// `every`, what they add to that of all classes, as part of the rest.
template <typename A>
void slopes_of_class(const Marginals<A>& m, int64_t k, A slack, A weight) {
  A* __restrict__ row = m.counts + k * m.bins;
  const A* __restrict__ per_bin = m.per_bin;
  A* __restrict__ every = m.spare;
  const A own = m.per_class[k], total = m.total, others = total - own;
  for_bins(m.bins, [=](int64_t b) {
    const A rest = slope(rest_of(row[b], per_bin[b], slack), per_bin[b], others, total);
    row[b] = weight * (slope(row[b], per_bin[b], own, total) - rest);
    every[b] += weight * rest;
  });
}
template <typename A>
void slopes_by_label(const Marginals<A>& m, int64_t k, A weight) {
  A* __restrict__ row = m.counts + k * m.bins;
  const A* __restrict__ per_bin = m.per_bin;
  const A own = m.per_class[k], total = m.total;
  for_bins(m.bins, [=](int64_t b) { row[b] = weight * slope(row[b], per_bin[b], own, total); });
}

template <typename C>
void information_backward(const InformationBackward<C>& h, C* scratch, int64_t begin, int64_t end) {
  const C slack = static_cast<C>(h.in.classes) * Binary<C>::kEpsilon;
  for (int64_t n = begin; n < end; ++n) {
    const Marginals<C> m(h.in, n, scratch);
    const C* grad = h.grad + n * h.grad_filter_stride;
    const C* told = h.information + n * h.information_filter_stride;
    C shift{0};
    for (int64_t k = 0; k < h.in.classes; ++k) {
      if (h.by_label) {
        slopes_by_label(m, k, grad[0]);
      } else {
        const C weight = grad[k * h.grad_class_stride];
        slopes_of_class(m, k, slack, weight);
        shift += weight * told[k * h.information_class_stride];
      }
    }
    if (h.by_label) shift = grad[0] * told[0];
    C* out = h.out + n * h.out_filter_stride;
    for_cells(h.in.bins, h.in.classes, [&](int64_t b, int64_t k) {
      const C slopes = m.counts[k * m.bins + b] + m.spare[b] - shift;
      out[b * h.out_bin_stride + k * h.out_class_stride] = slopes / m.total;
    });
  }
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE
