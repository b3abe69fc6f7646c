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
#include "streaming.h"
#include "transpose.h"
#include "vector.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::Accumulate;
using picnn_fast::FilterLoss;
using picnn_fast::FilterLossKernel;
using picnn_fast::RunningEstimates;
using picnn_fast::Stencil;
using picnn_fast::Strides;
using picnn_fast::Tap;

template <typename A>
constexpr int64_t kLine = picnn_fast::kLineNumbers<A>;

// Vectors of a line.
template <typename A>
constexpr int kParts = 64 / kVectorBytes;

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

// Stencils
// -----------------------------------------------------------------------------------------------

// Columns of the output worked on together, as there are registers: their sums are independent of
// one another, and enough for the processor not to wait for one.
constexpr int kMostColumns = kVectorBytes == 64 ? 16 : 8;

// Where lines go, one `stride` numbers after the other, and whether past the caches.
template <typename A>
struct Output {
  A* first;
  int64_t stride;
  bool stream;
};

// Taps side by side are taken together: a line that one column reads for a tap, its neighbour reads
// for the next.
constexpr int kMostTaps = 3;

template <typename A, int kColumns, int kTaps>
PICNN_FAST_HD void add_taps(const Tap<A>* taps, const A* from, Vector<A>* sums) {
  Vector<A> values[kTaps], lines[kTaps];
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; ++t) {
    values[t] = broadcast(taps[t].value);
    lines[t] = load<A>(from + t * kLine<A>);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kColumns; ++k) {
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) {
      sums[k] = multiply_add<A>(values[t], lines[(k + t) % kTaps], sums[k]);
    }
    if (k + 1 < kColumns) {
      lines[k % kTaps] = load<A>(from + (k + kTaps) * kLine<A>);
    }
  }
}

// A vector of each of kColumns lines of row i from column j on, with `rest` added, times `scale`.
template <typename A, int kColumns>
void stencil_tile(const Stencil<A>& s, const A* in, int64_t i, int64_t j, Vector<A> rest, A scale,
                  const Output<A>& out) {
  Vector<A> sums[kColumns] = {};
  if (s.taps != nullptr) {
    const A* here = in + (s.margin + i * (s.width + s.margin) + j) * kLine<A>;
    const Tap<A>* end = s.taps + s.begins[2 * s.height - 1 - i];
    for (const Tap<A>* tap = s.taps + s.begins[s.height - 1 - i]; tap != end;) {
      const A* from = here + tap->line * kLine<A>;
      const auto add = [&](auto taps) {
        add_taps<A, kColumns, taps>(tap, from, sums);
        tap += taps;
      };
      const int32_t last = tap->line + kMostTaps - 1;
      if (end - tap >= kMostTaps && tap[kMostTaps - 1].line == last) {
        add(std::integral_constant<int, kMostTaps>{});
      } else if (end - tap >= 2 && tap[1].line == tap->line + 1) {
        add(std::integral_constant<int, 2>{});
      } else {
        add(std::integral_constant<int, 1>{});
      }
    }
  } else {
    const int64_t columns = 2 * s.width - 1;
    for (int64_t y = 0; y < s.height; ++y) {
      const A* values = s.table + (y - i + s.height - 1) * columns + s.width - 1 - j;
      for (int64_t x = 0; x < s.width; ++x, ++values, in += kLine<A>) {
        const Vector<A> from = load<A>(in);
#pragma GCC unroll 16
        for (int k = 0; k < kColumns; ++k) {
          sums[k] = multiply_add<A>(broadcast(values[-k]), from, sums[k]);
        }
      }
    }
  }
  const Vector<A> factor = broadcast(scale);
#pragma GCC unroll 16
  for (int k = 0; k < kColumns; ++k) {
    sums[k] = (sums[k] + rest) * factor;
    A* to = out.first + k * out.stride;
    out.stream ? stream_vector<A>(sums[k], to) : store<A>(sums[k], to);
  }
}

template <typename A, int kColumns = kMostColumns>
PICNN_FAST_HD void stencil_columns(const Stencil<A>& s, const A* in, int64_t i, int64_t j,
                                   int64_t columns, Vector<A> rest, A scale, const Output<A>& out) {
  if constexpr (kColumns > 1) {
    if (columns < kColumns) {
      return stencil_columns<A, kColumns - 1>(s, in, i, j, columns, rest, scale, out);
    }
  }
  stencil_tile<A, kColumns>(s, in, i, j, rest, scale, out);
}

// Of all positions, with their margins where the stencil has any, and rest[a number of a line].
template <typename A>
void slide(const Stencil<A>& s, const A* in, const A* rest, A scale, const Output<A>& out) {
  // Tiles of nearly the same width.
  const int64_t tiles = picnn_fast::ceil_div(s.width, kMostColumns);
  for (int64_t i = 0; i < s.height; ++i) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t j = s.width * tile / tiles, end = s.width * (tile + 1) / tiles;
      for (int part = 0; part < kParts<A>; ++part) {
        const int64_t at = part * kLanes<A>;
        stencil_columns<A>(
            s, in + at, i, j, end - j, load<A>(rest + at), scale,
            {out.first + (i * s.width + j) * out.stride + at, out.stride, out.stream});
      }
    }
  }
}

// Lines of positions into `padded` with margins, and their sum.
template <typename A>
void pad(const Stencil<A>& s, const A* in, A* padded, A* sum) {
  for (int part = 0; part < kParts<A>; ++part) {
    const A* from = in + part * kLanes<A>;
    A* to = padded + s.margin * kLine<A> + part * kLanes<A>;
    Vector<A> total = {};
    for (int64_t i = 0; i < s.height; ++i, to += s.margin * kLine<A>) {
      Vector<A> of_row = {};
      for (int64_t j = 0; j < s.width; ++j, from += kLine<A>, to += kLine<A>) {
        const Vector<A> x = load<A>(from);
        of_row += x;
        store<A>(x, to);
      }
      total += of_row;
    }
    store<A>(total, sum + part * kLanes<A>);
  }
}

// Elementwise functions of responses, and their statistics
// -----------------------------------------------------------------------------------------------

// exp(x) within 1.3 ulp; 0 below e^-87, infinity above e^88. NaN stays.
PICNN_FAST_HD Vector<float> exponential(Vector<float> x) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Vector<float> least = broadcast(-87.0f), most = broadcast(88.0f);
  const Vector<float> round = broadcast(12582912.0f);  // 1.5 * 2^23 leaves whole numbers
#if defined(__AVX512F__)
  const Vector<float> y = x;  // scalef takes any n
#else
  Vector<float> y = x < least ? least : x;
  y = y > most ? most : y;
#endif
  const Vector<float> shifted = multiply_add<float>(y, broadcast(1.4426950408889634f), round);
  const Vector<float> n = shifted - round;
  Vector<float> r = multiply_add<float>(n, broadcast(-0.693359375f), y);
  r = multiply_add<float>(n, broadcast(2.1219444005469057e-4f), r);
  Vector<float> e = broadcast(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) {
    e = multiply_add<float>(e, r, broadcast(c));
  }
#if defined(__AVX512F__)
  e = (Vector<float>)_mm512_scalef_ps((__m512)e, (__m512)n);
#else
  using Bits = Vector<int32_t>;
  e *= (Vector<float>)(((Bits)shifted - (Bits)round + 127) << 23);
#endif
  e = x < least ? Vector<float>{} : e;
  return x > most ? broadcast(kInfinity) : e;
}
PICNN_FAST_HD Vector<double> exponential(Vector<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) {
    x[l] = std::exp(x[l]);
  }
  return x;
}

// Of the filters of a block: `steps` times a line for each of the P + 1 templates.
template <typename A>
struct Responses {
  int64_t batch, templates, steps, filters;
  A* responses;  // [steps, P + 1, line], becomes responses - maxima
  A* weights;    // [steps, P + 1, line], exp of that
  A* maxima;     // [P + 1, line], over the batch
  A* sums;       // [P + 1, line], of the weights over the batch

  int64_t numbers() const { return templates * kLine<A>; }
  // Numbers of a line that are of a sample.
  int64_t valid(int64_t step) const {
    const int64_t left = batch * filters - step * kLine<A>;
    return left < kLine<A> ? left : kLine<A>;
  }
};

// Those of a block, `count` from `first` on of `all`; a line may have room for more.
struct Filters {
  int64_t first, count, all;
};

// Of each template what the samples of a line come to together, in place of each.
template <typename A, typename Join>
void join_samples(const Responses<A>& s, A* lines, const Join& join) {
  if (s.filters == kLine<A>) {
    return;
  }
  for (A* line = lines; line < lines + s.numbers(); line += kLine<A>) {
    for (int64_t i = 0; i < s.filters; ++i) {
      for (int64_t l = i + s.filters; l < kLine<A>; l += s.filters) {
        line[i] = join(line[i], line[l]);
      }
    }
    for (int64_t l = s.filters; l < kLine<A>; ++l) {
      line[l] = line[l - s.filters];
    }
  }
}

template <typename A>
void exponentials(const Responses<A>& s) {
  join_samples(s, s.maxima, [](A one, A other) { return one < other ? other : one; });
  std::memset(s.sums, 0, s.numbers() * sizeof(A));
  for (int64_t step = 0; step < s.steps; ++step) {
    A* row = s.responses + step * s.numbers();
    A* weights = s.weights + step * s.numbers();
    for (int64_t t = 0; t < s.numbers(); t += kLanes<A>) {
      const Vector<A> below = load<A>(row + t) - load<A>(s.maxima + t);
      const Vector<A> e = exponential(below);
      store<A>(below, row + t);
      store<A>(e, weights + t);
      store<A>(load<A>(s.sums + t) + e, s.sums + t);
    }
  }
  join_samples(s, s.sums, [](A one, A other) { return one + other; });
}

// The sum of all lines, in partial sums that do not wait for one another.
template <typename A>
void sum_of_lines(const A* lines, int64_t count, A* sum) {
  constexpr int kSums = 8;
  for (int64_t l = 0; l < kLine<A>; l += kLanes<A>) {
    Vector<A> sums[kSums] = {};
    const A* line = lines + l;
    int64_t left = count;
    for (; left >= kSums; left -= kSums) {
#pragma GCC unroll 8
      for (int k = 0; k < kSums; ++k, line += kLine<A>) {
        sums[k] += load<A>(line);
      }
    }
    for (; left > 0; --left, line += kLine<A>) {
      sums[left] += load<A>(line);
    }
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) {
        sums[k] += sums[k + half];
      }
    }
    store<A>(sums[0], sum + l);
  }
}

// Weights of one step become p(x|T), responses log(p(x|T) / p(x)).
template <typename A>
void log_ratios(const Responses<A>& s, int64_t step, const A* inverses, const A* logs,
                A* information) {
  A* row = s.responses + step * s.numbers();
  A* given = s.weights + step * s.numbers();
  for (int64_t t = 0; t < s.numbers(); t += kLanes<A>) {
    store<A>(load<A>(given + t) * load<A>(inverses + t), given + t);
  }
  alignas(64) A log_marginal[kLine<A>];
  sum_of_lines(given, s.templates, log_marginal);
  // Where that sum is as good as 0, so is all it is a factor of; but the logarithm stays finite.
  constexpr A kLeast = std::numeric_limits<A>::min();
  const A log_count = std::log(static_cast<A>(s.templates));
  for (A& marginal : log_marginal) {
    marginal = std::log(marginal < kLeast ? kLeast : marginal) - log_count;
  }
  for (int64_t t = 0; t < s.numbers(); t += kLine<A>) {
    for (int64_t l = 0; l < kLine<A>; l += kLanes<A>) {
      const Vector<A> log_ratio =
          load<A>(row + t + l) - load<A>(logs + t + l) - load<A>(log_marginal + l);
      store<A>(log_ratio, row + t + l);
      const Vector<A> term = load<A>(given + t + l) * log_ratio;
      store<A>(load<A>(information + t + l) + term, information + t + l);
    }
  }
}

// The losses of the filters of a block. Weights become dLoss / ds times tau.
template <typename A>
void batch_weights(const Responses<A>& s, A tau, bool with_grad, A* scratch, A* loss) {
  A* inverses = scratch;
  A* logs = scratch + s.numbers();
  A* information = scratch + 2 * s.numbers();
  exponentials(s);
  std::memset(information, 0, s.numbers() * sizeof(A));
  for (int64_t t = 0; t < s.numbers(); ++t) {
    inverses[t] = 1 / s.sums[t];
    logs[t] = std::log(s.sums[t]);
  }
  for (int64_t step = 0; step < s.steps; ++step) {
    log_ratios(s, step, inverses, logs, information);
  }
  join_samples(s, information, [](A one, A other) { return one + other; });
  const A prior = 1 / static_cast<A>(s.templates);
  if (with_grad) {
    const Vector<A> factor = broadcast(-prior * tau);
    for (int64_t step = 0; step < s.steps; ++step) {
      const A* log_ratio = s.responses + step * s.numbers();
      A* weights = s.weights + step * s.numbers();
      for (int64_t t = 0; t < s.numbers(); t += kLanes<A>) {
        const Vector<A> above = load<A>(log_ratio + t) - load<A>(information + t);
        store<A>(factor * load<A>(weights + t) * above, weights + t);
      }
    }
  }
  sum_of_lines(information, s.templates, loss);
  for (int64_t l = 0; l < kLine<A>; ++l) {
    loss[l] *= -prior;
  }
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
    const A mixed = greater + std::log1p(std::exp(-std::abs(one - two)));
    return old == -infinity || log_kept == -infinity ? fresh : mixed;
  }
};

// The estimates of a filter, number `i` of its block, with this batch taken in. What is left in
// `log_factors` is, for each template, the log of what its weights are to be multiplied by.
template <typename A>
A renew(const RunningEstimates<A>& estimates, const Responses<A>& s, int64_t filter, int64_t i,
        A* log_factors) {
  const A* log_mean = estimates.log_mean + filter * s.templates;
  A* new_log_mean = estimates.new_log_mean + filter * s.templates;
  const A log_batch = std::log(static_cast<A>(s.batch));
  const MovingAverage<A> average(estimates.momentum);
  A greatest = -std::numeric_limits<A>::infinity();
  for (int64_t t = 0; t < s.templates; ++t) {
    const int64_t at = t * kLine<A> + i;
    const A in_batch = s.maxima[at] + std::log(s.sums[at]) - log_batch;
    new_log_mean[t] = average(log_mean[t], in_batch);
    log_factors[at] = s.maxima[at] - new_log_mean[t];
    greatest = log_factors[at] > greatest ? log_factors[at] : greatest;
  }
  A sum = 0;
  for (int64_t at = i; at < s.numbers(); at += kLine<A>) {
    sum += std::exp(log_factors[at] - greatest) * s.sums[at];
  }
  const A count = static_cast<A>(s.batch) * static_cast<A>(s.templates);
  const A log_ratio =
      average(estimates.log_ratio[filter], greatest + std::log(sum) - std::log(count));
  estimates.new_log_ratio[filter] = log_ratio;
  return log_ratio;
}

// The template that map `l` of a line is assigned to.
template <typename A>
int64_t assigned_to(const RunningEstimates<A>& estimates, const Responses<A>& s,
                    const Filters& block, int64_t step, int64_t l) {
  const int64_t i = l % s.filters, b = (step * kLine<A> + l) / s.filters;
  return estimates.assigned[b * block.all + block.first + (i < block.count ? i : 0)];
}

// Of the one template each map is assigned to: other weights are left as they are.
template <typename A>
void assigned_weights(const RunningEstimates<A>& estimates, const Responses<A>& s, A tau,
                      const Filters& block, const A* log_factors, const A* factors,
                      const A* log_ratio, A* loss) {
  const A share = 1 / (static_cast<A>(s.batch) * static_cast<A>(s.templates));
  std::memset(loss, 0, kLine<A> * sizeof(A));
  for (int64_t step = 0; step < s.steps; ++step) {
    const A* row = s.responses + step * s.numbers();
    A* weights = s.weights + step * s.numbers();
    for (int64_t l = 0; l < s.valid(step); ++l) {
      const int64_t t = assigned_to(estimates, s, block, step, l) * kLine<A> + l;
      const A ratio = row[t] + log_factors[t] - log_ratio[l];
      const A term = weights[t] * factors[t] * ratio * share;
      loss[l % s.filters] -= term;
      weights[t] = -term * tau;
    }
  }
}

// The losses of the filters of a block by running estimates, which they renew. Weights become ds
// times tau; where templates are assigned, only those of the assigned ones count.
template <typename A>
void running_weights(const RunningEstimates<A>& estimates, const Responses<A>& s, A tau,
                     const Filters& block, A* scratch, A* loss) {
  A* log_factors = scratch;
  A* factors = scratch + s.numbers();
  A* totals = scratch + 2 * s.numbers();
  exponentials(s);
  std::memset(scratch, 0, 3 * s.numbers() * sizeof(A));
  alignas(64) A log_ratio[kLine<A>] = {};
  for (int64_t i = 0; i < block.count; ++i) {
    log_ratio[i] = renew(estimates, s, block.first + i, i, log_factors);
  }
  const auto first_sample = [](A one, A) { return one; };
  join_samples(s, log_factors, first_sample);
  for (int64_t l = s.filters; l < kLine<A>; ++l) {
    log_ratio[l] = log_ratio[l - s.filters];
  }
  for (int64_t t = 0; t < s.numbers(); t += kLanes<A>) {
    store<A>(exponential(load<A>(log_factors + t)), factors + t);
  }
  if (estimates.assigned != nullptr) {
    return assigned_weights(estimates, s, tau, block, log_factors, factors, log_ratio, loss);
  }
  const Vector<A> share = broadcast(1 / (static_cast<A>(s.batch) * static_cast<A>(s.templates)));
  const Vector<A> minus_tau = broadcast(-tau);
  for (int64_t step = 0; step < s.steps; ++step) {
    const A* row = s.responses + step * s.numbers();
    A* weights = s.weights + step * s.numbers();
    for (int64_t t = 0; t < s.numbers(); t += kLanes<A>) {
      const Vector<A> factor = load<A>(weights + t) * load<A>(factors + t);
      const Vector<A> ratio =
          load<A>(row + t) + load<A>(log_factors + t) - load<A>(log_ratio + t % kLine<A>);
      const Vector<A> term = factor * ratio * share;
      store<A>(load<A>(totals + t) - term, totals + t);
      store<A>(minus_tau * term, weights + t);
    }
  }
  join_samples(s, totals, [](A one, A other) { return one + other; });
  sum_of_lines(totals, s.templates, loss);
}

// Maps and lines
// -----------------------------------------------------------------------------------------------

// Where the numbers of a line begin in memory: maps of some samples and filters. Numbers that are
// no map's begin where the first does.
template <typename A>
struct Origins {
  int64_t at[kLine<A>];
  bool full;  // a map for every number
};

template <typename A>
Origins<A> origins_of(const Responses<A>& s, const Filters& block, const Strides& strides,
                      int64_t step) {
  Origins<A> origins{};
  const int64_t sample = step * (kLine<A> / s.filters);
  origins.full = s.valid(step) == kLine<A> && block.count == s.filters;
  for (int64_t l = 0; l < kLine<A>; ++l) {
    const int64_t i = l % s.filters, b = sample + l / s.filters;
    const bool valid = i < block.count && b < s.batch;
    origins.at[l] =
        (valid ? b : sample) * strides.batch + (block.first + (valid ? i : 0)) * strides.filter;
  }
  return origins;
}

// Asks for the maps of a line. (Inlined: compilers drop calls of functions that only ask.)
template <typename T, typename A>
PICNN_FAST_HD void prefetch_maps(const FilterLoss<T>& f, const Origins<A>& origins) {
  constexpr int kSecondLevel = 2;
  constexpr int64_t kNumbers = 64 / sizeof(T);
  const int64_t positions = f.shape.positions, stride = f.maps_strides.position;
  if (f.maps_strides.filter == 1) {
    for (int64_t p = 0; p < positions; ++p) {
      __builtin_prefetch(f.maps + origins.at[0] + p * stride, /*rw=*/0, kSecondLevel);
    }
  } else if (stride == 1) {
    for (int64_t l = 0; l < kLine<A>; ++l) {
      for (int64_t p = 0; p < positions; p += kNumbers) {
        __builtin_prefetch(f.maps + origins.at[l] + p, /*rw=*/0, kSecondLevel);
      }
    }
  }
}

template <typename T, typename A>
void widen_row(const T* from, int64_t count, A* to) {
  int64_t p = 0;
  for (; p + kLanes<A> <= count; p += kLanes<A>) {
    store<A>(load<A>(from + p), to + p);
  }
  for (; p < count; ++p) {
    to[p] = widen(from[p]);
  }
}

// The maps of a line, position by position. `rows` has room for them.
template <typename T, typename A>
void load_lines(const FilterLoss<T>& f, const Origins<A>& origins, A* rows, A* lines) {
  const int64_t positions = f.shape.positions, stride = f.maps_strides.position;
  if (f.maps_strides.filter == 1 && origins.full && f.filters == kLine<A>) {
    const T* from = f.maps + origins.at[0];
    for (int64_t p = 0; p < positions; ++p, from += stride, lines += kLine<A>) {
      for (int64_t l = 0; l < kLine<A>; l += kLanes<A>) {
        store<A>(load<A>(from + l), lines + l);
      }
    }
    return;
  }
  if constexpr (std::is_same_v<T, A>) {
    if (f.maps_strides.filter == 1 && origins.full && f.filters >= kRun<A>) {
      for (int64_t p = 0; p < positions; ++p, lines += kLine<A>) {
        for (int64_t l = 0; l < kLine<A>; l += kLanes<A>) {
          store<A>(load_runs(f.maps + p * stride, origins.at + l), lines + l);
        }
      }
      return;
    }
  }
  if (stride != 1 || positions < kRun<A>) {
    for (int64_t p = 0; p < positions; ++p, lines += kLine<A>) {
      for (int64_t l = 0; l < kLine<A>; ++l) {
        lines[l] = widen(f.maps[origins.at[l] + p * stride]);
      }
    }
    return;
  }
  const int64_t* at = origins.at;
  const A* from;
  int64_t begins[kLine<A>];
  if constexpr (std::is_same_v<T, A>) {
    from = f.maps;
  } else {
    for (int64_t l = 0; l < kLine<A>; ++l) {
      begins[l] = l * positions;
      widen_row(f.maps + at[l], positions, rows + begins[l]);
    }
    at = begins;
    from = rows;
  }
  for (int64_t p = 0; p < positions; p += kRun<A>) {
    p = p < positions - kRun<A> ? p : positions - kRun<A>;
    for (int64_t l = 0; l < kLine<A>; l += kLanes<A>) {
      Vector<A> runs[kRun<A>];
#pragma GCC unroll 4
      for (int k = 0; k < kRun<A>; ++k) {
        runs[k] = load_runs(from + p, at + l + k);
      }
      transpose<A, kRun<A>>(runs);
#pragma GCC unroll 4
      for (int k = 0; k < kRun<A>; ++k) {
        store<A>(runs[k], lines + (p + k) * kLine<A> + l);
      }
    }
  }
}

// The inverse, for those numbers that are a map's.
template <typename T, typename A>
void store_lines(const FilterLoss<T>& f, const Responses<A>& s, const Filters& block, int64_t step,
                 const A* lines, Sink<A>& sink) {
  const Strides& strides = f.grad_strides;
  const int64_t positions = f.shape.positions;
  const Origins<A> origins = origins_of(s, block, strides, step);
  A* first = f.grad + origins.at[0];
  if (strides.filter == 1 && origins.full && f.filters >= kRun<A>) {
    for (int64_t p = 0; p < positions; ++p, lines += kLine<A>) {
      for (int64_t l = 0; l < kLine<A>; l += kLanes<A>) {
        store_runs<A>(load<A>(lines + l), f.grad + p * strides.position, origins.at + l);
      }
    }
    return;
  }
  if (!origins.full || strides.position != 1 || positions < kRun<A>) {
    const int64_t valid = s.valid(step);
    for (int64_t l = 0; l < valid; ++l) {
      for (int64_t p = 0; p < positions && l % s.filters < block.count; ++p) {
        f.grad[origins.at[l] + p * strides.position] = lines[p * kLine<A> + l];
      }
    }
    return;
  }
  const bool dense = f.filters == kLine<A> && strides.filter == positions;
  A* to = dense ? sink.open(first, kLine<A> * positions) : first;
  for (int64_t p = 0; p < positions; p += kRun<A>) {
    p = p < positions - kRun<A> ? p : positions - kRun<A>;
    for (int64_t l = 0; l < kLine<A>; l += kLanes<A>) {
      Vector<A> runs[kRun<A>];
#pragma GCC unroll 4
      for (int k = 0; k < kRun<A>; ++k) {
        runs[k] = load<A>(lines + (p + k) * kLine<A> + l);
      }
      transpose<A, kRun<A>>(runs);
#pragma GCC unroll 4
      for (int k = 0; k < kRun<A>; ++k) {
        store_runs<A>(runs[k], to + p - origins.at[0], origins.at + l + k);
      }
    }
  }
  if (dense) {
    sink.close();
  }
}

// Blocks of filters
// -----------------------------------------------------------------------------------------------

// What a thread works in.
template <typename A>
struct Scratch {
  Responses<A> s;
  A* of_templates;  // [3, P + 1, line]
  A* lines;         // [P, line]
  A* rows;          // [line, P]
  A* padded;        // a map with its margins
};

template <typename T, typename A>
Scratch<A> scratch_of(const FilterLoss<T>& f, A* memory) {
  Scratch<A> scratch{};
  const auto take = [&](int64_t lines) {
    A* begin = memory;
    memory += lines * kLine<A>;
    return begin;
  };
  Responses<A>& s = scratch.s;
  s.batch = f.shape.batch;
  s.templates = f.shape.positions + 1;
  s.steps = f.steps();
  s.filters = f.filters;
  s.responses = take(s.steps * s.templates);
  s.weights = take(s.steps * s.templates);
  s.maxima = take(s.templates);
  s.sums = take(s.templates);
  scratch.of_templates = take(3 * s.templates);
  scratch.lines = take(f.shape.positions);
  scratch.rows = take(f.shape.positions);
  scratch.padded = memory;
  return scratch;
}

// Lines of positions, or of weights: sum_q stencil(q - p)·in[q] + rest·sum_q in[q] - without.
template <typename A>
void apply(const Stencil<A>& stencil, const A* in, const A* without, A scale, A* padded, A* sum,
           const Output<A>& out) {
  pad(stencil, in, padded, sum);
  alignas(64) A rest[kLine<A>];
  for (int64_t l = 0; l < kLine<A>; ++l) {
    const A of_all = stencil.taps == nullptr ? A{0} : stencil.rest * sum[l];
    rest[l] = of_all - (without == nullptr ? A{0} : without[l]);
  }
  slide(stencil, padded, rest, scale, out);
}

// Responses of those maps of a line whose sum is not finite, by all values of the template:
// differences are lost in it.
template <typename A>
void respond_directly(const Stencil<A>& given, A tau, const A* sum, const Scratch<A>& scratch,
                      A* row) {
  bool finite = true;
  for (int64_t l = 0; l < kLine<A>; ++l) {
    finite &= std::isfinite(sum[l]);
  }
  if (finite || given.taps == nullptr) {
    return;
  }
  Stencil<A> stencil = given;
  stencil.taps = nullptr;
  alignas(64) constexpr A kNone[kLine<A>] = {};
  slide<A>(stencil, scratch.lines, kNone, tau, {scratch.rows, kLine<A>, /*stream=*/false});
  for (int64_t at = 0; at < stencil.height * stencil.width * kLine<A>; ++at) {
    const A of_map = sum[at % kLine<A>];
    row[at] = std::isfinite(of_map) ? row[at] : scratch.rows[at];
  }
}

// The responses of a block's maps to all templates, and their maxima in each number of a line.
template <typename T, typename A>
void respond(const FilterLoss<T>& f, const Filters& block, const Scratch<A>& scratch) {
  const Responses<A>& s = scratch.s;
  std::memset(scratch.padded, 0, f.of_maps.lines() * kLine<A> * sizeof(A));
  for (int64_t step = 0; step < s.steps; ++step) {
    const Origins<A> origins = origins_of(s, block, f.maps_strides, step);
    const int64_t next = step + 1 < s.steps ? step + 1 : step;
    prefetch_maps(f, origins_of(s, block, f.maps_strides, next));
    load_lines(f, origins, scratch.rows, scratch.lines);
    A* row = s.responses + step * s.numbers();
    A* last = row + s.numbers() - kLine<A>;
    apply<A>(f.of_maps, scratch.lines, nullptr, f.tau, scratch.padded, last,
             {row, kLine<A>, /*stream=*/false});
    respond_directly(f.of_maps, f.tau, last, scratch, row);
    for (int64_t l = 0; l < kLine<A>; ++l) {
      last[l] *= -f.tau;
    }
    // Of no sample: less than any other response, and finite, so that it weighs nothing.
    constexpr A kNothing = -std::numeric_limits<A>::max() / 4;
    const int64_t valid = s.valid(step);
    for (A* line = row; valid < kLine<A> && line <= last; line += kLine<A>) {
      for (int64_t l = valid; l < kLine<A>; ++l) {
        line[l] = kNothing;
      }
    }
    for (int64_t t = 0; t < s.numbers(); t += kLanes<A>) {
      const Vector<A> here = load<A>(row + t);
      const Vector<A> most = step == 0 ? here : load<A>(s.maxima + t);
      store<A>(here > most ? here : most, s.maxima + t);
    }
  }
}

// The gradient of a line where a map has but the one template that it is assigned to.
template <typename T, typename A>
void assigned_gradient(const FilterLoss<T>& f, const Responses<A>& s, const Filters& block,
                       int64_t step, A* lines) {
  const Stencil<A>& stencil = f.of_maps;
  const int64_t height = stencil.height, width = stencil.width;
  const A* weights = s.weights + step * s.numbers();
  for (int64_t l = 0; l < s.valid(step); ++l) {
    const int64_t t = assigned_to(*f.running, s, block, step, l);
    const A weight = weights[t * kLine<A> + l];
    if (t == f.shape.positions) {
      for (int64_t p = 0; p < t; ++p) {
        lines[p * kLine<A> + l] = -weight;
      }
      continue;
    }
    const A* values =
        stencil.table + (height - 1 - t / width) * (2 * width - 1) + width - 1 - t % width;
    A* to = lines + l;
    for (int64_t i = 0; i < height; ++i, values += 2 * width - 1) {
      for (int64_t j = 0; j < width; ++j, to += kLine<A>) {
        *to = weight * values[j];
      }
    }
  }
}

// The gradient of a block from its weights.
template <typename T, typename A>
void differentiate(const FilterLoss<T>& f, const Filters& block, const Scratch<A>& scratch,
                   Sink<A>& sink) {
  const Responses<A>& s = scratch.s;
  const Stencil<A>& stencil = f.of_weights;
  alignas(64) A sum[kLine<A>];
  std::memset(scratch.padded, 0, stencil.lines() * kLine<A> * sizeof(A));
  for (int64_t step = 0; step < s.steps; ++step) {
    const Origins<A> origins = origins_of(s, block, f.grad_strides, step);
    const A* weights = s.weights + step * s.numbers();
    const A* of_negative = weights + s.numbers() - kLine<A>;
    if (f.running != nullptr && f.running->assigned != nullptr) {
      assigned_gradient(f, s, block, step, scratch.lines);
    } else if (origins.full && f.grad_strides.filter == 1 && f.filters == kLine<A>) {
      A* to = f.grad + origins.at[0];
      const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0;
      const bool stream = f.stream && aligned && f.grad_strides.position % kLine<A> == 0;
      apply<A>(stencil, weights, of_negative, 1, scratch.padded, sum,
               {to, f.grad_strides.position, stream});
      continue;
    } else {
      apply<A>(stencil, weights, of_negative, 1, scratch.padded, sum,
               {scratch.lines, kLine<A>, /*stream=*/false});
    }
    store_lines(f, s, block, step, scratch.lines, sink);
  }
}

template <typename T>
void run(const FilterLoss<T>& f, int64_t begin, int64_t end, Accumulate<T>* memory) {
  using A = Accumulate<T>;
  const Scratch<A> scratch = scratch_of(f, memory);
  const Responses<A>& s = scratch.s;
  Sink<A> sink(f.stream);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * f.filters, left = f.shape.filters - first;
    const Filters block{first, left < f.filters ? left : f.filters, f.shape.filters};
    respond(f, block, scratch);
    alignas(64) A loss[kLine<A>];
    if (f.running != nullptr) {
      running_weights(*f.running, s, f.tau, block, scratch.of_templates, loss);
    } else {
      batch_weights(s, f.tau, f.grad != nullptr, scratch.of_templates, loss);
    }
    std::memcpy(f.loss + first, loss, block.count * sizeof(A));
    if (f.grad != nullptr) {
      differentiate(f, block, scratch, sink);
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
