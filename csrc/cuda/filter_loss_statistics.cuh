#pragma once

// What the filter loss adds up over samples and templates, and what a call is asked for. Sums are
// added up in an order that depends on the sizes alone.

#include <cmath>

#include "../common/templates.h"
#include "filter_loss_products.cuh"
#include "launch.h"
#include "maps.h"

namespace picnn_fast {
namespace {

template <typename A>
struct Sum {
  A sum;
  __device__ static Sum none() { return {0}; }
  __device__ void include(const Sum& other) { sum += other.sum; }
};

// The logarithm of a sum of exponentials. As torch.logsumexp: infinite where a term is +inf, -inf
// without terms, NaN with a NaN.
template <typename A>
struct LogSum {
  A largest, sum;  // the sum is relative to the largest term

  __device__ static LogSum none() { return {-static_cast<A>(HUGE_VAL), 0}; }
  __device__ static LogSum one(A x) {
    return {x, x == -static_cast<A>(HUGE_VAL) ? A{0} : x == x ? A{1} : x};
  }
  __device__ void include(const LogSum& other) {
    if (other.largest > largest) {
      sum = sum * std::exp(largest - other.largest) + other.sum;
      largest = other.largest;
    } else {
      const bool same = other.largest == largest;
      sum += same ? other.sum : other.sum * std::exp(other.largest - largest);
    }
  }
  __device__ A value() const { return largest + std::log(sum); }
};

// How the threads of a block share columns: `across` side by side, each in `parts` that take turns
// along the other axis.
struct Columns {
  int across, parts, column, part;

  __device__ explicit Columns(int count) {
    across = min((count + 31) / 32 * 32, kThreads);
    parts = kThreads / across;
    column = threadIdx.x % across;
    part = threadIdx.x / across;
  }
  // The parts' values put together, in part 0.
  template <typename Value>
  __device__ Value combine(Value value, void* scratch) const {
    auto* values = static_cast<Value*>(scratch);
    // Every caller of today has a barrier behind its last use of the scratch; this asks for none.
    __syncthreads();
    values[threadIdx.x] = value;
    __syncthreads();
    if (part == 0)
      for (int q = 1; q < parts; ++q) value.include(values[threadIdx.x + q * across]);
    return value;
  }
};

// The threads' values put together, for all of them.
template <typename Value>
__device__ Value combine_block(Value value, void* scratch) {
  auto* values = static_cast<Value*>(scratch);
  __syncthreads();  // as in Columns::combine
  values[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half)
      values[threadIdx.x].include(values[threadIdx.x + half]);
  }
  __syncthreads();
  return values[0];
}

// The arguments of the running estimates. `new_log_mean` is null for the other operator.
template <typename A>
struct Running {
  const A *log_mean, *log_ratio;
  A *new_log_mean, *new_log_ratio;
  int64_t mean_filter, mean_template, ratio_filter;  // strides of the old ones
  int64_t new_mean_filter, new_mean_template, new_ratio_filter;
  A log_kept, log_taken;    // of the shares of the old estimate and of this batch
  bool replaces;            // nothing is kept
  const int64_t* assigned;  // or null
  int64_t assigned_batch, assigned_filter;

  __device__ A moving_average(A old, A batch) const {
    if (replaces || old == -static_cast<A>(HUGE_VAL)) return batch;
    auto both = LogSum<A>::one(old + log_kept);
    both.include(LogSum<A>::one(batch + log_taken));
    return both.value();
  }
};

template <typename T>
struct Problem {
  using A = Accumulate<T>;
  Maps<const T> x;
  Maps<A> grad;  // no data where it is not wanted
  int64_t B, N;
  Template<A> part;
  A tau;
  A scale;  // of the loss: 1 / templates, and in the running form 1 / B too
  A* loss;
  Running<A> running;

  __device__ bool is_running() const { return running.new_log_mean != nullptr; }
  __device__ int positions() const { return part.offsets.positions(); }
  __device__ int templates() const { return positions() + 1; }

  __device__ void check_assigned(int64_t b, int64_t n) const {
    if (running.assigned == nullptr) return;
    const int64_t t = running.assigned[b * running.assigned_batch + n * running.assigned_filter];
    PICNN_FAST_DEVICE_ASSERT(0 <= t && t < templates());
  }
  __device__ bool counts(int64_t b, int64_t n, int t) const {
    return running.assigned == nullptr ||
           running.assigned[b * running.assigned_batch + n * running.assigned_filter] == t;
  }
  // With log_given = s - column, where `column` is the statistic of the template and `row` that of
  // the sample: the loss is -scale times the sum of terms.
  __device__ A term(int64_t b, int64_t n, int t, A s, A column, A row) const {
    const A log_given = s - column;
    return counts(b, n, t) ? std::exp(log_given) * (log_given - row) : A{0};
  }
  // ds. `sum`: of the template's terms.
  __device__ A weight(int64_t b, int64_t n, int t, A s, A column, A row, A sum) const {
    const A log_given = s - column;
    const A centred = is_running() ? log_given - row : log_given - row - sum;
    return counts(b, n, t) ? -scale * (std::exp(log_given) * centred) : A{0};
  }
  // Renews log_mean from the log of the sum of exp(s) over the batch, and returns it.
  __device__ A renew_log_mean(int64_t n, int t, A log_sum) const {
    const Running<A>& r = running;
    const A old = r.log_mean[n * r.mean_filter + t * r.mean_template];
    const A now = B == 0 ? old : r.moving_average(old, log_sum - std::log(static_cast<A>(B)));
    r.new_log_mean[n * r.new_mean_filter + t * r.new_mean_template] = now;
    return now;
  }
  // The same of log_ratio, from the log of the sum over batch and templates; by all threads.
  __device__ A renew_log_ratio(int64_t n, A log_sum) const {
    const Running<A>& r = running;
    const A old = r.log_ratio[n * r.ratio_filter];
    const A count = static_cast<A>(B) * static_cast<A>(templates());
    const A now = B == 0 ? old : r.moving_average(old, log_sum - std::log(count));
    if (threadIdx.x == 0) r.new_log_ratio[n * r.new_ratio_filter] = now;
    return now;
  }
};

}  // namespace
}  // namespace picnn_fast
