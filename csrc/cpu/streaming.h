#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../common/macros.h"
#include "vector.h"

namespace PICNN_FAST_NAMESPACE {

// Copy past the caches, so that a line which is written whole is not read first: a third of the
// traffic of a plain copy. Whole 64-byte lines are streamed, the ragged ends are stored as usual.
// `from` and `to` must be equally aligned modulo 64.
inline void stream_copy(unsigned char* to, const unsigned char* from, int64_t bytes) {
#ifdef __x86_64__
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  if (bytes >= head + 64) {
    std::memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to),
                          _mm512_load_si512(reinterpret_cast<const __m512i*>(from)));
#elif defined(__AVX2__)
      for (int j = 0; j < 2; ++j) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + j,
                            _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + j));
      }
#else
      for (int j = 0; j < 4; ++j) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to) + j,
                         _mm_load_si128(reinterpret_cast<const __m128i*>(from) + j));
      }
#endif
    }
  }
#endif
  std::memcpy(to, from, bytes);
}

// A vector's numbers, as T, past the caches; at an address that is aligned to their size.
template <typename A, typename T>
PICNN_FAST_HD void stream_vector(const Vector<A>& vector, T* to) {
#ifdef __x86_64__
  constexpr int kBytes = kLanes<A> * sizeof(T);
#if defined(__AVX512F__)
  if constexpr (kBytes == 64) {  // as they are: T is A
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)vector);
  }
#endif
  alignas(32) T numbers[kLanes<A>];
  store<A>(vector, numbers);
#if defined(__AVX2__)
  if constexpr (kBytes == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                               *reinterpret_cast<const __m256i*>(numbers));
  }
#endif
  if constexpr (kBytes == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                            *reinterpret_cast<const __m128i*>(numbers));
  }
#endif
  store<A>(vector, to);
}

PICNN_FAST_HD void stream_both(const Vector<float>& a, const Vector<float>& b, BFloat16* to) {
  stream_vector<float>(narrow_both(a, b), reinterpret_cast<float*>(to));
}

// Where a kernel writes a stretch of its output: in place, or into a buffer in the first-level
// cache that is then streamed out.
template <typename T>
class Sink {
 public:
  static constexpr int64_t kCapacity = 32768 / sizeof(T);
  static constexpr int64_t kPreferred = 8192 / sizeof(T);

  explicit Sink(bool stream) : stream_(stream) {}
  ~Sink() {
#ifdef __x86_64__
    if (stream_) {
      _mm_sfence();  // streamed lines are visible before the work is reported done
    }
#endif
  }
  Sink(const Sink&) = delete;
  Sink& operator=(const Sink&) = delete;

  T* open(T* out, int64_t count) {
    out_ = out;
    count_ = stream_ && count <= kCapacity ? count : 0;
    return count_ == 0 ? out : reinterpret_cast<T*>(aligned_like(out));
  }
  void close() {
    if (count_ != 0) {
      stream_copy(reinterpret_cast<unsigned char*>(out_), aligned_like(out_), count_ * sizeof(T));
    }
  }

 private:
  unsigned char* aligned_like(T* out) { return buffer_ + (reinterpret_cast<uintptr_t>(out) & 63); }

  const bool stream_;
  T* out_ = nullptr;
  int64_t count_ = 0;
  alignas(64) unsigned char buffer_[kCapacity * sizeof(T) + 64];
};

}  // namespace PICNN_FAST_NAMESPACE
