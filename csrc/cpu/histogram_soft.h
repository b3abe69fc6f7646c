#pragma once

#include <cstdint>
#include <cstring>

#include "../common/binning.h"
#include "histogram_tiles.h"
#include "scalar.h"

// Soft counts and their gradient.
namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::SoftHistogram;
using picnn_fast::SoftHistogramBackward;

// low and width of a block; filters beyond the last lie in bin 0.
template <typename A>
struct SoftBlock {
  alignas(64) A low[kBlock];
  alignas(64) A width[kBlock];

  SoftBlock(const A* lows, const A* widths, int64_t first, int64_t filters) {
    for (int64_t f = 0; f < kBlock; ++f) {
      const bool real = first + f < filters;
      low[f] = real ? lows[first + f] : A(0);
      width[f] = real ? widths[first + f] : A(1);
    }
  }
};

template <typename A>
struct PairOf;
template <>
struct PairOf<float> {
  typedef float type __attribute__((vector_size(8)));
};
template <>
struct PairOf<double> {
  typedef double type __attribute__((vector_size(16)));
};
template <typename A>
using Pair = typename PairOf<A>::type;

template <typename T>
void soft(const SoftHistogram<T>& h, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kBlock);
  const int64_t class_cells = kBlock * h.bins;
  const A last = static_cast<A>(h.bins - 1);
  for_tiles(h.samples, h.rows, h.classes * class_cells * int64_t{sizeof(A)}, begin, end,
            [&](int64_t unit, int64_t row, int64_t count, const Tile<A>& tile) {
              A* table = h.tables + unit * h.classes * class_cells;
              if (row % h.rows == 0) {
                std::memset(table, 0, h.classes * class_cells * sizeof(A));
              }
              const SoftBlock<A> block(h.low, h.width, unit % blocks * kBlock, h.samples.filters);
              alignas(64) uint32_t place[kBlock];
              for (int64_t f = 0; f < kBlock; ++f) {
                place[f] = static_cast<uint32_t>(f * h.bins);
              }
              const int64_t* labels = h.samples.labels + row;
              alignas(64) uint32_t at[kStepRows * kBlock];
              alignas(64) A weights[kStepRows * kBlock * 2];
              for (int64_t from = 0; from < count; from += kStepRows) {
                const int64_t to = count < from + kStepRows ? count : from + kStepRows;
                for (int64_t r = from; r < to; ++r) {
                  const A* __restrict__ x = tile.rows + r * tile.stride;
                  const int64_t step = (r - from) * kBlock;
                  PICNN_FAST_FOR_BLOCK(f) {
                    const A t = soft_position(x[f], block.low[f], block.width[f]);
                    const SoftBin<A> bin = soft_bin(t, last);
                    at[step + f] = static_cast<uint32_t>(bin.below) + place[f];
                    weights[(step + f) * 2] = A(1) - bin.upper;
                    weights[(step + f) * 2 + 1] = bin.upper;
                  }
                }
                for (int64_t r = from; r < to; ++r) {
                  A* __restrict__ class_table = table + labels[r] * class_cells;
                  const int64_t step = (r - from) * kBlock;
                  for (int64_t f = 0; f < kBlock; ++f) {
                    // Both bins at once.
                    Pair<A> sum, weight;
                    std::memcpy(&sum, class_table + at[step + f], sizeof(sum));
                    std::memcpy(&weight, weights + (step + f) * 2, sizeof(weight));
                    sum += weight;
                    std::memcpy(class_table + at[step + f], &sum, sizeof(sum));
                  }
                }
              }
            });
}

// The gradients of rows [from, to) of a tile, at most kStepRows; grad_counts and out are those of
// the block's first filter, out of the tile's first row.
template <typename T>
void soft_backward_step(const SoftHistogramBackward<T>& h, const SoftBlock<Accumulate<T>>& block,
                        const Tile<Accumulate<T>>& tile, const int64_t* labels, int64_t from,
                        int64_t to, int64_t filters, const Accumulate<T>* grad_counts, T* out) {
  using A = Accumulate<T>;
  const int64_t filter_cells = h.bins * h.classes;
  const A last = static_cast<A>(h.bins - 1);
  alignas(64) A position[kStepRows * kBlock], difference[kStepRows * kBlock] = {};
  alignas(64) int32_t below[kStepRows * kBlock];
  for (int64_t r = from; r < to; ++r) {
    const A* __restrict__ x = tile.rows + r * tile.stride;
    const int64_t step = (r - from) * kBlock;
    PICNN_FAST_FOR_BLOCK(f) {
      const A t = soft_position(x[f], block.low[f], block.width[f]);
      const bool inside = (t >= A(0)) & (t < last);
      position[step + f] = t;
      below[step + f] = static_cast<int32_t>(inside ? t : A(0));
    }
  }
  for (int64_t r = from; r < to; ++r) {
    const A* class_grad = grad_counts + labels[r];
    const int64_t step = (r - from) * kBlock;
    for (int64_t f = 0; f < filters; ++f) {
      const A* pair = class_grad + f * filter_cells + below[step + f] * h.classes;
      difference[step + f] = pair[h.classes] - pair[0];
    }
  }
  for (int64_t r = from; r < to; ++r) {
    const int64_t step = (r - from) * kBlock;
    alignas(64) T grad[kBlock];
    PICNN_FAST_FOR_BLOCK(f) {
      const A t = position[step + f];
      const A slope = difference[step + f] / block.width[f];
      const A outside = t == t ? A(0) : t;
      const bool inside = (t >= A(0)) & (t < last);
      grad[f] = narrow<T>(inside ? slope : outside);
    }
    T* to_row = out + r * h.grad_sample_stride;
    if (h.grad_filter_stride == 1 && filters == kBlock) {
      std::memcpy(static_cast<void*>(to_row), grad, sizeof(grad));
    } else {
      for (int64_t f = 0; f < filters; ++f) {
        to_row[f * h.grad_filter_stride] = grad[f];
      }
    }
  }
}

template <typename T>
void soft_backward(const SoftHistogramBackward<T>& h, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t blocks = picnn_fast::ceil_div(h.samples.filters, kBlock);
  const int64_t filter_cells = h.bins * h.classes;
  for_tiles(h.samples, h.rows, kBlock * filter_cells * int64_t{sizeof(A)}, begin, end,
            [&](int64_t unit, int64_t row, int64_t count, const Tile<A>& tile) {
              const int64_t first = unit % blocks * kBlock;
              const int64_t filters = filters_from(h.samples.filters, first);
              const SoftBlock<A> block(h.low, h.width, first, h.samples.filters);
              T* out = h.grad + row * h.grad_sample_stride + first * h.grad_filter_stride;
              for (int64_t from = 0; from < count; from += kStepRows) {
                const int64_t to = count < from + kStepRows ? count : from + kStepRows;
                soft_backward_step(h, block, tile, h.samples.labels + row, from, to, filters,
                                   h.grad_counts + first * filter_cells, out);
              }
            });
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE
