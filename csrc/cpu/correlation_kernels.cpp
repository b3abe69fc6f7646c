// Compiled once for each instruction set: setup.py passes PICNN_FAST_NAMESPACE and
// PICNN_FAST_KERNELS. Only headers whose functions live in that namespace may be included.
#include "correlation_kernels.h"

#include <cmath>
#include <cstring>

#include "../common/correlation.h"
#include "scalar.h"
#include "streaming.h"
#include "transpose.h"
#include "vector.h"

namespace PICNN_FAST_NAMESPACE {
namespace {

using picnn_fast::Correlation;
using picnn_fast::CorrelationBackward;
using picnn_fast::CorrelationForward;
using picnn_fast::CorrelationKernelsOf;
using picnn_fast::kGradientTile;
using picnn_fast::kTile;
using picnn_fast::MapsShape;
using picnn_fast::padded_positions;
using picnn_fast::Strides;
using picnn_fast::table_width;

template <typename A>
PICNN_FAST_HD A sum_lanes(const Vector<A>& vector) {
  return fold<A>(vector, [](auto one, auto other) { return one + other; });
}

// Asks for what is read soon: the sums of one map wait for each other, and memory would wait too.
template <typename T>
PICNN_FAST_HD void prefetch(const T* from) {
  constexpr int kFirstLevel = 3;
  __builtin_prefetch(from, /*rw=*/0, kFirstLevel);
}
// A tile of maps of 14 x 14 in float32.
constexpr int64_t kBytesAhead = 6144;

// The numbers of the lanes of a vector.
template <typename A>
PICNN_FAST_HD Vector<IndexOf<A>> lane_numbers() {
  Vector<IndexOf<A>> lane;
  for (int l = 0; l < kLanes<A>; ++l) {
    lane[l] = l;
  }
  return lane;
}

// The last `count` lanes of a vector in front, and zeros behind them: where a row ends, a vector
// that reaches back over others is read, and what is new in it goes on with whole vectors.
template <typename A>
PICNN_FAST_HD Vector<A> last_in_front(const Vector<A>& value, int64_t count) {
  const auto lane = lane_numbers<A>();
  const auto number = static_cast<IndexOf<A>>(count);
  // The second vector of the two is zero.
  const auto from = lane < number ? lane + (kLanes<A> - number) : lane + kLanes<A>;
  return shuffle<A>(value, Vector<A>{}, from);
}

// The other way: a vector that ends with the first `count` lanes of `last`, after those of the one
// before it.
template <typename A>
PICNN_FAST_HD Vector<A> reaching_back(const Vector<A>& before, const Vector<A>& last,
                                      int64_t count) {
  return shuffle<A>(before, last, lane_numbers<A>() + static_cast<IndexOf<A>>(count));
}

// Elements of a row up to the end of its last vector.
template <typename A>
PICNN_FAST_HD int64_t in_vectors(int64_t positions) {
  return (positions + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Of rows of whole vectors.
template <typename A>
PICNN_FAST_HD A dot(const A* a, const A* b, int64_t size) {
  Vector<A> sums[2] = {};
  int64_t p = 0;
  for (; p + 2 * kLanes<A> <= size; p += 2 * kLanes<A>) {
    sums[0] += load<A>(a + p) * load<A>(b + p);
    sums[1] += load<A>(a + p + kLanes<A>) * load<A>(b + p + kLanes<A>);
  }
  for (; p < size; p += kLanes<A>) {
    sums[0] += load<A>(a + p) * load<A>(b + p);
  }
  return sum_lanes<A>(sums[0] + sums[1]);
}

template <typename A>
PICNN_FAST_HD void add_scaled(A* sum, A factor, const A* row, int64_t size) {
  const Vector<A> factors = broadcast(factor);
  for (int64_t p = 0; p < size; p += kLanes<A>) {
    store<A>(load<A>(sum + p) + factors * load<A>(row + p), sum + p);
  }
}

// u = x - mean, with zeros up to whole vectors, and ⟨u, with⟩, or ‖u‖² without `with`, a row of
// whole vectors.
template <bool kWith, typename A, typename T>
PICNN_FAST_HD A centre(const T* x, int64_t stride, const A* mean, const A* with, int64_t positions,
                       A* u) {
  if (stride != 1 || positions < kLanes<A>) {
    for (int64_t p = 0; p < positions; ++p) {
      u[p] = widen(x[p * stride]) - mean[p];
    }
    const int64_t size = in_vectors<A>(positions);
    std::memset(u + positions, 0, (size - positions) * sizeof(A));
    return dot(u, kWith ? with : u, size);
  }
  Vector<A> sums[2] = {};
  const auto use = [&](const Vector<A>& value, int64_t p, int sum) {
    sums[sum] += value * (kWith ? load<A>(with + p) : value);
    store<A>(value, u + p);
  };
  const auto whole = [&](int64_t p, int sum) {
    prefetch(reinterpret_cast<const char*>(x + p) + kBytesAhead);
    use(load<A>(x + p) - load<A>(mean + p), p, sum);
  };
  int64_t p = 0;
  for (; p + 2 * kLanes<A> <= positions; p += 2 * kLanes<A>) {
    whole(p, 0);
    whole(p + kLanes<A>, 1);
  }
  if (p + kLanes<A> <= positions) {
    whole(p, 0);
    p += kLanes<A>;
  }
  if (p != positions) {
    const int64_t back = positions - kLanes<A>;
    use(last_in_front<A>(load<A>(x + back) - load<A>(mean + back), positions - p), p, 1);
  }
  return sum_lanes<A>(sums[0] + sums[1]);
}

// Rows of at most so many vectors are kept in registers while they are worked on.
constexpr int kMostVectors = kVectorBytes == 64 ? 16 : 8;

// Runs `use(n)` for rows of n vectors, a constant; false where that is more than registers hold, or
// less than a whole one.
template <typename A, int kCount = kMostVectors, typename Use>
bool in_registers(int64_t positions, const Use& use) {
  if constexpr (kCount > 0) {
    if (positions >= kLanes<A> && in_vectors<A>(positions) == kCount * kLanes<A>) {
      use(std::integral_constant<int, kCount>{});
      return true;
    }
    return in_registers<A, kCount - 1>(positions, use);
  }
  return false;
}

// u = x - mean in registers, with zeros up to whole vectors, and ⟨u, with(u, v)⟩ as centre() has
// it.
template <int kCount, typename A, typename T, typename With>
PICNN_FAST_HD A centre_in_registers(const T* x, const A* mean, int64_t positions, const With& with,
                                    Vector<A> (&u)[kCount]) {
  Vector<A> sums[2] = {};
  const auto use = [&](int v, int64_t at, int64_t count) {
    prefetch(reinterpret_cast<const char*>(x + at) + kBytesAhead);
    const Vector<A> value = load<A>(x + at) - load<A>(mean + at);
    u[v] = count == kLanes<A> ? value : last_in_front<A>(value, count);
    const Vector<A> product = u[v] * with(u[v], v * kLanes<A>);
    count == kLanes<A>&& v % 2 == 0 ? sums[0] += product : sums[1] += product;
  };
  for (int v = 0; v + 1 < kCount; ++v) {
    use(v, v * kLanes<A>, kLanes<A>);
  }
  use(kCount - 1, positions - kLanes<A>, positions - (kCount - 1) * kLanes<A>);
  return sum_lanes<A>(sums[0] + sums[1]);
}

template <typename A>
struct Scratch {
  A* tile;    // [kTile, padded]
  A* tables;  // [positions, table_width]
  A* groups;  // [num_groups, padded]
  A* total;   // [padded]
  A* weighted;
};
template <typename T, typename A>
Scratch<A> carve(const Correlation<T, A>& c, A* memory) {
  const int64_t padded = padded_positions(c.shape.positions);
  const int64_t size = picnn_fast::correlation_scratch(c.shape, c.num_groups);
  Scratch<A> s{};
  s.tile = memory;
  s.tables = memory + kTile * padded;
  std::memset(s.tables, 0, (memory + size - s.tables) * sizeof(A));  // rows end in zeros
  s.weighted = memory + size - padded;
  s.total = s.weighted - padded;
  s.groups = s.total - c.num_groups * padded;
  return s;
}

// Runs `use(i, count)` on the filters from `first` on, at most `size` of them at a time.
template <typename Use>
PICNN_FAST_HD void for_each_tile(int64_t filters, int64_t first, int64_t size, const Use& use) {
  for (int64_t i = first; i < filters; i += size) {
    const int64_t left = filters - i;
    use(i, left < size ? left : size);
  }
}

// What is read after `count` filters from `first` on of an image: the next ones at each position,
// those of the next image after the last.
template <typename T, typename A>
const T* after(const Correlation<T, A>& c, int64_t image, int64_t first, int64_t count) {
  const bool last = first + count >= c.shape.filters;
  return c.maps + (image + last) * c.maps_strides.batch + (last ? 0 : first + count);
}

// Filters that are worked on together where they are neighbours in memory: long runs of memory at
// each position. The second look at them finds them in the cache.
constexpr int64_t kRunToSum = 256, kRunOfGradients = 512;
constexpr int kPositionsAtOnce = 6;  // whose squares are added up in registers

// Adds `count` filters from `first` on, whole vectors of them, to the sums of their groups: at a
// first look come their norms, at a second they are turned to rows.
template <typename T, typename A>
void sum_run(const CorrelationForward<T, A>& c, int64_t image, int64_t first, int64_t count,
             const Scratch<A>& s) {
  const int64_t filters = c.shape.filters, positions = c.shape.positions;
  const int64_t padded = padded_positions(positions), stride = c.maps_strides.position;
  const T* maps = c.maps + image * c.maps_strides.batch + first;
  const A* means = c.mean_by_position + first;
  const auto centred = [&](int64_t p, int64_t i) {
    return load<A>(maps + p * stride + i) - load<A>(means + p * filters + i);
  };
  A factors[kRunToSum] = {};  // squares at first
  const auto add_squares = [&](int64_t p, auto rows) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      Vector<A> squares = load<A>(factors + i);
      for (int l = 0; l < rows; ++l) {
        const Vector<A> u = centred(p + l, i);
        squares += u * u;
      }
      store<A>(squares, factors + i);
    }
  };
  int64_t p = 0;
  for (; p + kPositionsAtOnce <= positions; p += kPositionsAtOnce) {
    add_squares(p, std::integral_constant<int, kPositionsAtOnce>{});
  }
  for (; p < positions; ++p) {
    add_squares(p, std::integral_constant<int, 1>{});
  }
  A* norms = c.norms + image * filters + first;
  for (int64_t i = 0; i < count; ++i) {
    norms[i] = std::sqrt(factors[i]);
    factors[i] = inverse_norm(norms[i]);
  }
  const T* next = after(c, image, first, count);
  const int64_t* groups = c.groups + first;
  const auto turn = [&](int64_t p, int rows) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const Vector<A> factor = load<A>(factors + i);
      Vector<A> square[kLanes<A>] = {};
      for (int l = 0; l < rows; ++l) {
        square[l] = factor * centred(p + l, i);
        prefetch(next + (p + l) * stride + i);
      }
      transpose<A>(square);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes<A>; ++l) {
        A* sum = s.groups + groups[i + l] * padded + p;
        store<A>(load<A>(sum) + square[l], sum);
      }
    }
  };
  for (p = 0; p + kLanes<A> <= positions; p += kLanes<A>) {
    turn(p, kLanes<A>);
  }
  if (p != positions) {
    turn(p, static_cast<int>(positions - p));
  }
}

// The sums of û by group over maps whose filters are neighbours in memory, and the norms; returns
// the filters that were added.
template <typename T, typename A>
int64_t sum_by_position(const CorrelationForward<T, A>& c, int64_t image, const Scratch<A>& s) {
  if (c.shape.positions < kLanes<A>) {
    return 0;
  }
  const int64_t whole = c.shape.filters / kLanes<A> * kLanes<A>;
  for_each_tile(whole, 0, kRunToSum,
                [&](int64_t first, int64_t count) { sum_run(c, image, first, count, s); });
  return whole;
}

// Adds the maps of a tile, over their norms, to the sums of their groups.
template <typename T, typename A>
PICNN_FAST_HD void sum_tile(const CorrelationForward<T, A>& c, int64_t image, int64_t first,
                            int64_t count, const Scratch<A>& s) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  const Strides& from = c.maps_strides;
  const T* x = c.maps + image * from.batch + first * from.filter;
  const A* mean = c.mean + first * positions;
  A* norms = c.norms + image * c.shape.filters + first;
  for (int64_t i = 0; i < count; ++i) {
    norms[i] = std::sqrt(centre</*kWith=*/false, A>(x + i * from.filter, from.position,
                                                    mean + i * positions, nullptr, positions,
                                                    s.tile + i * padded));
  }
  for (int64_t i = 0; i < count; ++i) {
    add_scaled(s.groups + c.groups[first + i] * padded, inverse_norm(norms[i]), s.tile + i * padded,
               in_vectors<A>(positions));
  }
}

template <typename A, int kCount>
PICNN_FAST_HD void add_row(A factor, const Vector<A> (&row)[kCount], A* sum) {
  const Vector<A> factors = broadcast(factor);
  for (int v = 0; v < kCount; ++v) {
    A* to = sum + v * kLanes<A>;
    store<A>(load<A>(to) + factors * row[v], to);
  }
}

// Adds filters from `first` on, each over its norm, to the sums of their groups, row after row in
// registers; whether they fit.
template <typename T, typename A>
bool sum_in_registers(const CorrelationForward<T, A>& c, int64_t image, int64_t first,
                      const Scratch<A>& s) {
  const int64_t filters = c.shape.filters, positions = c.shape.positions;
  const int64_t padded = padded_positions(positions);
  const T* maps = c.maps + image * c.maps_strides.batch;
  A* norms = c.norms + image * filters;
  const auto itself = [](const Vector<A>& u, int64_t) { return u; };
  const auto sum = [&](auto n) {
    for (int64_t i = first; i < filters; ++i) {
      Vector<A> u[n];
      norms[i] = std::sqrt(centre_in_registers<n, A>(maps + i * c.maps_strides.filter,
                                                     c.mean + i * positions, positions, itself, u));
      add_row<A, n>(inverse_norm(norms[i]), u, s.groups + c.groups[i] * padded);
    }
  };
  return c.maps_strides.position == 1 && in_registers<A>(positions, sum);
}

// What the sums of an image's groups yield.
template <typename T, typename A>
void find_moments(const CorrelationForward<T, A>& c, int64_t image, const Scratch<A>& s) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  A* sums = c.sums + image * c.num_groups * positions;
  double* within = c.moments + image * 2 * c.num_groups;
  double* across = within + c.num_groups;
  for (int64_t group = 0; group < c.num_groups; ++group) {
    add_scaled(s.total, A{1}, s.groups + group * padded, padded);
  }
  for (int64_t group = 0; group < c.num_groups; ++group) {
    const A* sum = s.groups + group * padded;
    within[group] = dot(sum, sum, padded);
    across[group] = dot(sum, s.total, padded);
    std::memcpy(sums + group * positions, sum, positions * sizeof(A));
  }
}

template <typename T, typename A>
void forward(const CorrelationForward<T, A>& c, int64_t begin, int64_t end, A* memory) {
  const auto [batch, filters, positions] = c.shape;
  const int64_t groups = c.num_groups;
  const Scratch<A> s = carve(c, memory);
  for (int64_t image = begin; image < end; ++image) {
    if (!c.counts(image)) {
      std::memset(c.norms + image * filters, 0, filters * sizeof(A));
      std::memset(c.sums + image * groups * positions, 0, groups * positions * sizeof(A));
      std::memset(c.moments + image * 2 * groups, 0, 2 * groups * sizeof(double));
      continue;
    }
    // And the total.
    std::memset(s.groups, 0, (groups + 1) * padded_positions(positions) * sizeof(A));
    const int64_t done = c.mean_by_position == nullptr ? 0 : sum_by_position(c, image, s);
    if (!sum_in_registers(c, image, done, s)) {
      for_each_tile(filters, done, kTile,
                    [&](int64_t first, int64_t count) { sum_tile(c, image, first, count, s); });
    }
    find_moments(c, image, s);
  }
}

// The gradients of û, by group.
template <typename T, typename A>
void group_gradients(const CorrelationBackward<T, A>& c, int64_t image, const Scratch<A>& s) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  const A* sums = c.sums + image * c.num_groups * positions;
  std::memset(s.total, 0, 2 * padded * sizeof(A));  // and the weighted one
  for (int64_t group = 0; group < c.num_groups; ++group) {
    A* row = s.groups + group * padded;
    std::memcpy(row, sums + group * positions, positions * sizeof(A));
    add_scaled(s.total, A{1}, row, padded);
    add_scaled(s.weighted, c.total[group], row, padded);
  }
  for (int64_t group = 0; group < c.num_groups; ++group) {
    A* row = s.groups + group * padded;
    for (int64_t p = 0; p < padded; ++p) {
      row[p] = c.own[group] * row[p] + c.total[group] * s.total[p] + s.weighted[p];
    }
  }
}

template <typename T>
void clear(T* maps, const Strides& strides, int64_t filters, int64_t positions) {
  for (int64_t i = 0; i < filters; ++i) {
    for (int64_t p = 0; p < positions; ++p) {
      maps[i * strides.filter + p * strides.position] = T{};
    }
  }
}

// A row that is done, from vectors value(0) to value(count - 1): the last one reaches back over the
// one before it.
template <typename A, typename T, typename Value>
PICNN_FAST_HD void store_row(int64_t count, const Value& value, int64_t positions, T* row) {
  Vector<A> before{};
  for (int64_t v = 0; v + 1 < count; ++v) {
    before = value(v);
    store<A>(before, row + v * kLanes<A>);
  }
  const int64_t rest = positions - (count - 1) * kLanes<A>;
  const Vector<A> last = value(count - 1);
  store<A>(rest == kLanes<A> ? last : reaching_back<A>(before, last, rest),
           row + positions - kLanes<A>);
}

// The gradient of `count` maps from `first` on, row after row, in registers; whether they fit.
template <typename T, typename A>
bool gradient_in_registers(const CorrelationBackward<T, A>& c, int64_t image, int64_t first,
                           int64_t count, const Scratch<A>& s, T* out) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  const T* maps = c.maps + image * c.maps_strides.batch;
  const A* norms = c.norms + image * c.shape.filters;
  return in_registers<A>(positions, [&](auto n) {
    for (int64_t i = first; i < first + count; ++i, out += positions) {
      const A* toward = s.groups + c.groups[i] * padded;
      Vector<A> u[n];
      const A product = centre_in_registers<n, A>(
          maps + i * c.maps_strides.filter, c.mean + i * positions, positions,
          [&](const Vector<A>&, int64_t at) { return load<A>(toward + at); }, u);
      const MapGradient<A> of = map_gradient(norms[i], product);
      const Vector<A> unit = broadcast(of.unit), along = broadcast(of.along);
      store_row<A>(
          n, [&](int64_t v) { return unit * load<A>(toward + v * kLanes<A>) - along * u[v]; },
          positions, out);
    }
  });
}

// The gradient of the maps of a tile.
template <typename T, typename A>
PICNN_FAST_HD void gradient_of_tile(const CorrelationBackward<T, A>& c, int64_t image,
                                    int64_t first, int64_t count, const Scratch<A>& s,
                                    Sink<T>& sink) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  const Strides &from = c.maps_strides, &to = c.grad_strides;
  const T* maps = c.maps + image * from.batch;
  T* grad = c.grad + image * to.batch;
  const A* norms = c.norms + image * c.shape.filters;
  const bool dense = to.position == 1 && to.filter == positions;
  T* out = dense ? sink.open(grad + first * positions, count * positions) : nullptr;
  if (dense && from.position == 1 && gradient_in_registers(c, image, first, count, s, out)) {
    return sink.close();
  }
  const A* mean = c.mean + first * positions;
  MapGradient<A> of[kGradientTile];
  const A* toward[kGradientTile];
  for (int64_t i = 0; i < count; ++i) {
    toward[i] = s.groups + c.groups[first + i] * padded;
    const A product =
        centre</*kWith=*/true>(maps + (first + i) * from.filter, from.position,
                               mean + i * positions, toward[i], positions, s.tile + i * padded);
    of[i] = map_gradient(norms[first + i], product);
  }
  for (int64_t i = 0; i < count; ++i) {
    const A* u = s.tile + i * padded;
    const auto single = [&](int64_t p) {
      return narrow<T>(of[i].unit * toward[i][p] - of[i].along * u[p]);
    };
    if (!dense || positions < kLanes<A>) {
      T* to_map = dense ? out + i * positions : grad + (first + i) * to.filter;
      for (int64_t p = 0; p < positions; ++p) {
        to_map[p * to.position] = single(p);
      }
      continue;
    }
    const Vector<A> unit = broadcast(of[i].unit), along = broadcast(of[i].along);
    store_row<A>(
        in_vectors<A>(positions) / kLanes<A>,
        [&](int64_t v) {
          return unit * load<A>(toward[i] + v * kLanes<A>) - along * load<A>(u + v * kLanes<A>);
        },
        positions, out + i * positions);
  }
  if (dense) {
    sink.close();
  }
}

// Whether all vectors of rows `stride` apart lie at addresses aligned to their size.
template <typename A, typename T>
bool in_whole_vectors(const T* rows, int64_t stride) {
  constexpr uintptr_t kBytes = kLanes<A> * sizeof(T);
  return (reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(stride) * sizeof(T)) %
             kBytes ==
         0;
}

// The elements of a short table that a vector of filters is to have, by their groups.
template <int kTables, typename A>
PICNN_FAST_HD Vector<A> look_up(const A* table, const Vector<IndexOf<A>>& groups) {
  if constexpr (kTables == 0) {
    A values[kLanes<A>];
    for (int l = 0; l < kLanes<A>; ++l) {
      values[l] = table[groups[l]];
    }
    return load<A>(values);
  } else {
    return shuffle<A>(load<A>(table), load<A>(table + (kTables - 1) * kLanes<A>), groups);
  }
}

constexpr int64_t kPositionsAhead = 8;  // that memory is asked for before their first look

// The gradient of `count` filters from `first` on, whole vectors of them at each position.
template <int kTables, typename T, typename A>
void gradient_of_run(const CorrelationBackward<T, A>& c, int64_t image, int64_t first,
                     int64_t count, const Scratch<A>& s, Sink<T>& sink) {
  const int64_t filters = c.shape.filters, positions = c.shape.positions;
  const int64_t width = table_width(c.num_groups);
  const T* maps = c.maps + image * c.maps_strides.batch + first;
  T* grad = c.grad + image * c.grad_strides.batch + first;
  const A* norms = c.norms + image * filters + first;
  IndexOf<A> groups[kRunOfGradients];
  for (int64_t i = 0; i < count; ++i) {
    groups[i] = static_cast<IndexOf<A>>(c.groups[first + i]);
  }
  // Runs `use(i, u, toward)` on the vectors of a position.
  const auto at = [&](int64_t p, const auto& use) {
    const T* x = maps + p * c.maps_strides.position;
    const A* mean = c.mean_by_position + first + p * filters;
    const A* table = s.tables + p * width;
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      Vector<IndexOf<A>> own;
      std::memcpy(&own, groups + i, sizeof(own));
      use(i, load<A>(x + i) - load<A>(mean + i), look_up<kTables>(table, own));
    }
  };
  A products[kRunOfGradients] = {}, unit[kRunOfGradients], along[kRunOfGradients];
  const int64_t stride = c.maps_strides.position;
  for (int64_t p = 0; p < positions; ++p) {
    at(p, [&](int64_t i, const Vector<A>& u, const Vector<A>& toward) {
      prefetch(maps + (p + kPositionsAhead) * stride + i);
      store<A>(load<A>(products + i) + u * toward, products + i);
    });
  }
  for (int64_t i = 0; i < count; ++i) {
    const auto of = map_gradient(norms[i], products[i]);
    unit[i] = of.unit;
    along[i] = of.along;
  }
  const T* next = after(c, image, first, count);
  const auto write = [&](int64_t p, T* out, const auto& put) {
    at(p, [&](int64_t i, const Vector<A>& u, const Vector<A>& toward) {
      prefetch(next + p * stride + i);  // while memory is written to
      put(load<A>(unit + i) * toward - load<A>(along + i) * u, out + i);
    });
  };
  const int64_t to_next = c.grad_strides.position;
  if (c.stream && in_whole_vectors<A>(grad, to_next)) {
    for (int64_t p = 0; p < positions; ++p) {
      write(p, grad + p * to_next,
            [](const Vector<A>& value, T* out) { stream_vector<A>(value, out); });
    }
    return;
  }
  for (int64_t p = 0; p < positions; ++p) {
    write(p, sink.open(grad + p * to_next, count),
          [](const Vector<A>& value, T* out) { store<A>(value, out); });
    sink.close();
  }
}

// The gradients of û, by position and there by group.
template <typename T, typename A>
void turn_to_tables(const CorrelationBackward<T, A>& c, const Scratch<A>& s) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  const int64_t width = table_width(c.num_groups);
  for (int64_t group = 0; group < c.num_groups; group += kLanes<A>) {
    for (int64_t p = 0; p < positions; p += kLanes<A>) {
      Vector<A> square[kLanes<A>] = {};
      for (int64_t l = 0; l < kLanes<A> && group + l < c.num_groups; ++l) {
        square[l] = load<A>(s.groups + (group + l) * padded + p);
      }
      transpose<A>(square);
      for (int64_t l = 0; l < kLanes<A> && p + l < positions; ++l) {
        store<A>(square[l], s.tables + (p + l) * width + group);
      }
    }
  }
}

// The gradient of an image whose filters are neighbours in memory; returns the filters it has.
template <int kTables, typename T, typename A>
int64_t gradient_by_position(const CorrelationBackward<T, A>& c, int64_t image, const Scratch<A>& s,
                             Sink<T>& sink) {
  turn_to_tables(c, s);
  const int64_t whole = c.shape.filters / kLanes<A> * kLanes<A>;
  for_each_tile(whole, 0, kRunOfGradients, [&](int64_t first, int64_t count) {
    gradient_of_run<kTables>(c, image, first, count, s, sink);
  });
  return whole;
}

template <typename T, typename A>
void backward(const CorrelationBackward<T, A>& c, int64_t begin, int64_t end, A* memory) {
  const bool by_position = c.mean_by_position != nullptr && c.grad_strides.filter == 1;
  const auto gradient = c.num_groups <= kLanes<A>       ? gradient_by_position<1, T, A>
                        : c.num_groups <= 2 * kLanes<A> ? gradient_by_position<2, T, A>
                                                        : gradient_by_position<0, T, A>;
  Sink<T> sink(c.stream);
  const Scratch<A> s = carve(c, memory);
  for (int64_t image = begin; image < end; ++image) {
    if (!c.counts(image)) {
      clear(c.grad + image * c.grad_strides.batch, c.grad_strides, c.shape.filters,
            c.shape.positions);
      continue;
    }
    group_gradients(c, image, s);
    const int64_t done = by_position ? gradient(c, image, s, sink) : 0;
    for_each_tile(c.shape.filters, done, kGradientTile, [&](int64_t first, int64_t count) {
      gradient_of_tile(c, image, first, count, s, sink);
    });
  }
}

// [C, P] turned to [P, C], filters [begin, end) of it.
template <typename A>
void by_position(const A* mean, const MapsShape& shape, int64_t begin, int64_t end, A* turned) {
  const auto [batch, filters, positions] = shape;
  for_each_tile(end, begin, kLanes<A>, [&](int64_t first, int64_t count) {
    int64_t done = 0;
    for (; count == kLanes<A> && done + kLanes<A> <= positions; done += kLanes<A>) {
      Vector<A> square[kLanes<A>];
      for (int l = 0; l < kLanes<A>; ++l) {
        square[l] = load<A>(mean + (first + l) * positions + done);
      }
      transpose<A>(square);
      for (int l = 0; l < kLanes<A>; ++l) {
        store<A>(square[l], turned + (done + l) * filters + first);
      }
    }
    for (int64_t p = done; p < positions; ++p) {
      for (int64_t i = first; i < first + count; ++i) {
        turned[p * filters + i] = mean[i * positions + p];
      }
    }
  });
}

template <typename T, typename A>
constexpr CorrelationKernelsOf<T, A> kernels_of() {
  CorrelationKernelsOf<T, A> kernels{};
  kernels.forward = forward<T, A>;
  kernels.backward = backward<T, A>;
  kernels.by_position = by_position<A>;
  return kernels;
}

constexpr picnn_fast::CorrelationKernels all_kernels() {
  return {kernels_of<float, float>(), kernels_of<double, double>(), kernels_of<Half, float>(),
          kernels_of<BFloat16, float>()};
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
constexpr CorrelationKernels PICNN_FAST_KERNELS = PICNN_FAST_NAMESPACE::all_kernels();
}  // namespace picnn_fast
