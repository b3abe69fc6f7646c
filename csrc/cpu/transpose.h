#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "vector.h"

namespace PICNN_FAST_NAMESPACE {

// Lanes of two vectors in turn: of the first halves of each kGroup lanes, or of the second ones.
template <bool kSecond, int kGroup, typename A, int... kLane>
PICNN_FAST_HD Vector<A> interleave(Vector<A> a, Vector<A> b, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kSecond ? kGroup / 2 : 0;
#ifdef __clang__
  return __builtin_shufflevector(
      a, b, (kLane / kGroup * kGroup + kLane % kGroup / 2 + kHalf + kLane % 2 * kLanes<A>)...);
#else
  return __builtin_shuffle(a, b,
                           Vector<IndexOf<A>>{(kLane / kGroup * kGroup + kLane % kGroup / 2 +
                                               kHalf + kLane % 2 * kLanes<A>)...});
#endif
}

// Squares of kGroup vectors and lanes, side by side: rows become columns. By default one square.
template <typename A, int kGroup = kLanes<A>>
PICNN_FAST_HD void transpose(Vector<A> (&rows)[kGroup]) {
  constexpr int kHalf = kGroup / 2;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<A>>{};
#pragma GCC unroll 4
  for (int round = 1; round < kGroup; round *= 2) {
    Vector<A> next[kGroup];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave<false, kGroup, A>(rows[i], rows[i + kHalf], kAll);
      next[2 * i + 1] = interleave<true, kGroup, A>(rows[i], rows[i + kHalf], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i) {
      rows[i] = next[i];
    }
  }
}

// Numbers in a row that fill the smallest vectors.
template <typename A>
constexpr int kRun = 16 / sizeof(A);

// Runs that begin at at[0], at[kRun], at[2 * kRun] and so on, as many as a vector holds. Those of
// kRun such vectors, each of the next `at`, are transposed by transpose<A, kRun<A>>.
template <typename A>
PICNN_FAST_HD Vector<A> load_runs(const A* from, const int64_t* at) {
#if defined(__AVX512F__)
  const auto run = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at[i * kRun<A>]));
  };
  __m512i runs = _mm512_castsi128_si512(run(0));
  runs = _mm512_inserti32x4(runs, run(1), 1);
  runs = _mm512_inserti32x4(runs, run(2), 2);
  return (Vector<A>)_mm512_inserti32x4(runs, run(3), 3);
#elif defined(__AVX2__)
  const auto run = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at[i * kRun<A>]));
  };
  return (Vector<A>)_mm256_inserti128_si256(_mm256_castsi128_si256(run(0)), run(1), 1);
#else
  return load<A>(from + at[0]);
#endif
}

// Twice as many, where vectors hold them.
template <typename A>
constexpr int kLongRun = kVectorBytes < 32 ? kRun<A> : 2 * kRun<A>;

// Of two vectors the parts of 128 bits with even numbers, or those with odd ones.
template <bool kOdd, typename A, int... kLane>
PICNN_FAST_HD Vector<A> every_other(Vector<A> a, Vector<A> b,
                                    std::integer_sequence<int, kLane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b,
                                 ((2 * (kLane / kRun<A>)+kOdd) * kRun<A> + kLane % kRun<A>)...);
#else
  return __builtin_shuffle(
      a, b, Vector<IndexOf<A>>{((2 * (kLane / kRun<A>)+kOdd) * kRun<A> + kLane % kRun<A>)...});
#endif
}

// Vectors of the first numbers of runs, of the second ones and so on: of the runs that begin at
// at[0], at[1] and so on, one a lane.
template <typename A>
PICNN_FAST_HD void transpose_runs(const A* from, const int64_t* at, Vector<A> (&runs)[kRun<A>]) {
#pragma GCC unroll 4
  for (int k = 0; k < kRun<A>; ++k) {
    runs[k] = load_runs(from, at + k);
  }
  transpose<A, kRun<A>>(runs);
}

#if defined(__AVX2__)
template <typename A>
PICNN_FAST_HD void transpose_runs(const A* from, const int64_t* at,
                                  Vector<A> (&runs)[2 * kRun<A>]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<A>>{};
  constexpr int kHalf = kRun<A>;
  const auto run = [&](int64_t begin) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + begin));
  };
  Vector<A> halves[2][kHalf];  // of the filters
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const int64_t* first = at + h * (kLanes<A> / 2);
#pragma GCC unroll 4
    for (int k = 0; k < kHalf; ++k) {
#if defined(__AVX512F__)
      halves[h][k] = (Vector<A>)_mm512_inserti64x4(_mm512_castsi256_si512(run(first[k])),
                                                   run(first[kHalf + k]), 1);
#else
      halves[h][k] = (Vector<A>)run(first[k]);
#endif
    }
    transpose<A, kHalf>(halves[h]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < kHalf; ++k) {
    runs[k] = every_other<false, A>(halves[0][k], halves[1][k], kAll);
    runs[kHalf + k] = every_other<true, A>(halves[0][k], halves[1][k], kAll);
  }
}
#endif

// The inverse.
template <typename A>
PICNN_FAST_HD void store_runs(const Vector<A>& runs, A* to, const int64_t* at) {
  for (int i = 0; i < kLanes<A> / kRun<A>; ++i) {
    std::memcpy(to + at[i * kRun<A>], reinterpret_cast<const A*>(&runs) + i * kRun<A>, 16);
  }
}

}  // namespace PICNN_FAST_NAMESPACE
