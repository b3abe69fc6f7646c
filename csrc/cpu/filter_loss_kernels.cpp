// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "filter_loss_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "scalar.h"
#include "vector.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::Accumulate;
using picnn_fast::FilterLoss;
using picnn_fast::FilterLossKernel;
using picnn_fast::PanelLayout;
using picnn_fast::RunningEstimates;
using picnn_fast::Strides;

// The product of rows with all templates
// -----------------------------------------------------------

// Sums of a tile, in vectors: as many as there are registers for.
constexpr int kMostRows = kVectorBytes == 64 ? 8 : 4;
constexpr int kMostVectors = kVectorBytes == 16 ? 2 : 3;

// a * b + c, in one rounding where the processor does that.
template <typename A>
PICNN_FAST_HD Vector<A> multiply_add(Vector<A> a, Vector<A> b, Vector<A> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return (Vector<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    return (Vector<A>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    return (Vector<A>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (Vector<A>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#else
  return a * b + c;
#endif
}

// Of `rows` rows of P numbers each, sum_ij row[ij]·panels(ij; columns), added to start[row] where
// it is given, times scale.
template <typename A>
struct Product {
  PanelLayout layout;
  const A* panels;
  const A* rows;
  int64_t row_stride;
  const A* start;
  A scale;
  A* out;
  int64_t out_stride;
};

// kRows rows times kVectors vectors of columns, of which `columns` numbers are kept.
template <typename A, int kRows, int kVectors>
void product_tile(const Product<A>& p, int64_t row, const A* first, A* out, int64_t columns) {
  Vector<A> sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Vector<A> start = broadcast(p.start == nullptr ? A{0} : p.start[row + r]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = start;
    }
  }
  const A* x = p.rows + row * p.row_stride;
  const int64_t row_stride = p.row_stride, step = p.layout.column;
  for (int64_t i = 0; i < p.layout.height; ++i) {
    const A* panel = first + i * p.layout.row;
    for (int64_t j = 0; j < p.layout.width; ++j, panel += step, ++x) {
      Vector<A> values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        values[v] = load<A>(panel + v * kLanes<A>);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector<A> factor = broadcast(x[r * row_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = multiply_add<A>(factor, values[v], sums[r][v]);
        }
      }
    }
  }
  const Vector<A> scale = broadcast(p.scale);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vector<A> sum = sums[r][v] * scale;
      A* to = out + r * p.out_stride + v * kLanes<A>;
      const int64_t left = columns - v * kLanes<A>;
      std::memcpy(to, &sum, left < kLanes<A> ? left * sizeof(A) : sizeof(sum));
    }
  }
}

template <typename A, int kRows>
void product_rows(const Product<A>& p, int64_t row) {
  for (int64_t segment = 0; segment < p.layout.segments; ++segment) {
    const A* first = p.panels + segment * p.layout.per_segment + p.layout.first;
    A* out = p.out + row * p.out_stride + segment * p.layout.length;
    // Tiles of nearly the same width, none so narrow that sums wait for one another.
    const int64_t vectors = (p.layout.length + kLanes<A> - 1) / kLanes<A>;
    const int64_t tiles = (vectors + kMostVectors - 1) / kMostVectors;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = vectors * tile / tiles, end = vectors * (tile + 1) / tiles;
      const int64_t at = begin * kLanes<A>;
      const int64_t stop = end * kLanes<A>;
      const int64_t columns = (stop < p.layout.length ? stop : p.layout.length) - at;
      switch (end - begin) {
        case 1:
          product_tile<A, kRows, 1>(p, row, first + at, out + at, columns);
          break;
        case 2:
          product_tile<A, kRows, 2>(p, row, first + at, out + at, columns);
          break;
        default:
          product_tile<A, kRows, kMostVectors>(p, row, first + at, out + at, columns);
      }
    }
  }
}

template <typename A>
void product(const Product<A>& p, int64_t rows) {
  int64_t row = 0;
  for (; row + kMostRows <= rows; row += kMostRows) {
    product_rows<A, kMostRows>(p, row);
  }
  if constexpr (kMostRows > 4) {
    if (row + 4 <= rows) {
      product_rows<A, 4>(p, row);
      row += 4;
    }
  }
  if (row + 2 <= rows) {
    product_rows<A, 2>(p, row);
    row += 2;
  }
  if (row < rows) {
    product_rows<A, 1>(p, row);
  }
}

// Elementwise functions of responses, and their statistics
// -----------------------------------------

// exp(x) within 1.3 ulp; 0 below e^-87, infinity above e^88. NaN stays.
PICNN_FAST_HD float exponential(float x) {
  constexpr float kLeast = -87.0f, kMost = 88.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves whole numbers
  float y = x < kLeast ? kLeast : x;
  y = y > kMost ? kMost : y;
  const float shifted = y * 1.4426950408889634f + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * 0.693359375f) - n * -2.1219444005469057e-4f;
  float e = 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 1.0f / 2;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const uint32_t power = (bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRound) + 127u) << 23;
  e *= bit_cast<float>(power);
  e = x < kLeast ? 0.0f : e;
  return x > kMost ? std::numeric_limits<float>::infinity() : e;
}
PICNN_FAST_HD double exponential(double x) { return std::exp(x); }

// The sum of a row.
template <typename A>
PICNN_FAST_HD A row_sum(const A* row, int64_t count) {
  Vector<A> sums = {};
  int64_t t = 0;
  for (; t + kLanes<A> <= count; t += kLanes<A>) {
    sums += load<A>(row + t);
  }
  A sum = 0;
  for (int l = 0; l < kLanes<A>; ++l) {
    sum += sums[l];
  }
  for (; t < count; ++t) {
    sum += row[t];
  }
  return sum;
}

// Of one filter. Rows of `padded` numbers, the first `templates` of which mean something.
template <typename A>
struct Responses {
  int64_t batch, templates, padded;
  A* responses;  // [B, padded], becomes responses - maxima
  A* weights;    // [B, padded], exp of that
  A* maxima;     // over the batch
  A* sums;       // of the weights over the batch
};

template <typename A>
void exponentials(const Responses<A>& s) {
  A* __restrict__ maxima = s.maxima;
  A* __restrict__ sums = s.sums;
  std::memcpy(maxima, s.responses, s.padded * sizeof(A));
  for (int64_t b = 1; b < s.batch; ++b) {
    const A* __restrict__ row = s.responses + b * s.padded;
    for (int64_t t = 0; t < s.padded; ++t) {
      maxima[t] = row[t] > maxima[t] ? row[t] : maxima[t];
    }
  }
  std::memset(sums, 0, s.padded * sizeof(A));
  for (int64_t b = 0; b < s.batch; ++b) {
    A* __restrict__ row = s.responses + b * s.padded;
    A* __restrict__ weights = s.weights + b * s.padded;
    for (int64_t t = 0; t < s.padded; ++t) {
      const A below = row[t] - maxima[t];
      const A e = exponential(below);
      row[t] = below;
      weights[t] = e;
      sums[t] += e;
    }
  }
}

// The loss of one filter. Weights become dLoss / ds times tau.
template <typename A>
A batch_weights(const Responses<A>& s, A tau, bool with_grad, A* scratch) {
  A* __restrict__ inverses = scratch;
  A* __restrict__ logs = scratch + s.padded;
  A* __restrict__ information = scratch + 2 * s.padded;
  exponentials(s);
  std::memset(scratch, 0, 3 * s.padded * sizeof(A));
  for (int64_t t = 0; t < s.templates; ++t) {
    inverses[t] = 1 / s.sums[t];
    logs[t] = std::log(s.sums[t]);
  }
  const A log_count = std::log(static_cast<A>(s.templates));
  for (int64_t b = 0; b < s.batch; ++b) {
    A* __restrict__ row = s.responses + b * s.padded;
    A* __restrict__ given = s.weights + b * s.padded;
    for (int64_t t = 0; t < s.padded; ++t) {
      given[t] *= inverses[t];
    }
    // Where that sum is as good as 0, so is all it is a factor of; but the logarithm stays finite.
    constexpr A kLeast = std::numeric_limits<A>::min();
    const A marginal = row_sum(given, s.templates);
    const A log_marginal = std::log(marginal < kLeast ? kLeast : marginal) - log_count;
    for (int64_t t = 0; t < s.padded; ++t) {
      const A log_ratio = row[t] - logs[t] - log_marginal;
      row[t] = log_ratio;
      information[t] += given[t] * log_ratio;
    }
  }
  const A prior = 1 / static_cast<A>(s.templates);
  if (with_grad) {
    const A factor = -prior * tau;
    for (int64_t b = 0; b < s.batch; ++b) {
      const A* __restrict__ log_ratio = s.responses + b * s.padded;
      A* __restrict__ weights = s.weights + b * s.padded;
      for (int64_t t = 0; t < s.padded; ++t) {
        weights[t] = factor * weights[t] * (log_ratio[t] - information[t]);
      }
    }
  }
  return -prior * row_sum(information, s.templates);
}

// See moving_average of the reference.
template <typename A>
struct MovingAverage {
  A log_kept, log_share;

  explicit MovingAverage(double momentum)
      : log_kept(static_cast<A>(std::log1p(-momentum))),  // -infinity: nothing is kept
        log_share(static_cast<A>(std::log(momentum))) {}

  A operator()(A old, A fresh) const {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    const A one = old + log_kept, two = fresh + log_share;
    const A greater = one > two ? one : two;
    const A mixed = greater + std::log1p(exponential(-std::abs(one - two)));
    return old == -infinity || log_kept == -infinity ? fresh : mixed;
  }
};

// The estimates of one filter with this batch taken in. What is left in `log_factors` and `factors`
// is, for each template, the log of what its weights are to be multiplied by, and that.
template <typename A>
A renew(const RunningEstimates<A>& estimates, const Responses<A>& s, int64_t filter,
        A* __restrict__ log_factors, A* __restrict__ factors) {
  const A* log_mean = estimates.log_mean + filter * s.templates;
  A* new_log_mean = estimates.new_log_mean + filter * s.templates;
  const A log_batch = std::log(static_cast<A>(s.batch));
  const MovingAverage<A> average(estimates.momentum);
  A greatest = -std::numeric_limits<A>::infinity();
  for (int64_t t = 0; t < s.templates; ++t) {
    const A in_batch = s.maxima[t] + std::log(s.sums[t]) - log_batch;
    new_log_mean[t] = average(log_mean[t], in_batch);
    log_factors[t] = s.maxima[t] - new_log_mean[t];
    factors[t] = exponential(log_factors[t]);
    greatest = log_factors[t] > greatest ? log_factors[t] : greatest;
  }
  A sum = 0;
  for (int64_t t = 0; t < s.templates; ++t) {
    sum += exponential(log_factors[t] - greatest) * s.sums[t];
  }
  const A count = static_cast<A>(s.batch) * static_cast<A>(s.templates);
  const A log_ratio =
      average(estimates.log_ratio[filter], greatest + std::log(sum) - std::log(count));
  estimates.new_log_ratio[filter] = log_ratio;
  return log_ratio;
}

// The loss of one filter of `filters` by running estimates, which it renews. Weights become ds
// times tau; where templates are assigned, only those of the assigned ones count.
template <typename A>
A running_weights(const RunningEstimates<A>& estimates, const Responses<A>& s, A tau,
                  int64_t filter, int64_t filters, A* scratch) {
  A* __restrict__ log_factors = scratch;
  A* __restrict__ factors = scratch + s.padded;
  A* __restrict__ totals = scratch + 2 * s.padded;
  exponentials(s);
  std::memset(scratch, 0, 3 * s.padded * sizeof(A));
  const A log_ratio = renew(estimates, s, filter, log_factors, factors);
  const A share = 1 / (static_cast<A>(s.batch) * static_cast<A>(s.templates));
  if (estimates.assigned != nullptr) {
    A loss = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t t = estimates.assigned[b * filters + filter];
      const A* row = s.responses + b * s.padded;
      A& weight = s.weights[b * s.padded + t];
      const A term = weight * factors[t] * (row[t] + log_factors[t] - log_ratio) * share;
      weight = -term * tau;
      loss -= term;
    }
    return loss;
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    const A* __restrict__ row = s.responses + b * s.padded;
    A* __restrict__ weights = s.weights + b * s.padded;
    for (int64_t t = 0; t < s.padded; ++t) {
      const A term = weights[t] * factors[t] * (row[t] + log_factors[t] - log_ratio) * share;
      totals[t] -= term;
      weights[t] = -term * tau;
    }
  }
  return row_sum(totals, s.templates);
}

// The values of template t times a weight.
template <typename A>
void weighted_template(const PanelLayout& layout, const A* upright, int64_t positions, int64_t t,
                       A weight, A* __restrict__ out) {
  if (t == positions) {
    for (int64_t p = 0; p < positions; ++p) {
      out[p] = -weight;
    }
    return;
  }
  for (int64_t segment = 0; segment < layout.segments; ++segment) {
    const A* __restrict__ values = upright + layout.begin(t) + segment * layout.per_segment;
    for (int64_t p = 0; p < layout.length; ++p) {
      out[segment * layout.length + p] = weight * values[p];
    }
  }
}

// Blocks of filters
// --------------------------------------------------------------------------------

// Between maps in memory and dense rows [filters, batch, positions]: `copy(position of the maps,
// index into the rows)` for each number, so that either side is gone through in short runs.
template <typename Copy>
PICNN_FAST_HD void for_each_position(const Strides& strides, int64_t filters, int64_t batch,
                                     int64_t positions, const Copy& copy) {
  constexpr int64_t kRun = 16;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t begin = 0; begin < positions; begin += kRun) {
      const int64_t end = begin + kRun < positions ? begin + kRun : positions;
      for (int64_t i = 0; i < filters; ++i) {
        for (int64_t p = begin; p < end; ++p) {
          copy(b * strides.batch + i * strides.filter + p * strides.position,
               (i * batch + b) * positions + p);
        }
      }
    }
  }
}

// Rows of one filter, a sample each.
template <typename A>
struct Rows {
  A* first;
  int64_t stride;
};

// The responses of one filter's maps to all templates.
template <typename T, typename A>
void respond(const FilterLoss<T>& f, const Rows<const A>& maps, const Responses<A>& s) {
  const int64_t positions = f.shape.positions;
  Product<A> p{};
  p.layout = f.layout;
  p.panels = f.turned;
  p.rows = maps.first;
  p.row_stride = maps.stride;
  p.scale = f.tau;
  p.out = s.responses;
  p.out_stride = s.padded;
  product(p, s.batch);
  for (int64_t b = 0; b < s.batch; ++b) {
    A* row = s.responses + b * s.padded;
    row[positions] = -f.tau * row_sum(maps.first + b * maps.stride, positions);
    std::memset(row + positions + 1, 0, (s.padded - positions - 1) * sizeof(A));
  }
}

// The gradient of one filter from its weights. `negative` holds as many numbers as there are
// samples.
template <typename T, typename A>
void differentiate(const FilterLoss<T>& f, const Responses<A>& s, int64_t filter, A* negative,
                   const Rows<A>& grad) {
  const int64_t positions = f.shape.positions;
  if (f.running != nullptr && f.running->assigned != nullptr) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t t = f.running->assigned[b * f.shape.filters + filter];
      weighted_template(f.layout, f.upright, positions, t, s.weights[b * s.padded + t],
                        grad.first + b * grad.stride);
    }
    return;
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    negative[b] = -s.weights[b * s.padded + positions];
  }
  Product<A> p{};
  p.layout = f.layout;
  p.panels = f.upright;
  p.rows = s.weights;
  p.row_stride = s.padded;
  p.start = negative;
  p.scale = 1;
  p.out = grad.first;
  p.out_stride = grad.stride;
  product(p, s.batch);
}

template <typename T>
void run(const FilterLoss<T>& f, int64_t begin, int64_t end, Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  const auto [batch, filters, positions] = f.shape;
  Responses<A> s{};
  s.batch = batch;
  s.templates = positions + 1;
  s.padded = picnn_fast::padded_templates(positions);
  s.responses = scratch;
  s.weights = s.responses + batch * s.padded;
  s.maxima = s.weights + batch * s.padded;
  s.sums = s.maxima + s.padded;
  A* of_templates = s.sums + s.padded;
  A* negative = of_templates + 3 * s.padded;
  A* dense = negative + batch;
  const bool in_place = std::is_same_v<T, A> && f.maps_strides.position == 1;
  const bool grad_in_place = f.grad != nullptr && f.grad_strides.position == 1;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * f.block;
    const int64_t count = first + f.block < filters ? f.block : filters - first;
    const T* maps = f.maps + first * f.maps_strides.filter;
    A* grad = f.grad + first * f.grad_strides.filter;
    if (!in_place) {
      for_each_position(f.maps_strides, count, batch, positions, [&](int64_t from, int64_t to) {
        dense[to] = static_cast<A>(widen(maps[from]));
      });
    }
    for (int64_t i = 0; i < count; ++i) {
      const Rows<A> dense_rows{dense + i * batch * positions, positions};
      Rows<const A> rows{dense_rows.first, dense_rows.stride};
      if constexpr (std::is_same_v<T, A>) {
        if (in_place) {
          rows = {maps + i * f.maps_strides.filter, f.maps_strides.batch};
        }
      }
      respond(f, rows, s);
      f.loss[first + i] =
          f.running != nullptr
              ? running_weights(*f.running, s, f.tau, first + i, filters, of_templates)
              : batch_weights(s, f.tau, f.grad != nullptr, of_templates);
      if (f.grad != nullptr) {
        const Rows<A> in_grad{grad + i * f.grad_strides.filter, f.grad_strides.batch};
        differentiate(f, s, first + i, negative, grad_in_place ? in_grad : dense_rows);
      }
    }
    if (f.grad != nullptr && !grad_in_place) {
      for_each_position(f.grad_strides, count, batch, positions,
                        [&](int64_t to, int64_t from) { grad[to] = dense[from]; });
    }
  }
}

constexpr picnn_fast::FilterLossKernels all_kernels() {
  return {FilterLossKernel<float>{run<float>}, FilterLossKernel<double>{run<double>},
          FilterLossKernel<Half>{run<Half>}, FilterLossKernel<BFloat16>{run<BFloat16>}};
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
constexpr FilterLossKernels PICNN_FAST_KERNELS = PICNN_FAST_NAMESPACE::all_kernels();
}  // namespace picnn_fast
