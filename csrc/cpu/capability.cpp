#include "capability.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace picnn_fast {
namespace {

const char* const kNames[] = {"default", "avx2", "avx512"};

bool runs_here(Capability capability) {
#ifdef __x86_64__
  __builtin_cpu_init();
  switch (capability) {
    case Capability::kDefault:
      return true;
    case Capability::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2");
    case Capability::kAvx512:
      return runs_here(Capability::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return capability == Capability::kDefault;
#endif
}

Capability find(const std::string& name) {
  const auto names = cpu_capabilities();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    std::string message =
        "CPU capability (PICNN_FAST_CPU_CAPABILITY): got '" + name + "', want one of";
    for (const auto& available : names) {
      message += " " + available;
    }
    throw std::invalid_argument(message);
  }
  // runs_here is monotonic, so a name's place among those available is its place among all.
  return static_cast<Capability>(found - names.begin());
}

std::atomic<Capability>& current() {
  static std::atomic<Capability> capability{[] {
    const char* forced = std::getenv("PICNN_FAST_CPU_CAPABILITY");
    return find(forced != nullptr && *forced != '\0' ? forced : cpu_capabilities().back());
  }()};
  return capability;
}

}  // namespace

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (int c = 0; c < 3 && runs_here(static_cast<Capability>(c)); ++c) {
    names.emplace_back(kNames[c]);
  }
  return names;
}

Capability cpu_capability() { return current(); }

std::string cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

std::string set_cpu_capability(const std::string& name) {
  return kNames[static_cast<int>(current().exchange(find(name)))];
}

}  // namespace picnn_fast
