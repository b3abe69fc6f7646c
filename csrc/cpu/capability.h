#pragma once

#include <string>
#include <vector>

// Which instruction set the CPU kernels run with, chosen at their first use.
namespace picnn_fast {

enum class Capability { kDefault, kAvx2, kAvx512 };

// The instruction sets this build has and this processor can run, slowest first.
std::vector<std::string> cpu_capabilities();

// The one in use: the fastest, unless PICNN_FAST_CPU_CAPABILITY or set_cpu_capability says
// otherwise.
Capability cpu_capability();
std::string cpu_capability_name();

// Choose another; returns the previous name. Throws std::invalid_argument for one not available.
std::string set_cpu_capability(const std::string& name);

// Of the kernels compiled once for each instruction set, those for the one in use.
template <typename Kernels>
const Kernels& kernels_in_use(const Kernels& by_default, const Kernels& avx2,
                              const Kernels& avx512) {
  switch (cpu_capability()) {
    case Capability::kAvx512:
      return avx512;
    case Capability::kAvx2:
      return avx2;
    case Capability::kDefault:
      break;
  }
  return by_default;
}
#ifdef __x86_64__
#define PICNN_FAST_KERNELS_IN_USE(name) \
  picnn_fast::kernels_in_use(name##_default, name##_avx2, name##_avx512)
#else
#define PICNN_FAST_KERNELS_IN_USE(name) name##_default
#endif

}  // namespace picnn_fast
