// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "masking_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "../common/masking.h"
#include "scalar.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::Draw;
using picnn_fast::kFilterBlock;
using picnn_fast::MaskingBackward;
using picnn_fast::MaskingKernels;
using picnn_fast::ScaleMaps;
using picnn_fast::Storage;
using picnn_fast::Strides;

template <typename L>
int64_t draw_label(const L* logits, int64_t stride, int64_t classes, uint32_t bits,
                   int64_t* weights) {
  constexpr L infinity = std::numeric_limits<L>::infinity();
  L maximum = -infinity;
  for (int64_t k = 0; k < classes; ++k) {
    L logit = logits[k * stride];
    logit = logit != logit ? infinity : logit;
    maximum = logit > maximum ? logit : maximum;
  }
  int64_t total = 0;
  for (int64_t k = 0; k < classes; ++k) {
    L logit = logits[k * stride];
    logit = logit != logit ? infinity : logit;
    weights[k] = softmax_weight(static_cast<float>(logit - maximum));
    total += weights[k];
  }
  const int64_t threshold = cdf_threshold(bits, total);
  int64_t cumulative = 0;
  for (int64_t k = 0; k < classes; ++k) {
    cumulative += weights[k];
    if (cumulative > threshold) {
      return k;
    }
  }
  return classes - 1;
}

template <typename L, typename P, typename A>
void draw(const Draw& d, int64_t begin, int64_t end, int64_t* scratch) {
  for (int64_t b = begin; b < end; ++b) {
    const uint32_t bits = random_24_bits(b, d.seed, Stream::kLabel, d.rank);
    const L* logits = static_cast<const L*>(d.logits) + b * d.logits_strides[0];
    const int64_t label = draw_label(logits, d.logits_strides[1], d.classes, bits, scratch);
    d.labels[b] = label;
    const P* __restrict__ p =
        static_cast<const P*>(d.correspondence) + label * d.correspondence_strides[0];
    const int64_t stride = d.correspondence_strides[1];
    A* __restrict__ mask = static_cast<A*>(d.mask) + b * d.filters;
    const uint64_t first = static_cast<uint64_t>(b) * static_cast<uint64_t>(d.filters);
    const auto row = [&](int64_t step) __attribute__((always_inline)) {
      for (int64_t i = 0; i < d.filters; ++i) {
        const uint32_t r = random_24_bits(first + i, d.seed, Stream::kFilter, d.rank);
        mask[i] = keeps_filter<P>(r, p[i * step]) ? A{1} : A{0};
      }
    };
    stride == 1 ? row(1) : row(stride);
  }
}

template <typename T, typename A>
PICNN_FAST_HD T scaled(T x, A mask) {
  return mask == A{0} ? T{} : narrow<T>(static_cast<A>(widen(x) * mask));
}

template <typename T, typename A, bool kBinary>
PICNN_FAST_HD T masked(T x, A mask) {
  if constexpr (kBinary) {
    return mask == A{0} ? T{} : x;
  } else {
    return scaled(x, mask);
  }
}

struct Unit {
  int64_t batch, begin, end;  // one sample, filters [begin, end)
};

Unit unit(int64_t index, int64_t filters) {
  const int64_t blocks = (filters + kFilterBlock - 1) / kFilterBlock;
  const int64_t begin = index % blocks * kFilterBlock;
  return {index / blocks, begin, begin + kFilterBlock < filters ? begin + kFilterBlock : filters};
}

template <typename T, typename A, bool kBinary>
void scale(const ScaleMaps& s, int64_t begin, int64_t end) {
  const auto [batch, filters, positions] = s.shape;
  const Strides from = s.maps_strides, to = s.out_strides;
  const bool channels_last = from.filter == 1 && to.filter == 1;
  const bool contiguous = from.position == 1 && to.position == 1;
  for (int64_t index = begin; index < end; ++index) {
    const Unit u = unit(index, filters);
    const A* __restrict__ mask = static_cast<const A*>(s.mask) +
                                 (s.labels == nullptr ? u.batch : s.labels[u.batch]) * filters;
    const T* __restrict__ x = static_cast<const T*>(s.maps) + u.batch * from.batch;
    T* __restrict__ out = static_cast<T*>(s.out) + u.batch * to.batch;
    if (channels_last) {
      for (int64_t p = 0; p < positions; ++p) {
        const T* __restrict__ row = x + p * from.position;
        T* __restrict__ out_row = out + p * to.position;
        for (int64_t i = u.begin; i < u.end; ++i) {
          out_row[i] = masked<T, A, kBinary>(row[i], mask[i]);
        }
      }
    } else if (contiguous) {
      for (int64_t i = u.begin; i < u.end; ++i) {
        const T* __restrict__ row = x + i * from.filter;
        T* __restrict__ out_row = out + i * to.filter;
        const A m = mask[i];
        if (m == A{0}) {
          std::memset(out_row, 0, positions * sizeof(T));
        } else if (kBinary || m == A{1}) {
          std::memcpy(out_row, row, positions * sizeof(T));
        } else {
          for (int64_t p = 0; p < positions; ++p) {
            out_row[p] = scaled(row[p], m);
          }
        }
      }
    } else {
      for (int64_t i = u.begin; i < u.end; ++i) {
        for (int64_t p = 0; p < positions; ++p) {
          out[i * to.filter + p * to.position] =
              masked<T, A, kBinary>(x[i * from.filter + p * from.position], mask[i]);
        }
      }
    }
  }
}

// Sums over positions run in kLanes interleaved partial sums, added pairwise at the end: the same
// order on every instruction set.
constexpr int kLanes = 16;

template <typename A>
PICNN_FAST_HD A sum_lanes(A (&lanes)[kLanes]) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) {
      lanes[l] += lanes[l + width];
    }
  }
  return lanes[0];
}

template <typename T, typename A>
PICNN_FAST_HD A backward_row(const T* __restrict__ grad, const T* __restrict__ x,
                             T* __restrict__ out, int64_t positions, A mask) {
  A lanes[kLanes] = {};
  int64_t p = 0;
  for (; p + kLanes <= positions; p += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      lanes[l] += static_cast<A>(widen(x[p + l])) * static_cast<A>(widen(grad[p + l]));
      out[p + l] = scaled(grad[p + l], mask);
    }
  }
  for (int l = 0; p < positions; ++p, ++l) {
    lanes[l] += static_cast<A>(widen(x[p])) * static_cast<A>(widen(grad[p]));
    out[p] = scaled(grad[p], mask);
  }
  return sum_lanes(lanes);
}

template <typename T>
void backward(const MaskingBackward& s, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  const auto [batch, filters, positions] = s.shape;
  const Strides from = s.maps_strides, grad_from = s.grad_strides, to = s.grad_maps_strides;
  const bool channels_last = from.filter == 1 && grad_from.filter == 1 && to.filter == 1;
  const bool contiguous = from.position == 1 && grad_from.position == 1 && to.position == 1;
  for (int64_t index = begin; index < end; ++index) {
    const Unit u = unit(index, filters);
    const A* __restrict__ mask = static_cast<const A*>(s.mask) + u.batch * filters;
    const T* __restrict__ x = static_cast<const T*>(s.maps) + u.batch * from.batch;
    const T* __restrict__ grad = static_cast<const T*>(s.grad) + u.batch * grad_from.batch;
    T* __restrict__ out = static_cast<T*>(s.grad_maps) + u.batch * to.batch;
    A* __restrict__ grad_mask = static_cast<A*>(s.grad_mask) + u.batch * filters;
    if (channels_last) {
      A sums[kFilterBlock] = {};
      for (int64_t p = 0; p < positions; ++p) {
        const T* __restrict__ row = x + p * from.position + u.begin;
        const T* __restrict__ grad_row = grad + p * grad_from.position + u.begin;
        T* __restrict__ out_row = out + p * to.position + u.begin;
        const A* __restrict__ mask_row = mask + u.begin;
        for (int64_t i = 0; i < u.end - u.begin; ++i) {
          sums[i] += static_cast<A>(widen(row[i])) * static_cast<A>(widen(grad_row[i]));
          out_row[i] = scaled(grad_row[i], mask_row[i]);
        }
      }
      std::memcpy(grad_mask + u.begin, sums, (u.end - u.begin) * sizeof(A));
    } else if (contiguous) {
      for (int64_t i = u.begin; i < u.end; ++i) {
        grad_mask[i] = backward_row(grad + i * grad_from.filter, x + i * from.filter,
                                    out + i * to.filter, positions, mask[i]);
      }
    } else {
      for (int64_t i = u.begin; i < u.end; ++i) {
        A sum = 0;
        for (int64_t p = 0; p < positions; ++p) {
          const T g = grad[i * grad_from.filter + p * grad_from.position];
          const T value = x[i * from.filter + p * from.position];
          sum += static_cast<A>(widen(value)) * static_cast<A>(widen(g));
          out[i * to.filter + p * to.position] = scaled(g, mask[i]);
        }
        grad_mask[i] = sum;
      }
    }
  }
}

template <typename L, typename P>
void draw_mask(const Draw& d, bool double_mask, int64_t begin, int64_t end, int64_t* scratch) {
  double_mask ? draw<L, P, double>(d, begin, end, scratch)
              : draw<L, P, float>(d, begin, end, scratch);
}

void draw_any(const Draw& d, bool double_logits, bool double_correspondence, bool double_mask,
              int64_t begin, int64_t end, int64_t* scratch) {
  if (double_logits) {
    double_correspondence ? draw_mask<double, double>(d, double_mask, begin, end, scratch)
                          : draw_mask<double, float>(d, double_mask, begin, end, scratch);
  } else {
    double_correspondence ? draw_mask<float, double>(d, double_mask, begin, end, scratch)
                          : draw_mask<float, float>(d, double_mask, begin, end, scratch);
  }
}

template <bool kBinary>
void scale_storage(const ScaleMaps& s, Storage storage, int64_t begin, int64_t end) {
  switch (storage) {
    case Storage::kFloat:
      return scale<float, float, kBinary>(s, begin, end);
    case Storage::kDouble:
      return scale<double, double, kBinary>(s, begin, end);
    case Storage::kHalf:
      return scale<Half, float, kBinary>(s, begin, end);
    case Storage::kBFloat16:
      return scale<BFloat16, float, kBinary>(s, begin, end);
  }
}

void scale_any(const ScaleMaps& s, Storage storage, bool binary, int64_t begin, int64_t end) {
  binary ? scale_storage<true>(s, storage, begin, end)
         : scale_storage<false>(s, storage, begin, end);
}

void backward_any(const MaskingBackward& s, Storage storage, int64_t begin, int64_t end) {
  switch (storage) {
    case Storage::kFloat:
      return backward<float>(s, begin, end);
    case Storage::kDouble:
      return backward<double>(s, begin, end);
    case Storage::kHalf:
      return backward<Half>(s, begin, end);
    case Storage::kBFloat16:
      return backward<BFloat16>(s, begin, end);
  }
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
const MaskingKernels PICNN_FAST_KERNELS = {PICNN_FAST_NAMESPACE::draw_any,
                                           PICNN_FAST_NAMESPACE::scale_any,
                                           PICNN_FAST_NAMESPACE::backward_any};
}  // namespace picnn_fast
