#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scalar.h"
#include "streaming.h"
#include "vector.h"

// Maps times their masks for outputs that exceed the caches: whole aligned vectors are written past
// these, and what is read is fetched ahead, so that no write waits for it.
namespace PICNN_FAST_NAMESPACE {

// Numbers as they are where the mask, of 0 and 1, is 1.
template <typename T>
struct KeepNumbers {
  using Number = std::conditional_t<sizeof(T) == 2, uint16_t,
                                    std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  static Number factor(Accumulate<T> mask) {
    return static_cast<Number>(mask == 0 ? 0 : ~uint64_t{0});
  }
  static PICNN_FAST_HD Vector<Number> product(const Vector<Number>& x, const Vector<Number>& by) {
    return x & by;
  }
};

// Numbers times the mask; zero where it is, even if they are not finite.
template <typename T>
struct ScaleNumbers {
  using Number = T;
  static Number factor(T mask) { return mask; }
  static PICNN_FAST_HD Vector<T> product(const Vector<T>& x, const Vector<T>& by) {
    return by != Vector<T>{} ? x * by : Vector<T>{};
  }
};

// Reads and writes maps of T by vectors of numbers.
template <typename T, typename Kind>
struct Products {
  using Number = typename Kind::Number;
  static constexpr int64_t kNumbers = kLanes<Number>;

  static PICNN_FAST_HD Vector<Number> read(const T* from) {
    return load<Number>(reinterpret_cast<const Number*>(from));
  }
  static PICNN_FAST_HD void write(const Vector<Number>& vector, T* to) {
    stream_vector<Number>(vector, reinterpret_cast<Number*>(to));
  }
};

template <typename T>
PICNN_FAST_HD void prefetch_row(const T* row, int64_t length) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t p = 0; p < length; p += kLine) {
    __builtin_prefetch(row + p);
  }
}

// Signed integers as wide as numbers.
template <typename Number>
using Lane = std::conditional_t<sizeof(Number) == 2, int16_t, IndexOf<Number>>;

// Whether a lane is one of the first `count`.
template <typename Number>
PICNN_FAST_HD Vector<Lane<Number>> first_lanes(int64_t count) {
  Lane<Number> numbers[kLanes<Number>];
  for (int l = 0; l < kLanes<Number>; ++l) {
    numbers[l] = static_cast<Lane<Number>>(l);
  }
  return load<Lane<Number>>(numbers) < broadcast(static_cast<Lane<Number>>(count));
}

// Numbers [begin, end) of the vector at `x`, that goes to `out`.
template <typename T, typename Kind>
void write_part(const T* x, T* out, int64_t begin, int64_t end,
                const Vector<typename Kind::Number>& by) {
  using P = Products<T, Kind>;
  using Number = typename Kind::Number;
  T part[P::kNumbers] = {};
  std::memcpy(static_cast<void*>(part + begin), x + begin, (end - begin) * sizeof(T));
  store<Number>(Kind::product(P::read(part), by), reinterpret_cast<Number*>(part));
  std::memcpy(static_cast<void*>(out + begin), part + begin, (end - begin) * sizeof(T));
}

template <typename T>
int64_t numbers_before(const T* out) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(T));
}

// Rows of `length` numbers, at least a vector, that follow one another, each times its mask.
// `visit` is called with each row before it is read and written.
template <typename T, typename Visit>
void write_scaled(const T* x, T* out, int64_t length, const T* mask, int64_t rows,
                  const Visit& visit) {
  using Kind = ScaleNumbers<T>;
  using P = Products<T, Kind>;
  constexpr int64_t kNumbers = P::kNumbers;
  // Numbers of the vector at hand that are not written here, or belong to the next row.
  int64_t skipped = numbers_before(out), held = skipped;
  Vector<T> last = {};
  for (int64_t i = 0; i < rows; ++i) {
    visit(i);
    const Vector<T> by = broadcast<T>(mask[i]);
    const int64_t at = i * length;
    int64_t p = 0;
    if (held != 0) {
      const int64_t from = at - held;
      const Vector<T> both = first_lanes<T>(held) ? last : by;
      skipped == 0 ? P::write(Kind::product(P::read(x + from), both), out + from)
                   : write_part<T, Kind>(x + from, out + from, skipped, kNumbers, both);
      skipped = 0;
      p = kNumbers - held;
    }
    for (; p + kNumbers <= length; p += kNumbers) {
      P::write(Kind::product(P::read(x + at + p), by), out + at + p);
    }
    held = length - p;
    last = by;
  }
  const int64_t from = rows * length - held;
  write_part<T, Kind>(x + from, out + from, 0, held, last);
}

// Rows of `length` numbers that follow one another: those of masks that are not zero as they are,
// the others cleared and not read.
template <typename T>
void write_kept(const T* x, T* out, int64_t length, const Accumulate<T>* mask, int64_t rows) {
  using Kind = KeepNumbers<T>;
  using Number = typename Kind::Number;
  using P = Products<T, Kind>;
  constexpr int64_t kNumbers = P::kNumbers, kRows = 512, kAhead = 4;
  const auto up_to = [](int64_t count) { return (Vector<Number>)first_lanes<Number>(count); };
  int64_t skipped = numbers_before(out), at = -skipped;  // of the vector at hand
  Vector<Number> by = {};                                // what it keeps
  bool any = false;
  const auto write = [&] {
    if (skipped != 0) {
      write_part<T, Kind>(x + at, out + at, skipped, kNumbers, by);
    } else {
      P::write(any ? Kind::product(P::read(x + at), by) : Vector<Number>{}, out + at);
    }
    skipped = 0;
    any = false;
    by = Vector<Number>{};
    at += kNumbers;
  };
  int64_t kept[kRows + kAhead];
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t left = rows - first, here = kRows < left ? kRows : left;
    int64_t count = 0;
    for (int64_t i = first; i < first + here; ++i) {
      kept[count] = i;
      count += mask[i] != 0 ? 1 : 0;
    }
    for (int64_t k = 0; k < count; ++k) {
      if (k + kAhead < count) {
        prefetch_row(x + kept[k + kAhead] * length, length);
      }
      const int64_t begin = kept[k] * length, end = begin + length;
      while (at + kNumbers <= begin) {
        write();
      }
      by |= up_to(end - at < kNumbers ? end - at : kNumbers) & ~up_to(begin - at);
      any = true;
      if (at + kNumbers <= end) {
        write();
        for (; at + kNumbers <= end; at += kNumbers) {
          P::write(P::read(x + at), out + at);
        }
        by = up_to(end - at);
        any = at < end;
      }
    }
  }
  const int64_t end = rows * length;
  while (at + kNumbers <= end) {
    write();
  }
  write_part<T, Kind>(x + at, out + at, skipped, end - at, by);
}

// Filters side by side, of a whole number of lines: so many of each row at once.
constexpr int64_t kFiltersInLines = 1024;

template <typename T>
bool fills_lines(const T* out, int64_t stride, int64_t filters) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride % kLine == 0 && filters % kLine == 0;
}

// How many rows ahead to fetch.
template <typename T>
int64_t rows_to_fetch(int64_t filters) {
  constexpr int64_t kLeast = 4;
  const int64_t rows = 2 * Sink<T>::kPreferred / filters;
  return rows > kLeast ? rows : kLeast;
}

// `positions` rows of at most kFiltersInLines filters. Lines of masks that are zero are not read.
template <typename T, typename Kind>
void write_lines(const T* x, int64_t stride, T* out, int64_t out_stride, int64_t positions,
                 const Accumulate<T>* mask, int64_t filters) {
  using P = Products<T, Kind>;
  using Number = typename Kind::Number;
  constexpr int64_t kLine = 64 / sizeof(T);
  Number by[kFiltersInLines];
  bool kept[kFiltersInLines / kLine] = {};
  for (int64_t i = 0; i < filters; ++i) {
    by[i] = Kind::factor(mask[i]);
    kept[i / kLine] |= mask[i] != 0;
  }
  const int64_t ahead = rows_to_fetch<T>(filters) * stride;
  for (int64_t p = 0; p < positions; ++p, x += stride, out += out_stride) {
    for (int64_t i = 0; i < filters; i += kLine) {
      if (kept[i / kLine]) {
        __builtin_prefetch(x + ahead + i);
        for (int64_t j = i; j < i + kLine; j += P::kNumbers) {
          P::write(Kind::product(P::read(x + j), load<Number>(by + j)), out + j);
        }
      } else {
        for (int64_t j = i; j < i + kLine; j += P::kNumbers) {
          P::write(Vector<Number>{}, out + j);
        }
      }
    }
  }
}

// The gradients of a product with masks: that of the maps, and for each filter the sum of the
// gradient times the map, in the order of the positions.
template <typename T>
void backward_lines(const T* x, int64_t stride, const T* grad, int64_t grad_stride, T* out,
                    int64_t out_stride, int64_t positions, const T* mask, T* sums,
                    int64_t filters) {
  using P = Products<T, ScaleNumbers<T>>;
  const int64_t ahead = rows_to_fetch<T>(2 * filters);
  std::memset(sums, 0, filters * sizeof(T));
  for (int64_t p = 0; p < positions; ++p, x += stride, grad += grad_stride, out += out_stride) {
    for (int64_t i = 0; i < filters; i += P::kNumbers) {
      __builtin_prefetch(x + ahead * stride + i);
      __builtin_prefetch(grad + ahead * grad_stride + i);
      store<T>(load<T>(sums + i) + load<T>(x + i) * load<T>(grad + i), sums + i);
    }
    for (int64_t i = 0; i < filters; i += P::kNumbers) {
      P::write(ScaleNumbers<T>::product(load<T>(grad + i), load<T>(mask + i)), out + i);
    }
  }
}

}  // namespace PICNN_FAST_NAMESPACE
