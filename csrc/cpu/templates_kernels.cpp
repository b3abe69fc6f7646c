// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "templates_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common/templates.h"
#include "scalar.h"
#include "streaming.h"
#include "vector.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::kFiltersAtOnce;
using picnn_fast::PanelLayout;
using picnn_fast::Storage;
using picnn_fast::Strides;
using picnn_fast::Template;
using picnn_fast::TemplateMask;
using picnn_fast::TemplatesKernels;

// The first of the greatest numbers, NaN above all else.
template <typename T>
int64_t find_peak(const T* map, int64_t stride, int64_t positions) {
  auto best = widen(map[0]);
  int64_t peak = 0;
  for (int64_t p = 1; p < positions; ++p) {
    const auto x = widen(map[p * stride]);
    if (!(x <= best) && best == best) {
      best = x;
      peak = p;
    }
  }
  return peak;
}

// The same of a dense map, in lanes that each keep the first of their greatest numbers.
template <typename T, typename A>
PICNN_FAST_HD int64_t find_peak_dense(const T* __restrict__ map, int64_t positions) {
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr int kCount = kLanes<A>;
  if (positions < kCount) {
    return find_peak(map, 1, positions);
  }
  Index lane[kCount];
  for (int l = 0; l < kCount; ++l) {
    lane[l] = l;
  }
  const Vector<Index> first = load<Index>(lane);
  Vector<A> best = load<A>(map);
  Vector<Index> index = first, nan = best != best;
  const auto take = [&](int64_t p) {
    const Vector<A> x = load<A>(map + p);
    const Vector<Index> greater = x > best;
    best = greater ? x : best;
    index = greater ? first + static_cast<Index>(p) : index;
    nan |= x != x;
  };
  for (int64_t p = kCount; p + kCount <= positions; p += kCount) {
    take(p);
  }
  take(positions - kCount);  // what is left, and some once more
  const A greatest = fold<A>(best, [](auto one, auto other) { return one > other ? one : other; });
  constexpr Index kNone = std::numeric_limits<Index>::max();
  index = (best == broadcast(greatest) ? index : broadcast(kNone)) | nan;  // -1 where NaN was
  const Index peak =
      fold<Index>(index, [](auto one, auto other) { return one < other ? one : other; });
  return peak < 0 ? find_peak(map, 1, positions) : peak;
}

template <typename T, typename A>
PICNN_FAST_HD T masked(T x, A mask) {
  return narrow<T>(static_cast<A>(widen(x) * mask));
}

// Whole vectors, the last of which may overlap the one before.
template <typename T, typename A>
PICNN_FAST_HD void mask_dense(const T* __restrict__ x, const A* __restrict__ mask,
                              T* __restrict__ out, int64_t count) {
  if (count < kLanes<A>) {
    for (int64_t p = 0; p < count; ++p) {
      out[p] = masked<T, A>(x[p], mask[p]);
    }
    return;
  }
  const auto run = [&](int64_t p) { store<A>(load<A>(x + p) * load<A>(mask + p), out + p); };
  int64_t p = 0;
  for (; p + kLanes<A> <= count; p += kLanes<A>) {
    run(p);
  }
  if (p < count) {
    run(count - kLanes<A>);
  }
}

// One dense map, or one whose positions are apart.
template <typename T, typename A>
PICNN_FAST_HD void mask_map(const TemplateMask& s, int64_t peak, const T* from, int64_t from_stride,
                            T* to, int64_t to_stride) {
  const PanelLayout& layout = s.layout;
  const A* first = static_cast<const A*>(s.masks) + layout.begin(peak);
  for (int64_t segment = 0; segment < layout.segments; ++segment) {
    const A* mask = first + segment * layout.per_segment;
    const T* x = from + segment * layout.length * from_stride;
    T* out = to + segment * layout.length * to_stride;
    if (from_stride == 1 && to_stride == 1) {
      mask_dense(x, mask, out, layout.length);
    } else {
      for (int64_t p = 0; p < layout.length; ++p) {
        out[p * to_stride] = masked<T, A>(x[p * from_stride], mask[p]);
      }
    }
  }
}

// Filters side by side in memory: rows of `count` numbers, of the same position.
template <typename T, typename A>
void find_peaks(const T* maps, int64_t stride, int64_t positions, int64_t count, int64_t* peak) {
  A best[kFiltersAtOnce];
  int32_t index[kFiltersAtOnce];
  for (int64_t i = 0; i < count; ++i) {
    best[i] = widen(maps[i]);
    index[i] = 0;
  }
  for (int64_t p = 1; p < positions; ++p) {
    const T* __restrict__ row = maps + p * stride;
    const auto here = static_cast<int32_t>(p);
    for (int64_t i = 0; i < count; ++i) {
      const A x = widen(row[i]);
      const bool take = !(x <= best[i]) & (best[i] == best[i]);
      best[i] = take ? x : best[i];
      index[i] = take ? here : index[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    peak[i] = index[i];
  }
}

template <typename T, typename A>
PICNN_FAST_HD void mask_row(const Template<A>& part, A scale, int32_t a, int32_t b,
                            const T* __restrict__ row, const int32_t* __restrict__ rows,
                            const int32_t* __restrict__ columns, T* __restrict__ out,
                            int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const A value = template_value(part, a - rows[i], b - columns[i]);
    out[i] = masked<T, A>(row[i], mask_value(value, scale));
  }
}

// With profile and norm constants, so that the loops over filters hold no branch.
template <typename T, typename A, typename Run>
PICNN_FAST_HD void with_profile(const Template<A>& given, const Run& run) {
  Template<A> part = given;
  if (part.profile == picnn_fast::kTable) {
    part.profile = picnn_fast::kTable;
    run(part);
  } else if (part.profile == picnn_fast::kUniform) {
    part.profile = picnn_fast::kUniform;
    if (part.norm == 1) {
      part.norm = 1;
      run(part);
    } else {
      part.norm = 2;
      run(part);
    }
  } else {
    part.profile = picnn_fast::kGradient;
    if (part.norm == 1) {
      part.norm = 1;
      run(part);
    } else {
      part.norm = 2;
      run(part);
    }
  }
}

// Asks for a row of numbers that is read soon.
template <typename T>
PICNN_FAST_HD void prefetch(const T* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int kSecondLevel = 1;
  for (int64_t i = 0; i < count; i += kLine) {
    __builtin_prefetch(row + i, /*rw=*/0, kSecondLevel);
  }
}

// `next`, if not null, are the maps that follow. They are fetched while these are written: finding
// peaks would wait for memory otherwise.
template <typename T, typename A>
void mask_side_by_side(const TemplateMask& s, const T* maps, const T* next, T* out, int64_t* peak,
                       int64_t count, Sink<T>& sink) {
  const int64_t stride = s.maps_strides.position;
  if (s.find_peak) {
    find_peaks<T, A>(maps, stride, s.shape.positions, count, peak);
  }
  const auto width = static_cast<int32_t>(s.width);
  int32_t rows[kFiltersAtOnce], columns[kFiltersAtOnce];
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = static_cast<int32_t>(peak[i]) / width;
    columns[i] = static_cast<int32_t>(peak[i]) % width;
  }
  const A scale = static_cast<A>(s.scale);
  const int64_t most = Sink<T>::kPreferred / count;
  const int64_t step = s.out_strides.position == count && most > 1 ? most : 1;
  with_profile<T>(*static_cast<const Template<A>*>(s.part), [&](const Template<A>& part) {
    int32_t a = 0, b = 0;
    for (int64_t p = 0; p < s.shape.positions; p += step) {
      const int64_t here = step < s.shape.positions - p ? step : s.shape.positions - p;
      T* stretch = sink.open(out + p * s.out_strides.position, here * count);
      for (int64_t r = 0; r < here; ++r) {
        if (next != nullptr) {
          prefetch(next + (p + r) * stride, count);
        }
        mask_row<T, A>(part, scale, a, b, maps + (p + r) * stride, rows, columns,
                       stretch + r * count, count);
        if (++b == width) {
          b = 0;
          ++a;
        }
      }
      sink.close();
    }
  });
}

template <typename T, typename A>
void mask(const TemplateMask& s, int64_t begin, int64_t end) {
  const auto [batch, filters, positions] = s.shape;
  const Strides from = s.maps_strides, to = s.out_strides;
  const bool dense = from.position == 1 && to.position == 1 && to.filter == positions;
  const int64_t most = Sink<T>::kPreferred / positions;
  const int64_t step = most > 1 ? most : 1;
  Sink<T> sink(s.stream);
  const auto maps = [&](int64_t index) {
    return static_cast<const T*>(s.maps) + index / s.units.blocks * from.batch +
           index % s.units.blocks * s.units.filters * from.filter;
  };
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / s.units.blocks;
    const int64_t first = index % s.units.blocks * s.units.filters;
    const int64_t count = s.units.filters < filters - first ? s.units.filters : filters - first;
    const T* x = maps(index);
    T* out = static_cast<T*>(s.out) + sample * to.batch + first * to.filter;
    int64_t* peak = s.peak + sample * filters + first;
    if (s.side_by_side) {
      const T* next = s.find_peak && index + 1 < end ? maps(index + 1) : nullptr;
      mask_side_by_side<T, A>(s, x, next, out, peak, count, sink);
    } else if (dense) {
      for (int64_t i = 0; i < count; i += step) {
        const int64_t here = step < count - i ? step : count - i;
        T* stretch = sink.open(out + i * positions, here * positions);
        for (int64_t r = 0; r < here; ++r) {
          const T* map = x + (i + r) * from.filter;
          if (s.find_peak) {
            peak[i + r] = find_peak_dense<T, A>(map, positions);
          }
          mask_map<T, A>(s, peak[i + r], map, 1, stretch + r * positions, 1);
        }
        sink.close();
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const T* map = x + i * from.filter;
        if (s.find_peak) {
          peak[i] = find_peak(map, from.position, positions);
        }
        mask_map<T, A>(s, peak[i], map, from.position, out + i * to.filter, to.position);
      }
    }
  }
}

void mask_any(const TemplateMask& s, Storage storage, int64_t begin, int64_t end) {
  with_storage(storage, [&](auto t, auto a) { mask<decltype(t), decltype(a)>(s, begin, end); });
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
const TemplatesKernels PICNN_FAST_KERNELS = {PICNN_FAST_NAMESPACE::mask_any};
}  // namespace picnn_fast
