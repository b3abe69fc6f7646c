// The Python module: facts about the build, what is no operator, and hooks for the known-answer
// tests. No torch headers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/philox.h"
#include "cpu/capability.h"
#include "cpu/legacy_normal.h"

namespace py = pybind11;

using Doubles = py::array_t<double, py::array::c_style>;
using Words = py::array_t<uint32_t, py::array::c_style>;

// Arrays are used in place: none is converted.
static void add_legacy_normal(const Words& key, int position, int64_t columns, int64_t first,
                              const Doubles& weights, Doubles& values) {
  picnn_fast::LegacyNormal noise{};
  if (key.size() != 624 || position < 0 || position > 624 || values.ndim() != 2 || first < 0 ||
      weights.size() != values.shape(0) || first + values.shape(0) > columns) {
    throw std::invalid_argument("key, position, columns, first, weights, values: do not fit");
  }
  noise.key = key.data();
  noise.position = position;
  noise.samples = values.shape(1);
  noise.columns = columns;
  noise.first = first;
  noise.count = values.shape(0);
  noise.weights = weights.data();
  noise.values = values.mutable_data();
  const py::gil_scoped_release released;
  picnn_fast::add_legacy_normal(noise);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of picnn_fast; importing this registers them with PyTorch.";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = PICNN_FAST_COMPILER;
    info["torch"] = PICNN_FAST_TORCH;
    info["cpu_capabilities"] = picnn_fast::cpu_capabilities();
    info["cpu_capability"] = picnn_fast::cpu_capability_name();
    info["cuda"] = std::string(PICNN_FAST_CUDA_REASON).empty();
    info["cuda_reason"] = PICNN_FAST_CUDA_REASON;
    info["cuda_compiler"] = PICNN_FAST_CUDA_COMPILER;
    info["cuda_architectures"] = PICNN_FAST_CUDA_ARCHITECTURES;
    return info;
  });
  m.def("set_cpu_capability", &picnn_fast::set_cpu_capability, py::arg("name"),
        "Run the CPU kernels with another instruction set; returns the previous one's name.");
  m.def(
      "add_legacy_normal", &add_legacy_normal, py::arg("key").noconvert(), py::arg("position"),
      py::arg("columns"), py::arg("first"), py::arg("weights").noconvert(),
      py::arg("values").noconvert(),
      "Add columns of NumPy's RandomState.standard_normal, weighted, to values [count, samples].");
  m.def(
      "philox4x32_10",
      [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
        uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
        picnn_fast::philox4x32_10(words, key[0], key[1]);
        return py::make_tuple(words[0], words[1], words[2], words[3]);
      },
      py::arg("counter"), py::arg("key"));
  m.def(
      "random_24_bits",
      [](uint64_t index, uint64_t seed, uint32_t stream, uint32_t rank) {
        return picnn_fast::random_24_bits(index, seed, static_cast<picnn_fast::Stream>(stream),
                                          rank);
      },
      py::arg("index"), py::arg("seed"), py::arg("stream"), py::arg("rank"));
}
