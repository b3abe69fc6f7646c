// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "templates_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "indices.h"
#include "scalar.h"
#include "streaming.h"
#include "transpose.h"
#include "vector.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::Accumulate;
using picnn_fast::kFiltersAtOnce;
using picnn_fast::MapPeaks;
using picnn_fast::PanelLayout;
using picnn_fast::Strides;
using picnn_fast::TemplateMask;
using picnn_fast::TemplatesKernel;

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
template <typename T>
PICNN_FAST_HD void mask_map(const TemplateMask<T>& s, int64_t peak, const T* from,
                            int64_t from_stride, T* to, int64_t to_stride) {
  using A = Accumulate<T>;
  const PanelLayout& layout = s.layout;
  const A* first = s.masks + layout.begin(peak);
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

// How far ahead rows are fetched: some pages of memory, and all that are gone through at once.
template <typename T>
PICNN_FAST_HD int64_t rows_ahead(int64_t filters, int64_t at_once) {
  constexpr int64_t kAhead = 2 * Sink<T>::kPreferred;
  return kAhead / filters > at_once ? kAhead / filters : at_once;
}

// Rows that are fetched, in the order in which they lie in memory.
template <typename T>
struct Fetch {
  const T* at;
  int64_t left;  // of a row, or of all where they adjoin
  int64_t numbers, gap;

  Fetch(const T* rows, int64_t stride, int64_t numbers)
      : at(rows),
        left(stride == numbers ? std::numeric_limits<int64_t>::max() : numbers),
        numbers(numbers),
        gap(stride - numbers) {}

  PICNN_FAST_HD void next(int64_t count) {
    __builtin_prefetch(at);
    at += count;
    left -= count;
    if (left <= 0) {
      at += gap;
      left += numbers;
    }
  }
};

// Filters side by side in memory, fewer than a vector holds.
template <typename T, typename A>
void find_peaks_of_few(const T* maps, int64_t stride, int64_t positions, int64_t filters,
                       int64_t* peak) {
  A best[kLanes<A>];
  IndexOf<A> index[kLanes<A>] = {};
  for (int64_t i = 0; i < filters; ++i) {
    best[i] = widen(maps[i]);
  }
  for (int64_t p = 1; p < positions; ++p) {
    const T* __restrict__ row = maps + p * stride;
    const auto here = static_cast<IndexOf<A>>(p);
    for (int64_t i = 0; i < filters; ++i) {
      const A x = widen(row[i]);
      const bool take = !(x <= best[i]) & (best[i] == best[i]);
      best[i] = take ? x : best[i];
      index[i] = take ? here : index[i];
    }
  }
  for (int64_t i = 0; i < filters; ++i) {
    peak[i] = index[i];
  }
}

// Of filters side by side in memory, the first of the greatest numbers of the rows seen so far; a
// row has the numbers of the same position.
template <typename A>
struct Greatest {
  alignas(64) A best[kFiltersAtOnce];
  alignas(64) A sum[kFiltersAtOnce];  // NaN where there is a NaN, and perhaps where there is none
  alignas(64) IndexOf<A> index[kFiltersAtOnce];

  void clear(int64_t filters) {
    for (int64_t i = 0; i < filters; ++i) {
      best[i] = -std::numeric_limits<A>::infinity();
      sum[i] = 0;
      index[i] = 0;
    }
  }

  template <typename T>
  void find(const T* maps, int64_t stride, int64_t positions, int64_t filters, int64_t* peak) {
    if (filters < kLanes<A>) {
      return find_peaks_of_few<T, A>(maps, stride, positions, filters, peak);
    }
    IndexOf<A> nan = 0;
    for (int64_t i = 0; i < filters; ++i) {
      peak[i] = index[i];
      nan |= sum[i] != sum[i];
    }
    for (int64_t i = 0; i < filters && nan != 0; ++i) {
      if (sum[i] != sum[i]) {
        peak[i] = find_peak(maps + i, stride, positions);
      }
    }
  }
};

// kVectors vectors of filters from number `first` on, of the rows from number `p` on.
template <typename T, typename A, int kVectors, bool kFetch>
PICNN_FAST_HD void see_vectors(Greatest<A>& seen, const T* rows, int64_t stride, int64_t p,
                               int64_t count, int64_t first, Fetch<T>* ahead) {
  using Index = IndexOf<A>;
  constexpr int64_t kNumbers = kVectors * kLanes<A>, kLine = 64 / sizeof(T);
  Vector<A> best[kVectors], sum[kVectors];
  Vector<Index> index[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    best[v] = load<A>(seen.best + first + v * kLanes<A>);
    sum[v] = load<A>(seen.sum + first + v * kLanes<A>);
    index[v] = load<Index>(seen.index + first + v * kLanes<A>);
  }
  const T* row = rows + first;
  for (int64_t k = 0; k < count; ++k, row += stride) {
    const Vector<Index> here = broadcast(static_cast<Index>(p + k));
    if constexpr (kFetch) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kNumbers; i += kLine) {
        ahead->next(kNumbers < kLine ? kNumbers : kLine);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vector<A> x = load<A>(row + v * kLanes<A>);
      const Vector<Index> greater = x > best[v];
      best[v] = greater ? x : best[v];
      index[v] = greater ? here : index[v];
      sum[v] += x;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    store<A>(best[v], seen.best + first + v * kLanes<A>);
    store<A>(sum[v], seen.sum + first + v * kLanes<A>);
    store<Index>(index[v], seen.index + first + v * kLanes<A>);
  }
}

// All filters from number `first` on; as many vectors at once as registers hold. Less than one
// vector of filters is left to Greatest::find.
template <typename T, typename A, bool kFetch, int kVectors = kVectorBytes == 64 ? 8 : 4>
PICNN_FAST_HD void see_rows(Greatest<A>& seen, const T* rows, int64_t stride, int64_t p,
                            int64_t count, int64_t filters, Fetch<T>* ahead = nullptr,
                            int64_t first = 0) {
  constexpr int64_t kNumbers = kVectors * kLanes<A>;
  for (; first + kNumbers <= filters; first += kNumbers) {
    see_vectors<T, A, kVectors, kFetch>(seen, rows, stride, p, count, first, ahead);
  }
  if constexpr (kVectors > 1) {
    see_rows<T, A, kFetch, kVectors / 2>(seen, rows, stride, p, count, filters, ahead, first);
  } else if (first < filters && filters >= kNumbers) {
    // Some filters twice, which changes nothing.
    see_vectors<T, A, 1, kFetch>(seen, rows, stride, p, count, filters - kNumbers, ahead);
  }
}

template <typename T, typename A>
void find_peaks(Greatest<A>& seen, const T* maps, int64_t stride, int64_t positions,
                int64_t filters, int64_t* peak) {
  constexpr int64_t kRows = 8;
  const T* ahead = maps + rows_ahead<T>(filters, kRows) * stride;
  seen.clear(filters);
  for (int64_t p = 0; p < positions; p += kRows) {
    const int64_t count = kRows < positions - p ? kRows : positions - p;
    Fetch<T> fetch(ahead + p * stride, stride, filters);
    see_rows<T, A, /*kFetch=*/true>(seen, maps + p * stride, stride, p, count, filters, &fetch);
  }
  seen.find(maps, stride, positions, filters, peak);
}

// Rows of filters side by side: where they are read and written, and what is fetched meanwhile.
// Rows that adjoin are fetched in the order in which they lie in memory, which is fastest.
template <typename T>
struct Rows {
  const T* maps;
  int64_t stride;
  T* out;
  int64_t out_stride;
  int64_t out_ahead;  // what is fetched to be written, of numbers narrower than masks
  const T* ahead;
  int64_t ahead_column;
  int64_t ahead_stride;  // 0: as many numbers as are gone through at once
};

// Of kCount positions in a row from number `first` on, or of those below `count`, kVectors vectors
// of filters from number `at` on times the masks of peaks whose masks begin at `begins`. kStream:
// past the caches.
template <typename T, typename A, int kVectors, int kCount, bool kStream, bool kWhole>
PICNN_FAST_HD void mask_vectors(const A* masks, const int64_t* begins, const Rows<T>& rows,
                                int64_t first, int64_t count, int64_t at) {
  constexpr int64_t kNumbers = kVectors * kLanes<A>;
  Vector<A> runs[kVectors][kCount];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    transpose_runs<A>(masks + first, begins + at + v * kLanes<A>, runs[v]);
  }
  const T* from = rows.maps + first * rows.stride + at;
  T* to = rows.out + first * rows.out_stride + at;
  const int64_t ahead_stride = rows.ahead_stride == 0 ? kNumbers : rows.ahead_stride;
  const T* ahead = rows.ahead + at * rows.ahead_column + first * ahead_stride;
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    if (!kWhole && first + k == count) {
      break;
    }
    __builtin_prefetch(ahead);
    if constexpr (!kStream && sizeof(T) < sizeof(A)) {
      __builtin_prefetch(to + rows.out_ahead, /*rw=*/1);
    }
    if constexpr (std::is_same_v<T, BFloat16> && kVectors == 2) {
      const Vector<A> x = load<A>(from) * runs[0][k];
      const Vector<A> y = load<A>(from + kLanes<A>) * runs[1][k];
      kStream ? stream_both(x, y, to) : store_both(x, y, to);
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vector<A> x = load<A>(from + v * kLanes<A>) * runs[v][k];
        kStream ? stream_vector<A>(x, to + v * kLanes<A>) : store<A>(x, to + v * kLanes<A>);
      }
    }
    from += rows.stride, to += rows.out_stride, ahead += ahead_stride;
  }
}

// Of all `filters`, kCount positions or the first `count` of them.
template <typename T, typename A, int kCount, bool kStream, bool kWhole>
void mask_rows(const A* masks, const int64_t* begins, const Rows<T>& rows, int64_t count,
               int64_t filters) {
  // As many numbers as vectors of A hold at most: whole lines, of the widest vectors.
  constexpr int kVectors = sizeof(A) / sizeof(T);
  constexpr int64_t kNumbers = kVectors * kLanes<A>;
  // As many positions at once as registers allow.
  constexpr int kOnce = kVectors == 1 || kVectorBytes == 64 ? kCount : kRun<A>;
  int64_t i = 0;
  for (; i + kNumbers <= filters; i += kNumbers) {
    for (int k = 0; k < kCount && (kWhole || k < count); k += kOnce) {
      mask_vectors<T, A, kVectors, kOnce, kStream, kWhole>(masks, begins, rows, k, count, i);
    }
  }
  for (; i + kLanes<A> <= filters; i += kLanes<A>) {
    mask_vectors<T, A, 1, kCount, kStream, kWhole>(masks, begins, rows, 0, count, i);
  }
  if (i < filters && filters >= kLanes<A>) {
    i = filters - kLanes<A>;
    mask_vectors<T, A, 1, kCount, kStream, kWhole>(masks, begins, rows, 0, count, i);
    return;
  }
  for (; i < filters; ++i) {
    for (int64_t k = 0; k < count; ++k) {
      rows.out[k * rows.out_stride + i] =
          masked<T, A>(rows.maps[k * rows.stride + i], masks[begins[i] + k]);
    }
  }
}

// Filters of one unit of work: those from `first` on of a sample.
struct Block {
  int64_t sample, first, count;
};

template <typename T>
PICNN_FAST_HD Block block_of(const MapPeaks<T>& s, int64_t unit) {
  const int64_t first = unit % s.units.blocks * s.units.filters, left = s.shape.filters - first;
  return {unit / s.units.blocks, first, s.units.filters < left ? s.units.filters : left};
}

template <typename T>
PICNN_FAST_HD const T* maps_of(const MapPeaks<T>& s, const Block& block) {
  return s.maps + block.sample * s.maps_strides.batch + block.first * s.maps_strides.filter;
}

template <typename T>
PICNN_FAST_HD int64_t* peak_of(const MapPeaks<T>& s, const Block& block) {
  return s.peak + block.sample * s.shape.filters + block.first;
}

template <typename T>
void peaks(const MapPeaks<T>& s, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t positions = s.shape.positions, stride = s.maps_strides.position;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(s, unit);
    const T* maps = maps_of(s, block);
    int64_t* peak = peak_of(s, block);
    if (s.side_by_side) {
      Greatest<A> seen;
      find_peaks(seen, maps, stride, positions, block.count, peak);
      continue;
    }
    for (int64_t i = 0; i < block.count; ++i) {
      const T* map = maps + i * s.maps_strides.filter;
      peak[i] =
          stride == 1 ? find_peak_dense<T, A>(map, positions) : find_peak(map, stride, positions);
    }
  }
}

// Whether peaks that are given are no positions.
template <typename T>
PICNN_FAST_HD bool refuse(const TemplateMask<T>& s, const Block& block) {
  if (s.find_peak ||
      picnn_fast::all_below(peak_of(s.in, block), block.count, s.in.shape.positions)) {
    return false;
  }
  __atomic_store_n(s.invalid, true, __ATOMIC_RELAXED);
  return true;
}

// Filters side by side. The peaks of the block `next`, if not null, are found row by row while
// `block` is written, so that reading and writing go on at the same pace.
template <typename T>
void mask_side_by_side(const TemplateMask<T>& s, const Block& block, const Block* next,
                       Greatest<Accumulate<T>>& seen, Sink<T>& sink) {
  using A = Accumulate<T>;
  constexpr int64_t kLine = 64 / sizeof(T), kMost = 4096 / sizeof(T);
  const PanelLayout& layout = s.layout;
  const int64_t stride = s.in.maps_strides.position, out_stride = s.out_strides.position;
  const int64_t filters = block.count;
  const int64_t* peak = peak_of(s.in, block);
  int64_t begins[kFiltersAtOnce];
  for (int64_t i = 0; i < filters; ++i) {
    begins[i] = layout.begin(peak[i]);
  }
  const T* maps = maps_of(s.in, block);
  const T* others = next == nullptr ? maps : maps_of(s.in, *next);
  const int64_t fetched = next == nullptr ? filters : next->count;
  T* out = s.out + block.sample * s.out_strides.batch + block.first * s.out_strides.filter;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && out_stride % kLine == 0;
  const bool lines = s.stream && aligned && filters % kLine == 0;
  const bool dense = !lines && out_stride == filters;
  // What is gone through at once is to fit the first level of cache, as is the sink's buffer.
  const bool fits = filters <= kMost && !(s.stream && dense);
  const int64_t most = fits ? kLongRun<A> : kRun<A>, rows_on = rows_ahead<T>(filters, most);
  int64_t rows_seen = 0;
  if (next != nullptr) {
    seen.clear(next->count);
  }
  for (int64_t segment = 0; segment < layout.segments; ++segment) {
    const A* panel = s.masks + segment * layout.per_segment;
    for (int64_t first = 0, count; first < layout.length; first += count) {
      const int64_t left = layout.length - first, p = segment * layout.length + first;
      count = left < most ? left : most;
      T* to = out + p * out_stride;
      const Rows<T> rows{maps + p * stride,
                         stride,
                         dense ? sink.open(to, count * filters) : to,
                         out_stride,
                         s.stream ? 0 : rows_on * out_stride,
                         others + (p + rows_on) * stride,
                         stride == filters ? count : 1,
                         stride == filters ? 0 : stride};
      const auto run = [&](auto run, auto stream) {
        constexpr int kCount = run;
        constexpr bool kStream = stream;
        count == kCount
            ? mask_rows<T, A, kCount, kStream, true>(panel + first, begins, rows, count, filters)
            : mask_rows<T, A, kCount, kStream, false>(panel + first, begins, rows, count, filters);
      };
      constexpr std::integral_constant<int, kRun<A>> kShort{};
      constexpr std::integral_constant<int, kLongRun<A>> kLong{};
      if (count <= kRun<A>) {
        lines ? run(kShort, std::true_type{}) : run(kShort, std::false_type{});
      } else {
        lines ? run(kLong, std::true_type{}) : run(kLong, std::false_type{});
      }
      if (dense) {
        sink.close();
      }
      const int64_t unseen = p + count - rows_seen;
      if (next != nullptr && (unseen > kRun<A> || p + count == s.in.shape.positions)) {
        see_rows<T, A, /*kFetch=*/false>(seen, others + rows_seen * stride, stride, rows_seen,
                                         unseen, fetched);
        rows_seen += unseen;
      }
    }
  }
  if (next != nullptr) {
    seen.find(others, stride, s.in.shape.positions, fetched, peak_of(s.in, *next));
  }
}

template <typename T>
void mask_side_by_side(const TemplateMask<T>& s, int64_t begin, int64_t end, Sink<T>& sink) {
  Greatest<Accumulate<T>> seen;
  if (s.find_peak && begin < end) {
    const Block block = block_of(s.in, begin);
    find_peaks(seen, maps_of(s.in, block), s.in.maps_strides.position, s.in.shape.positions,
               block.count, peak_of(s.in, block));
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(s.in, unit);
    if (refuse(s, block)) {
      continue;
    }
    const bool more = s.find_peak && unit + 1 < end;
    const Block next = more ? block_of(s.in, unit + 1) : block;
    mask_side_by_side(s, block, more ? &next : nullptr, seen, sink);
  }
}

// Maps of a block whose positions follow one another, in the output too.
template <typename T>
void mask_dense_maps(const TemplateMask<T>& s, const T* maps, T* out, int64_t* peak, int64_t count,
                     Sink<T>& sink) {
  using A = Accumulate<T>;
  const int64_t positions = s.in.shape.positions, most = Sink<T>::kPreferred / positions;
  const int64_t step = most > 1 ? most : 1;
  for (int64_t i = 0; i < count; i += step) {
    const int64_t here = step < count - i ? step : count - i;
    T* stretch = sink.open(out + i * positions, here * positions);
    for (int64_t r = 0; r < here; ++r) {
      const T* map = maps + (i + r) * s.in.maps_strides.filter;
      if (s.find_peak) {
        peak[i + r] = find_peak_dense<T, A>(map, positions);
      }
      mask_map(s, peak[i + r], map, 1, stretch + r * positions, 1);
    }
    sink.close();
  }
}

// The first `held` lanes of `masks`, and those of `more` from its first one on.
template <typename A>
PICNN_FAST_HD Vector<A> join(const Vector<A>& masks, const Vector<A>& more, int64_t held) {
  using Index = IndexOf<A>;
  Index numbers[kLanes<A>];
  for (int l = 0; l < kLanes<A>; ++l) {
    numbers[l] = l;
  }
  const Vector<Index> lanes = load<Index>(numbers);
  const auto kept = static_cast<Index>(held);
  return shuffle<A>(masks, more, lanes + ((lanes >= kept) & (kLanes<A> - kept)));
}

// The same of maps that follow one another: whole aligned vectors, in which one map may end and the
// next begin. Peaks are found some maps ahead, and what they are found in is fetched still earlier:
// a loop that waits for memory would hold up what is written.
template <typename T, bool kStream>
void mask_adjoining(const TemplateMask<T>& s, const T* x, T* out, int64_t* peak, int64_t count) {
  using A = Accumulate<T>;
  constexpr int64_t kNumbers = kLanes<A>, kPreferred = Sink<T>::kPreferred;
  const PanelLayout& layout = s.layout;
  const int64_t positions = s.in.shape.positions;
  const int64_t some = kPreferred > positions ? kPreferred / positions : 1;
  const int64_t ahead = s.find_peak ? some : 0, reach = ahead * positions + 2 * kPreferred;
  const auto find = [&](int64_t i) {
    if (s.find_peak && i < count) {
      peak[i] = find_peak_dense<T, A>(x + i * positions, positions);
    }
  };
  for (int64_t i = 0; i < ahead; ++i) {
    find(i);
  }
  const auto over = reinterpret_cast<uintptr_t>(out) % (kNumbers * sizeof(T)) / sizeof(T);
  // Numbers of the vector at hand that are not written here, or belong to the next one.
  int64_t skipped = static_cast<int64_t>(over), held = skipped, at = 0;
  Vector<A> masks = {};
  const auto write = [&](const Vector<A>& by, int64_t from) {
    __builtin_prefetch(x + from + reach);
    const Vector<A> product = load<A>(x + from) * by;
    kStream ? stream_vector<A>(product, out + from) : store<A>(product, out + from);
  };
  const auto write_part = [&](int64_t from, int64_t begin, int64_t end) {
    A by[kNumbers];
    store<A>(masks, by);
    for (int64_t i = begin; i < end; ++i) {
      out[from + i] = masked<T, A>(x[from + i], by[i]);
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    find(i + ahead);
    const A* mask = s.masks + layout.begin(peak[i]);
    for (int64_t segment = 0; segment < layout.segments; ++segment, mask += layout.per_segment) {
      int64_t p = 0;
      if (held != 0) {
        masks = join<A>(masks, load<A>(mask), held);
        p = kNumbers - held;
        if (p > layout.length) {
          held += layout.length;
          at += layout.length;
          continue;
        }
        skipped == 0 ? write(masks, at - held) : write_part(at - held, skipped, kNumbers);
        skipped = held = 0;
      }
      for (; p + kNumbers <= layout.length; p += kNumbers) {
        write(load<A>(mask + p), at + p);
      }
      if (p < layout.length) {
        masks = load<A>(mask + p);
        held = layout.length - p;
      }
      at += layout.length;
    }
  }
  write_part(at - held, skipped, held);
}

template <typename T>
void mask(const TemplateMask<T>& s, int64_t begin, int64_t end) {
  const MapPeaks<T>& in = s.in;
  const int64_t positions = in.shape.positions;
  const Strides from = in.maps_strides, to = s.out_strides;
  const bool dense = from.position == 1 && to.position == 1 && to.filter == positions;
  const bool adjoining = from.filter == positions && positions >= kLanes<Accumulate<T>>;
  Sink<T> sink(s.stream);
  if (in.side_by_side) {
    return mask_side_by_side(s, begin, end, sink);
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const Block block = block_of(in, unit);
    const T* maps = maps_of(in, block);
    T* out = s.out + block.sample * to.batch + block.first * to.filter;
    int64_t* peak = peak_of(in, block);
    if (refuse(s, block)) {
      continue;
    }
    if (dense && adjoining) {
      s.stream ? mask_adjoining<T, true>(s, maps, out, peak, block.count)
               : mask_adjoining<T, false>(s, maps, out, peak, block.count);
    } else if (dense) {
      mask_dense_maps(s, maps, out, peak, block.count, sink);
    } else {
      for (int64_t i = 0; i < block.count; ++i) {
        const T* map = maps + i * from.filter;
        if (s.find_peak) {
          peak[i] = find_peak(map, from.position, positions);
        }
        mask_map(s, peak[i], map, from.position, out + i * to.filter, to.position);
      }
    }
  }
}

template <typename T>
constexpr TemplatesKernel<T> kernels_of() {
  TemplatesKernel<T> kernels{};
  kernels.peaks = peaks<T>;
  kernels.mask = mask<T>;
  return kernels;
}

constexpr picnn_fast::TemplatesKernels all_kernels() {
  return {kernels_of<float>(), kernels_of<double>(), kernels_of<Half>(), kernels_of<BFloat16>()};
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
constexpr TemplatesKernels PICNN_FAST_KERNELS = PICNN_FAST_NAMESPACE::all_kernels();
}  // namespace picnn_fast
