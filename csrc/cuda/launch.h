#pragma once

// What every CUDA family shares: launching on the current stream of a tensor's device, the choice
// of a kernel by dtype, and the few lines that differ where the tests run the same file on the CPU
// (PICNN_FAST_CUDA_ON_CPU, defined by tests/cuda_on_cpu/cuda_on_cpu.h, which takes the place of the
// CUDA runtime).

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "../common/check.h"
#include "../common/macros.h"
#include "../common/rounding.h"
#include "../common/stable.h"
#include "../common/types.h"

#ifndef PICNN_FAST_CUDA_ON_CPU

#include <cuda_runtime.h>

// Checked in release builds too.
#undef NDEBUG
#include <cassert>
#define PICNN_FAST_DEVICE_ASSERT(condition) assert(condition)
// Elements whose work outweighs a few launches more.
#define PICNN_FAST_MANY_ELEMENTS (int64_t{1} << 22)

#define PICNN_FAST_OPERATOR_LIBRARY picnn_fast
#define PICNN_FAST_DISPATCH_KEY CUDA

// Lives in libtorch_cuda. Weak, so that this library still loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#else

#define PICNN_FAST_DEVICE_ASSERT(condition) cuda_on_cpu::device_assert(condition, #condition)
#define PICNN_FAST_MANY_ELEMENTS (int64_t{1} << 13)  // fibres are slow
#define PICNN_FAST_OPERATOR_LIBRARY picnn_fast_fibres
#define PICNN_FAST_DISPATCH_KEY CPU

#endif

// Registers CUDA implementations: PICNN_FAST_REGISTER_CUDA(m) { m.impl("name", TORCH_BOX(&f)); }
#define PICNN_FAST_REGISTER_CUDA(m) \
  PICNN_FAST_REGISTER_(PICNN_FAST_OPERATOR_LIBRARY, PICNN_FAST_DISPATCH_KEY, m)
#define PICNN_FAST_REGISTER_(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace picnn_fast {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// The sum over each `lanes` neighbours of a warp, a power of two of them; every lane takes part and
// gets it.
template <typename A>
__device__ A sum_warp(A value, int lanes = 32) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// W elements read or written at a time.
template <typename T, int W>
struct alignas(sizeof(T) * W) Vector {
  T lane[W];
};

// Calls run with a value of the type of the elements of `t`.
template <typename Run>
void with_type(const torch::stable::Tensor& t, const char* name, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return run(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return run(torch::headeronly::BFloat16{});
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    default:
      STD_TORCH_CHECK(false, name, ": want float32, float64, bfloat16 or float16");
  }
}

// The launch's dynamic shared memory, as an array of T.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char picnn_fast_dynamic_shared[];
  return reinterpret_cast<T*>(picnn_fast_dynamic_shared);
}

// Bytes of shared memory that a block may ask for on the device of `on`.
inline int64_t most_shared_bytes(const torch::stable::Tensor& on) {
#ifdef PICNN_FAST_CUDA_ON_CPU
  (void)on;
  return cuda_on_cpu::most_shared_bytes();
#else
  int bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                                   on.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, "picnn_fast: ", cudaGetErrorString(error));
  return bytes;
#endif
}

// Bytes of shared memory that a block may have unasked, and those of them that may be dynamic: a
// kernel's own arrays count, too.
constexpr size_t kShared = 48 << 10;
constexpr size_t kSharedUnasked = 40 << 10;

#ifndef PICNN_FAST_CUDA_ON_CPU
// Lets the kernel ask for as many bytes of dynamic shared memory as the current device, that of
// `on`, has. Once a kernel and device, and not for this launch's bytes alone: the launch of another
// thread could take them back before ours.
inline void allow_shared(const torch::stable::Tensor& on, const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int32_t>, size_t> granted;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = granted.find({kernel, on.get_device_index()});
  size_t most = at == granted.end() ? 0 : at->second;
  if (at == granted.end()) {
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) {
      most = most_shared_bytes(on) - attributes.sharedSizeBytes;
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(most));
    }
    STD_TORCH_CHECK(error == cudaSuccess,
                    "picnn_fast: shared memory of a kernel: ", cudaGetErrorString(error));
    granted[{kernel, on.get_device_index()}] = most;
  }
  STD_TORCH_CHECK(bytes <= most, "picnn_fast: a kernel wants ", bytes,
                  " bytes of shared memory, and the device has ", most, " for it");
}
#endif

// Runs kernel(args...) on a one-dimensional grid, on the current stream of `on`'s device. A launch
// of no blocks is no launch.
template <typename... Parameters, typename... Arguments>
void launch(const torch::stable::Tensor& on, void (*kernel)(Parameters...), int64_t blocks,
            int threads, size_t shared_bytes, Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "picnn_fast: ", blocks,
                  " thread blocks exceed a CUDA grid; split the batch");
  const dim3 grid(static_cast<unsigned>(blocks));
  const dim3 block(static_cast<unsigned>(threads));
#ifdef PICNN_FAST_CUDA_ON_CPU
  cuda_on_cpu::launch(
      grid, block, shared_bytes, [=] { kernel(arguments...); },
      std::max<size_t>(kShared, most_shared_bytes(on)));
#else
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "picnn_fast: a CUDA tensor, but libtorch_cuda is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (shared_bytes > kSharedUnasked)
    allow_shared(on, reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  STD_TORCH_CHECK(error == cudaSuccess,
                  "picnn_fast: CUDA launch failed: ", cudaGetErrorString(error));
#endif
}

}  // namespace picnn_fast
