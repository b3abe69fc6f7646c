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
using picnn_fast::CorrelationKernels;
using picnn_fast::kTile;
using picnn_fast::padded_positions;
using picnn_fast::Storage;
using picnn_fast::Strides;
using picnn_fast::table_width;

template <typename A>
PICNN_FAST_HD A sum_lanes(const Vector<A>& vector) {
  return fold<A>(vector, [](auto one, auto other) { return one + other; });
}

// Asks for what is read soon: the sums of one map wait for each other, and memory would wait too.
template <typename T>
PICNN_FAST_HD void prefetch(const T* from, int64_t bytes) {
  constexpr int kSecondLevel = 2;
  __builtin_prefetch(reinterpret_cast<const char*>(from) + bytes, /*rw=*/0, kSecondLevel);
}
constexpr int64_t kBytesAhead = 16384;

// The last lanes of a whole vector, as many as follow the last whole vector of a row: where a row
// ends, a vector that reaches back over others is worked on, and counts from there.
template <typename A>
PICNN_FAST_HD Vector<A> only_last(const Vector<A>& value, int64_t last) {
  Vector<IndexOf<A>> lane;
  for (int l = 0; l < kLanes<A>; ++l) {
    lane[l] = l;
  }
  const auto counts = lane >= static_cast<IndexOf<A>>(kLanes<A> - last);
  return counts ? value : Vector<A>{};
}

// Runs `whole(p)` on the vectors of a row, and `last(p, count)` on the one that ends it, of which
// only the last `count` elements are new; `single(p)` where a row is shorter than a vector.
template <typename A, typename Whole, typename Last, typename Single>
PICNN_FAST_HD void along_row(int64_t positions, const Whole& whole, const Last& last,
                             const Single& single) {
  int64_t p = 0;
  for (; p + kLanes<A> <= positions; p += kLanes<A>) {
    whole(p);
  }
  if (p == positions) {
    return;
  }
  if (positions >= kLanes<A>) {
    last(positions - kLanes<A>, positions - p);
    return;
  }
  for (; p < positions; ++p) {
    single(p);
  }
}

// u = x - mean, and ⟨u, with⟩, or ‖u‖² without `with`. What follows the last position in u is left
// as it is.
template <bool kWith, typename A, typename T>
PICNN_FAST_HD A centre(const T* x, int64_t stride, const A* mean, const A* with, int64_t positions,
                       A* u) {
  A rest = 0;
  const auto single = [&](int64_t p) {
    u[p] = widen(x[p * stride]) - mean[p];
    rest += u[p] * (kWith ? with[p] : u[p]);
  };
  if (stride != 1) {
    for (int64_t p = 0; p < positions; ++p) {
      single(p);
    }
    return rest;
  }
  Vector<A> sums{};
  along_row<A>(
      positions,
      [&](int64_t p) {
        prefetch(x + p, kBytesAhead);
        const Vector<A> value = load<A>(x + p) - load<A>(mean + p);
        sums += value * (kWith ? load<A>(with + p) : value);
        store<A>(value, u + p);
      },
      [&](int64_t p, int64_t count) {
        const Vector<A> value = load<A>(x + p) - load<A>(mean + p);
        sums += only_last<A>(value * (kWith ? load<A>(with + p) : value), count);
        store<A>(value, u + p);
      },
      single);
  return rest + sum_lanes<A>(sums);
}

// Of rows with zeros up to whole vectors.
template <typename A>
PICNN_FAST_HD A dot(const A* a, const A* b, int64_t padded) {
  Vector<A> sums[2] = {};
  int64_t p = 0;
  for (; p + 2 * kLanes<A> <= padded; p += 2 * kLanes<A>) {
    sums[0] += load<A>(a + p) * load<A>(b + p);
    sums[1] += load<A>(a + p + kLanes<A>) * load<A>(b + p + kLanes<A>);
  }
  for (; p < padded; p += kLanes<A>) {
    sums[0] += load<A>(a + p) * load<A>(b + p);
  }
  return sum_lanes<A>(sums[0] + sums[1]);
}

template <typename A>
PICNN_FAST_HD void add_scaled(A* sum, A factor, const A* row, int64_t positions) {
  const Vector<A> factors = broadcast(factor);
  along_row<A>(
      positions,
      [&](int64_t p) { store<A>(load<A>(sum + p) + factors * load<A>(row + p), sum + p); },
      [&](int64_t p, int64_t count) {
        const Vector<A> more = only_last<A>(factors * load<A>(row + p), count);
        store<A>(load<A>(sum + p) + more, sum + p);
      },
      [&](int64_t p) { sum[p] += factor * row[p]; });
}

template <typename A>
struct Scratch {
  A* tile;    // [kTile, padded]
  A* groups;  // [num_groups, padded]
  A* total;   // [padded]
  A* weighted;
};
template <typename A>
Scratch<A> carve(const Correlation& c, A* memory) {
  const int64_t padded = padded_positions(c.shape.positions);
  std::memset(memory, 0, picnn_fast::correlation_scratch(c) * sizeof(A));
  A* total = memory + picnn_fast::correlation_scratch(c) - 2 * padded;
  A* groups = total - c.num_groups * padded;
  return {memory, groups, total, total + padded};
}

// Runs `use(i, count)` on the filters from `first` on, a tile at a time.
template <typename Use>
PICNN_FAST_HD void for_each_tile(const Correlation& c, int64_t first, const Use& use) {
  for (int64_t i = first; i < c.shape.filters; i += kTile) {
    const int64_t left = c.shape.filters - i;
    use(i, left < kTile ? left : kTile);
  }
}

// Vectors of filters that are worked on together where filters are neighbours in memory.
constexpr int kVectors = 4;

// Runs `use(v, first)` on vectors of filters, v of them from `first` on, as long as they are whole;
// returns the filters that were worked on.
template <typename A, typename Use>
PICNN_FAST_HD int64_t for_each_vectors(int64_t filters, const Use& use) {
  int64_t first = 0;
  for (; first + kVectors * kLanes<A> <= filters; first += kVectors * kLanes<A>) {
    use(std::integral_constant<int, kVectors>{}, first);
  }
  for (; first + kLanes<A> <= filters; first += kLanes<A>) {
    use(std::integral_constant<int, 1>{}, first);
  }
  return first;
}

// The sums of û by group over maps whose filters are neighbours in memory, and the norms; returns
// the filters that were added. They are read twice, the second time from the cache.
template <typename T, typename A>
int64_t sum_by_position(const Correlation& c, int64_t image, const Scratch<A>& s, A* norms) {
  const auto [batch, filters, positions] = c.shape;
  const int64_t padded = padded_positions(positions), stride = c.maps_strides.position;
  if (positions < kLanes<A>) {
    return 0;
  }
  const T* maps = static_cast<const T*>(c.maps) + image * c.maps_strides.batch;
  const A* means = static_cast<const A*>(c.mean_by_position);
  const auto centred = [&, filters = filters](int64_t p, int64_t filter) {
    return load<A>(maps + p * stride + filter) - load<A>(means + p * filters + filter);
  };
  return for_each_vectors<A>(filters, [&, positions = positions](auto vectors, int64_t first) {
    constexpr int kCount = vectors;
    Vector<A> squares[kCount] = {};
    for (int64_t p = 0; p < positions; ++p) {
      prefetch(maps + p * stride + first, kCount * kLanes<A> * sizeof(T));  // the next ones
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        const Vector<A> u = centred(p, first + v * kLanes<A>);
        squares[v] += u * u;
      }
    }
    std::memcpy(norms + first, squares, sizeof(squares));
    A inverse[kCount * kLanes<A>];
    for (int i = 0; i < kCount * kLanes<A>; ++i) {
      norms[first + i] = std::sqrt(norms[first + i]);
      inverse[i] = inverse_norm(norms[first + i]);
    }
    const auto add = [&](int64_t p, int64_t count) {
      for (int i = 0; i < kCount * kLanes<A>; i += kLanes<A>) {
        Vector<A> square[kLanes<A>];
        for (int l = 0; l < kLanes<A>; ++l) {
          square[l] = centred(p + l, first + i);
        }
        transpose<A>(square);
        for (int l = 0; l < kLanes<A>; ++l) {
          A* sum = s.groups + c.groups[first + i + l] * padded + p;
          const Vector<A> more = broadcast(inverse[i + l]) * square[l];
          store<A>(load<A>(sum) + (count == kLanes<A> ? more : only_last<A>(more, count)), sum);
        }
      }
    };
    along_row<A>(positions, [&](int64_t p) { add(p, kLanes<A>); }, add, [](int64_t) {});
  });
}

template <typename T, typename A>
void forward(const Correlation& c, int64_t begin, int64_t end, A* memory) {
  const auto [batch, filters, positions] = c.shape;
  const int64_t padded = padded_positions(positions);
  const Scratch<A> s = carve(c, memory);
  const Strides from = c.maps_strides;
  for (int64_t image = begin; image < end; ++image) {
    A* norms = static_cast<A*>(c.norms) + image * filters;
    A* sums = static_cast<A*>(c.sums) + image * c.num_groups * positions;
    double* within = c.moments + image * 2 * c.num_groups;
    double* across = within + c.num_groups;
    if (c.positive != nullptr && !c.positive[image]) {
      std::memset(norms, 0, filters * sizeof(A));
      std::memset(sums, 0, c.num_groups * positions * sizeof(A));
      std::memset(within, 0, 2 * c.num_groups * sizeof(double));
      continue;
    }
    std::memset(s.groups, 0, (c.num_groups + 1) * padded * sizeof(A));  // and the total
    const int64_t done = c.mean_by_position == nullptr ? 0 : sum_by_position<T>(c, image, s, norms);
    const T* maps = static_cast<const T*>(c.maps) + image * from.batch;
    for_each_tile(c, done, [&, positions = positions](int64_t first, int64_t count) {
      const T* x = maps + first * from.filter;
      const A* mean = static_cast<const A*>(c.mean) + first * positions;
      A* of = norms + first;
      for (int64_t i = 0; i < count; ++i) {
        of[i] = centre</*kWith=*/false, A>(x + i * from.filter, from.position, mean + i * positions,
                                           nullptr, positions, s.tile + i * padded);
      }
      for (int64_t i = 0; i < count; ++i) {
        of[i] = std::sqrt(of[i]);
      }
      for (int64_t i = 0; i < count; ++i) {
        add_scaled(s.groups + c.groups[first + i] * padded, inverse_norm(of[i]),
                   s.tile + i * padded, positions);
      }
    });
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
}

// The gradients of û, by group.
template <typename A>
void group_gradients(const Correlation& c, int64_t image, const Scratch<A>& s) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  const A* own = static_cast<const A*>(c.own);
  const A* total = static_cast<const A*>(c.total);
  const A* sums = static_cast<const A*>(c.sums) + image * c.num_groups * positions;
  std::memset(s.total, 0, 2 * padded * sizeof(A));  // and the weighted one
  for (int64_t group = 0; group < c.num_groups; ++group) {
    A* row = s.groups + group * padded;
    std::memcpy(row, sums + group * positions, positions * sizeof(A));
    add_scaled(s.total, A{1}, row, padded);
    add_scaled(s.weighted, total[group], row, padded);
  }
  for (int64_t group = 0; group < c.num_groups; ++group) {
    A* row = s.groups + group * padded;
    for (int64_t p = 0; p < padded; ++p) {
      row[p] = own[group] * row[p] + total[group] * s.total[p] + s.weighted[p];
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

// The gradient of the filters of an image from `begin` on, map by map.
template <typename T, typename A>
void gradient_by_filter(const Correlation& c, int64_t image, int64_t begin, const Scratch<A>& s,
                        Sink<T>& sink) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  const Strides from = c.maps_strides, to = c.grad_strides;
  const T* maps = static_cast<const T*>(c.maps) + image * from.batch;
  T* grad = static_cast<T*>(c.grad) + image * to.batch;
  const A* norms = static_cast<const A*>(c.norms) + image * c.shape.filters;
  const bool dense = to.position == 1 && to.filter == positions;
  for_each_tile(c, begin, [&](int64_t first, int64_t count) {
    const A* mean = static_cast<const A*>(c.mean) + first * positions;
    MapGradient<A> of[kTile];
    const A* toward[kTile];
    for (int64_t i = 0; i < count; ++i) {
      toward[i] = s.groups + c.groups[first + i] * padded;
      const A product =
          centre</*kWith=*/true>(maps + (first + i) * from.filter, from.position,
                                 mean + i * positions, toward[i], positions, s.tile + i * padded);
      of[i] = map_gradient(norms[first + i], product);
    }
    T* out = dense ? sink.open(grad + first * positions, count * positions) : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const A* u = s.tile + i * padded;
      const auto single = [&](int64_t p) {
        return narrow<T>(of[i].unit * toward[i][p] - of[i].along * u[p]);
      };
      if (!dense) {
        for (int64_t p = 0; p < positions; ++p) {
          grad[(first + i) * to.filter + p * to.position] = single(p);
        }
        continue;
      }
      const auto vector = [&](int64_t p, int64_t = 0) {
        store<A>(broadcast(of[i].unit) * load<A>(toward[i] + p) -
                     broadcast(of[i].along) * load<A>(u + p),
                 out + i * positions + p);
      };
      along_row<A>(positions, vector, vector,
                   [&](int64_t p) { out[i * positions + p] = single(p); });
    }
    if (dense) {
      sink.close();
    }
  });
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

// The gradient of `kCount` vectors of filters from `first` on, every vector at one position; they
// are read twice, the second time from the cache.
template <int kTables, int kCount, typename T, typename A>
void gradient_of_vectors(const Correlation& c, int64_t image, int64_t first, const A* tables,
                         Sink<T>& sink) {
  const int64_t filters = c.shape.filters, positions = c.shape.positions;
  const int64_t width = table_width(c.num_groups);
  const T* maps = static_cast<const T*>(c.maps) + image * c.maps_strides.batch + first;
  T* grad = static_cast<T*>(c.grad) + image * c.grad_strides.batch + first;
  const A* norms = static_cast<const A*>(c.norms) + image * filters + first;
  const A* means = static_cast<const A*>(c.mean_by_position) + first;
  Vector<IndexOf<A>> groups[kCount];
  for (int i = 0; i < kCount * kLanes<A>; ++i) {
    groups[i / kLanes<A>][i % kLanes<A>] = static_cast<IndexOf<A>>(c.groups[first + i]);
  }
  const auto centred = [&](int64_t p, int v) {
    return load<A>(maps + p * c.maps_strides.position + v * kLanes<A>) -
           load<A>(means + p * filters + v * kLanes<A>);
  };
  Vector<A> sums[kCount] = {};
  for (int64_t p = 0; p < positions; ++p) {
    prefetch(maps + p * c.maps_strides.position, kCount * kVectorBytes);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      sums[v] += centred(p, v) * look_up<kTables>(tables + p * width, groups[v]);
    }
  }
  A products[kCount * kLanes<A>], unit[kCount * kLanes<A>], along[kCount * kLanes<A>];
  std::memcpy(products, sums, sizeof(sums));
  for (int i = 0; i < kCount * kLanes<A>; ++i) {
    const auto of = map_gradient(norms[i], products[i]);
    unit[i] = of.unit;
    along[i] = of.along;
  }
  Vector<A> units[kCount], alongs[kCount];
  std::memcpy(units, unit, sizeof(units));
  std::memcpy(alongs, along, sizeof(alongs));
  for (int64_t p = 0; p < positions; ++p) {
    T* out = sink.open(grad + p * c.grad_strides.position, kCount * kLanes<A>);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      const Vector<A> toward = look_up<kTables>(tables + p * width, groups[v]);
      store<A>(units[v] * toward - alongs[v] * centred(p, v), out + v * kLanes<A>);
    }
    sink.close();
  }
}

// The gradient of an image whose filters are neighbours in memory; returns the filters it has.
template <int kTables, typename T, typename A>
int64_t gradient_by_position(const Correlation& c, int64_t image, const Scratch<A>& s,
                             Sink<T>& sink) {
  const int64_t padded = padded_positions(c.shape.positions), width = table_width(c.num_groups);
  A* tables = s.tile;  // [positions, width]
  for (int64_t p = 0; p < c.shape.positions; ++p) {
    for (int64_t group = 0; group < c.num_groups; ++group) {
      tables[p * width + group] = s.groups[group * padded + p];
    }
  }
  return for_each_vectors<A>(c.shape.filters, [&](auto vectors, int64_t first) {
    gradient_of_vectors<kTables, vectors>(c, image, first, tables, sink);
  });
}

template <typename T, typename A>
void backward(const Correlation& c, int64_t begin, int64_t end, A* memory) {
  const Scratch<A> s = carve(c, memory);
  Sink<T> sink(c.stream);
  for (int64_t image = begin; image < end; ++image) {
    if (c.positive != nullptr && !c.positive[image]) {
      clear(static_cast<T*>(c.grad) + image * c.grad_strides.batch, c.grad_strides, c.shape.filters,
            c.shape.positions);
      continue;
    }
    group_gradients(c, image, s);
    int64_t done = 0;
    if (c.mean_by_position != nullptr && c.grad_strides.filter == 1) {
      const auto gradient = c.num_groups <= kLanes<A>       ? gradient_by_position<1, T, A>
                            : c.num_groups <= 2 * kLanes<A> ? gradient_by_position<2, T, A>
                                                            : gradient_by_position<0, T, A>;
      done = gradient(c, image, s, sink);
    }
    gradient_by_filter<T>(c, image, done, s, sink);
  }
}

void forward_any(const Correlation& c, Storage storage, int64_t begin, int64_t end, void* scratch) {
  with_storage(storage, [&](auto t, auto a) {
    forward<decltype(t)>(c, begin, end, static_cast<decltype(a)*>(scratch));
  });
}
void backward_any(const Correlation& c, Storage storage, int64_t begin, int64_t end,
                  void* scratch) {
  with_storage(storage, [&](auto t, auto a) {
    backward<decltype(t)>(c, begin, end, static_cast<decltype(a)*>(scratch));
  });
}

}  // namespace
}  // namespace PICNN_FAST_NAMESPACE

namespace picnn_fast {
const CorrelationKernels PICNN_FAST_KERNELS = {PICNN_FAST_NAMESPACE::forward_any,
                                               PICNN_FAST_NAMESPACE::backward_any};
}  // namespace picnn_fast
