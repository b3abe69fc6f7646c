#pragma once

// What every CUDA family shares: launching on the current stream of a tensor's device, and the few
// lines that differ where the tests run the same file on the CPU (PICNN_FAST_CUDA_ON_CPU, defined
// by tests/cuda_on_cpu/cuda_on_cpu.h, which takes the place of the CUDA runtime).

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

#include "../common/stable.h"

#ifndef PICNN_FAST_CUDA_ON_CPU

#include <cuda_runtime.h>

// Checked in release builds too.
#undef NDEBUG
#include <cassert>
#define PICNN_FAST_DEVICE_ASSERT(condition) assert(condition)

#define PICNN_FAST_OPERATOR_LIBRARY picnn_fast
#define PICNN_FAST_DISPATCH_KEY CUDA

// Lives in libtorch_cuda. Weak, so that this library still loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#else

#define PICNN_FAST_DEVICE_ASSERT(condition) cuda_on_cpu::device_assert(condition, #condition)
#define PICNN_FAST_OPERATOR_LIBRARY picnn_fast_fibres
#define PICNN_FAST_DISPATCH_KEY CPU

#endif

// Registers CUDA implementations: PICNN_FAST_REGISTER_CUDA(m) { m.impl("name", TORCH_BOX(&f)); }
#define PICNN_FAST_REGISTER_CUDA(m) \
  PICNN_FAST_REGISTER_(PICNN_FAST_OPERATOR_LIBRARY, PICNN_FAST_DISPATCH_KEY, m)
#define PICNN_FAST_REGISTER_(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace picnn_fast {

// The launch's dynamic shared memory, as an array of T.
template <typename T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char picnn_fast_dynamic_shared[];
  return reinterpret_cast<T*>(picnn_fast_dynamic_shared);
}

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
  (void)on;
  cuda_on_cpu::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
#else
  const int32_t device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "picnn_fast: a CUDA tensor, but libtorch_cuda is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
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
