// Small kernels, some of them wrong on purpose, that show what cuda_on_cpu.h computes and catches.
// Each extern "C" function returns the error of the launch, or an empty string.

#include "launch.h"
#include "matrix_units.h"

namespace {

using picnn_fast::dynamic_shared;

constexpr unsigned kFull = 0xFFFFFFFFu;

__global__ void block_sum(const float* x, int n, float* sums) {
  __shared__ float partial[8];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    sum += x[i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kFull, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += partial[w];
    sums[blockIdx.x] = sum;
  }
}

// Every warp operation once; out is [operation, thread].
__global__ void warp_operations(int* out) {
  const int t = threadIdx.x, n = blockDim.x, lane = t % 32;
  const int value = 100 * (t / 32) + lane;
  out[0 * n + t] = __shfl_sync(kFull, value, 5);
  out[1 * n + t] = __shfl_xor_sync(kFull, value, 3);
  out[2 * n + t] = __shfl_up_sync(kFull, value, 2);
  out[3 * n + t] = __shfl_down_sync(kFull, value, 2, 8);
  out[4 * n + t] = static_cast<int>(__ballot_sync(kFull, lane % 3 == 0));
  out[5 * n + t] = __any_sync(kFull, lane == 31);
  out[6 * n + t] = __all_sync(kFull, lane < 31);
  // Two halves of a warp, each on its own.
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  out[7 * n + t] = __shfl_sync(half, value, lane < 16 ? 1 : 17);
  out[8 * n + t] = __syncthreads_count(lane == 0);
  out[9 * n + t] = __syncthreads_or(t == n - 1);
  out[10 * n + t] = __syncthreads_and(t > 0);
  out[11 * n + t] = static_cast<int>(__reduce_max_sync(kFull, value));
  out[12 * n + t] = static_cast<int>(__reduce_min_sync(kFull, value + 7));
}

__global__ void atomics(int* counters) {
  atomicAdd(&counters[0], 1);
  atomicMax(&counters[1], static_cast<int>(threadIdx.x));
  atomicMin(&counters[2], -static_cast<int>(threadIdx.x));
  atomicCAS(&counters[3], 0, __ldg(&counters[0]));
  atomicOr(&counters[4], 1 << (threadIdx.x % 8));
}

// Each thread hands its number to its neighbour through shared memory.
__global__ void neighbour(int* out, bool with_barrier) {
  int* shared = dynamic_shared<int>();
  const int t = threadIdx.x, n = blockDim.x;
  shared[t] = t;
  if (with_barrier) __syncthreads();
  out[t] = shared[(t + 1) % n];
}

// The first warp hands its sum to the second, which comes by a warp operation of its own first.
__global__ void other_warp(int* out, bool with_barrier) {
  __shared__ int handed;
  const int t = threadIdx.x;
  int sum = t % 32;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFull, sum, offset);
  if (t == 0) handed = sum;
  if (with_barrier) __syncthreads();
  out[t] = __shfl_sync(kFull, handed, 0);
}

__global__ void unwritten_shared(float* out) {
  __shared__ float fixed[4];
  out[0] = fixed[threadIdx.x];
  out[1] = dynamic_shared<float>()[threadIdx.x];
  fixed[threadIdx.x] = dynamic_shared<float>()[threadIdx.x] = 1;  // for the next block to find
}

__global__ void returns_before_barrier() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void divergent_barriers() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lane_misses_shuffle(int* out) {
  if (threadIdx.x != 7) out[threadIdx.x] = __shfl_xor_sync(kFull, 1, 1);
}

__global__ void reads_outside_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0xFFFFu, 1, 8);
}

__global__ void mixed_warp_operations(int* out) {
  out[threadIdx.x] =
      threadIdx.x < 8 ? __shfl_sync(kFull, 1, 0) : static_cast<int>(__ballot_sync(kFull, 1));
}

__global__ void writes_past_shared() { dynamic_shared<int>()[threadIdx.x + 1] = 0; }

__global__ void asserts(int limit) {
  PICNN_FAST_DEVICE_ASSERT(static_cast<int>(threadIdx.x) < limit);
}

// c [16, 8] = a [16, 8] times b [8, 8], the elements handed to the lanes that hold them.
__global__ void matrix_units(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float of_a[4] = {a[8 * g + t], a[8 * (g + 8) + t], a[8 * g + t + 4],
                         a[8 * (g + 8) + t + 4]};
  const float of_b[2] = {b[8 * t + g], b[8 * (t + 4) + g]};
  float of_c[4] = {0, 0, 0, 0};
  picnn_fast::multiply_tiles(of_c, of_a, of_b);
  for (int e = 0; e < 4; ++e) c[8 * (g + e / 2 * 8) + 2 * t + e % 2] = of_c[e];
}

// out [part, number]: the two parts of each number and whether it may be split.
__global__ void split_numbers(const float* x, float* out) {
  const int n = blockDim.x, i = threadIdx.x;
  const picnn_fast::Split parts = picnn_fast::split(x[i]);
  out[i] = parts.high;
  out[n + i] = parts.low;
  out[2 * n + i] = picnn_fast::splits(x[i]) ? 1.0f : 0.0f;
}

std::string message;

template <typename Body>
const char* run(unsigned blocks, unsigned threads, size_t shared, const Body& body,
                size_t shared_limit = cuda_on_cpu::kSharedLimit) {
  message.clear();
  try {
    cuda_on_cpu::launch(dim3(blocks), dim3(threads), shared, body, shared_limit);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {
const char* run_block_sum(const float* x, int n, float* sums, int blocks) {
  return run(blocks, 256, 0, [=] { block_sum(x, n, sums); });
}
const char* run_warp_operations(int* out) {
  return run(1, 64, 0, [=] { warp_operations(out); });
}
const char* run_atomics(int* counters) {
  return run(3, 40, 0, [=] { atomics(counters); });
}
const char* run_neighbour(int* out, int threads, bool with_barrier) {
  return run(1, threads, threads * sizeof(int), [=] { neighbour(out, with_barrier); });
}
const char* run_other_warp(int* out, bool with_barrier) {
  return run(1, 64, 0, [=] { other_warp(out, with_barrier); });
}
const char* run_unwritten_shared(float* out) {
  return run(2, 1, sizeof(float), [=] { unwritten_shared(out); });
}
const char* run_returns_before_barrier() { return run(1, 8, 0, returns_before_barrier); }
const char* run_divergent_barriers() { return run(1, 32, 0, divergent_barriers); }
const char* run_lane_misses_shuffle(int* out) {
  return run(1, 32, 0, [=] { lane_misses_shuffle(out); });
}
const char* run_reads_outside_mask(int* out) {
  return run(1, 32, 0, [=] { reads_outside_mask(out); });
}
const char* run_mixed_warp_operations(int* out) {
  return run(1, 32, 0, [=] { mixed_warp_operations(out); });
}
const char* run_writes_past_shared() { return run(1, 4, 4 * sizeof(int), writes_past_shared); }
const char* run_asserts(int limit) {
  return run(1, 4, 0, [=] { asserts(limit); });
}
const char* run_block_of(int threads, int shared) {
  return run(1, threads, shared, [] {});
}
const char* run_unwritten_shared_of(float* out, int bytes, int limit) {
  return run(2, 1, bytes, [=] { unwritten_shared(out); }, limit);
}
const char* run_matrix_units(const float* a, const float* b, float* c) {
  return run(1, 32, 0, [=] { matrix_units(a, b, c); });
}
const char* run_split_numbers(const float* x, int count, float* out) {
  return run(1, count, 0, [=] { split_numbers(x, out); });
}
}
