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

}  // namespace picnn_fast
