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
using picnn_fast::kMostFilters;
using picnn_fast::padded_positions;
using picnn_fast::Storage;
using picnn_fast::Strides;

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

// u = x - mean, and ⟨u, with⟩, or ‖u‖² without `with`. What follows the last position in u is left
// as it is.
template <bool kWith, typename A, typename T>
PICNN_FAST_HD A centre(const T* x, const A* mean, const A* with, int64_t positions, A* u) {
  Vector<A> sums[2] = {};
  const auto take = [&](int64_t p, Vector<A>& sum) {
    prefetch(x + p, kBytesAhead);
    const Vector<A> value = load<A>(x + p) - load<A>(mean + p);
    sum += value * (kWith ? load<A>(with + p) : value);
    store<A>(value, u + p);
  };
  int64_t p = 0;
  for (; p + 2 * kLanes<A> <= positions; p += 2 * kLanes<A>) {
    take(p, sums[0]);
    take(p + kLanes<A>, sums[1]);
  }
  if (p + kLanes<A> <= positions) {
    take(p, sums[0]);
    p += kLanes<A>;
  }
  A sum = 0;
  for (; p < positions; ++p) {
    const A value = widen(x[p]) - mean[p];
    sum += value * (kWith ? with[p] : value);
    u[p] = value;
  }
  return sum + sum_lanes<A>(sums[0] + sums[1]);
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
PICNN_FAST_HD void add_scaled(A* sum, A factor, const A* row, int64_t padded) {
  const Vector<A> factors = broadcast(factor);
  for (int64_t p = 0; p < padded; p += kLanes<A>) {
    store<A>(load<A>(sum + p) + factors * load<A>(row + p), sum + p);
  }
}

// Rows of a tile, [filters, padded], from maps whose filters are neighbours in memory or whose
// elements lie anyhow.
template <typename A, typename T>
void gather(const T* maps, const Strides& strides, int64_t filters, int64_t positions, A* tile,
            int64_t padded) {
  const int64_t whole = strides.filter == 1 ? filters / kLanes<A> * kLanes<A> : 0;
  for (int64_t p = 0; p < positions && whole > 0; p += kLanes<A>) {
    for (int64_t i = 0; i < whole; i += kLanes<A>) {
      Vector<A> square[kLanes<A>];
      for (int l = 0; l < kLanes<A>; ++l) {
        const T* row = maps + i + (p + l) * strides.position;
        prefetch(row, filters * sizeof(T));  // of the next tile
        square[l] = p + l < positions ? load<A>(row) : Vector<A>{};
      }
      transpose<A>(square);
      for (int l = 0; l < kLanes<A>; ++l) {
        store<A>(square[l], tile + (i + l) * padded + p);
      }
    }
  }
  for (int64_t i = whole; i < filters; ++i) {
    for (int64_t p = 0; p < positions; ++p) {
      tile[i * padded + p] = widen(maps[i * strides.filter + p * strides.position]);
    }
  }
}

// The other way round, a stretch of filters at a time where they are neighbours.
template <typename A, typename T>
void scatter(const A* tile, int64_t padded, int64_t filters, int64_t positions, T* maps,
             const Strides& strides, Sink<T>& sink) {
  if (strides.filter != 1) {
    for (int64_t i = 0; i < filters; ++i) {
      for (int64_t p = 0; p < positions; ++p) {
        maps[i * strides.filter + p * strides.position] = narrow<T>(tile[i * padded + p]);
      }
    }
    return;
  }
  const int64_t whole = filters / kLanes<A> * kLanes<A>;
  T rows[kLanes<A>][kMostFilters];
  for (int64_t p = 0; p < positions; p += kLanes<A>) {
    for (int64_t i = 0; i < whole; i += kLanes<A>) {
      Vector<A> square[kLanes<A>];
      for (int l = 0; l < kLanes<A>; ++l) {
        square[l] = load<A>(tile + (i + l) * padded + p);
      }
      transpose<A>(square);
      for (int l = 0; l < kLanes<A>; ++l) {
        store<A>(square[l], rows[l] + i);
      }
    }
    for (int64_t i = whole; i < filters; ++i) {
      for (int l = 0; l < kLanes<A>; ++l) {
        rows[l][i] = narrow<T>(tile[i * padded + p + l]);
      }
    }
    for (int64_t l = 0; l < kLanes<A> && p + l < positions; ++l) {
      T* to = sink.open(maps + (p + l) * strides.position, filters);
      std::memcpy(to, rows[l], filters * sizeof(T));
      sink.close();
    }
  }
}

template <typename A>
struct Scratch {
  A* tile;    // [c.tile, padded]
  A* groups;  // [num_groups, padded]
  A* total;   // [padded]
  A* weighted;
};
template <typename A>
Scratch<A> carve(const Correlation& c, A* memory) {
  const int64_t padded = padded_positions(c.shape.positions);
  std::memset(memory, 0, picnn_fast::correlation_scratch(c) * sizeof(A));
  A* groups = memory + c.tile * padded;
  A* total = groups + c.num_groups * padded;
  return {memory, groups, total, total + padded};
}

// Runs `use(filter, u, sum)` on every map of an image about its mean, a tile at a time, and then
// `finish(first, count)`; `use` may overwrite u. The sum is ⟨u, toward(filter)⟩, or ‖u‖² where
// kToward is false.
template <bool kToward, typename A, typename T, typename Toward, typename Use, typename Finish>
PICNN_FAST_HD void for_each_map(const Correlation& c, int64_t image, A* tile, const Toward& toward,
                                const Use& use, const Finish& finish) {
  const int64_t positions = c.shape.positions, padded = padded_positions(positions);
  const T* maps = static_cast<const T*>(c.maps) + image * c.maps_strides.batch;
  const A* mean = static_cast<const A*>(c.mean);
  const bool dense = c.maps_strides.position == 1;
  for (int64_t first = 0; first < c.shape.filters; first += c.tile) {
    const int64_t left = c.shape.filters - first;
    const int64_t count = left < c.tile ? left : c.tile;
    const T* from = maps + first * c.maps_strides.filter;
    if (!dense) {
      gather<A>(from, c.maps_strides, count, positions, tile, padded);
    }
    for (int64_t i = 0; i < count; ++i) {
      A* row = tile + i * padded;
      const A* about = mean + (first + i) * positions;
      const A* with = toward(first + i);
      const A sum =
          dense ? centre<kToward>(from + i * c.maps_strides.filter, about, with, positions, row)
                : centre<kToward>(row, about, with, positions, row);
      use(first + i, row, sum);
    }
    finish(first, count);
  }
}

template <typename T, typename A>
void forward(const Correlation& c, int64_t begin, int64_t end, A* memory) {
  const auto [batch, filters, positions] = c.shape;
  const int64_t padded = padded_positions(positions);
  const Scratch<A> s = carve(c, memory);
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
    for_each_map</*kToward=*/false, A, T>(
        c, image, s.tile, [](int64_t) -> const A* { return nullptr; },
        [&](int64_t filter, A* row, A squares) {
          norms[filter] = std::sqrt(squares);
          add_scaled(s.groups + c.groups[filter] * padded, inverse_norm(norms[filter]), row,
                     padded);
        },
        [](int64_t, int64_t) {});
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

// A row of unit·toward - along·u, in place of u or in `out`.
template <typename A, typename T>
PICNN_FAST_HD void write_gradient(MapGradient<A> gradient, const A* toward, const A* u,
                                  int64_t positions, T* out) {
  const Vector<A> unit = broadcast(gradient.unit), along = broadcast(gradient.along);
  int64_t p = 0;
  for (; p + kLanes<A> <= positions; p += kLanes<A>) {
    store<A>(unit * load<A>(toward + p) - along * load<A>(u + p), out + p);
  }
  for (; p < positions; ++p) {
    out[p] = narrow<T>(gradient.unit * toward[p] - gradient.along * u[p]);
  }
}

template <typename T, typename A>
void backward(const Correlation& c, int64_t begin, int64_t end, A* memory) {
  const auto [batch, filters, positions] = c.shape;
  const int64_t padded = padded_positions(positions);
  const Scratch<A> s = carve(c, memory);
  const Strides to = c.grad_strides;
  const bool dense = to.position == 1 && to.filter == positions;
  Sink<T> sink(c.stream);
  for (int64_t image = begin; image < end; ++image) {
    T* grad = static_cast<T*>(c.grad) + image * to.batch;
    if (c.positive != nullptr && !c.positive[image]) {
      clear(grad, to, filters, positions);
      continue;
    }
    group_gradients(c, image, s);
    const A* norms = static_cast<const A*>(c.norms) + image * filters;
    T* stretch = nullptr;
    const auto toward_of = [&](int64_t filter) -> const A* {
      return s.groups + c.groups[filter] * padded;
    };
    for_each_map</*kToward=*/true, A, T>(
        c, image, s.tile, toward_of,
        [&](int64_t filter, A* row, A product) {
          const A* toward = toward_of(filter);
          const auto gradient = map_gradient(norms[filter], product);
          const int64_t i = filter % c.tile;
          if (!dense) {
            write_gradient(gradient, toward, row, positions, row);
            return;
          }
          if (i == 0) {
            const int64_t left = filters - filter;
            stretch =
                sink.open(grad + filter * positions, (left < c.tile ? left : c.tile) * positions);
          }
          write_gradient(gradient, toward, row, positions, stretch + i * positions);
        },
        [&](int64_t first, int64_t count) {
          if (dense) {
            sink.close();
          } else {
            scatter(s.tile, padded, count, positions, grad + first * to.filter, to, sink);
          }
        });
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
