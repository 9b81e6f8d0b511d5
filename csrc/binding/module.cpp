// The extension module `fusedloss._C`: how this binary was built, which instruction-set level it runs, whether memory
// is reused. No tensor passes through it; those go through the operators that the other sources of this library
// register. It includes no torch header, because torch carries its own copy of pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "binding/reused_memory.h"
#include "build_info.h"
#include "kernels/cpu/dispatch.h"

namespace py = pybind11;

namespace fusedloss {
namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"version", FUSEDLOSS_VERSION},       {"compiler", FUSEDLOSS_COMPILER},
      {"build_type", FUSEDLOSS_BUILD_TYPE}, {"platform", FUSEDLOSS_PLATFORM},
      {"cpu_levels", FUSEDLOSS_CPU_LEVELS}, {"cuda", FUSEDLOSS_CUDA},
      {"torch", FUSEDLOSS_TORCH_VERSION},   {"torch_minimum", FUSEDLOSS_TORCH_MINIMUM},
  };
}

const char* memory_reuse_refused() {
  const char* const by_torch = reuse::refused_by_torch();
  return by_torch != nullptr ? by_torch : reuse::refused_by_system();
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (int i = 0; cpu::supported_capability(i) != nullptr; ++i) names.emplace_back(cpu::supported_capability(i));
  return names;
}

// "expected one of base, avx2 (what this machine and this build can run), got 'sse9'"
std::string expected_a_level(const std::string& got) {
  std::string text = "expected one of ";
  for (const std::string& name : cpu_capabilities()) text += name + ", ";
  text.erase(text.size() - 2);
  return text + " (what this machine and this build can run), got '" + got + "'";
}

void set_cpu_capability(const std::string& name) {
  if (!cpu::set_capability(name.c_str())) {
    throw py::value_error("fusedloss: set_cpu_capability: " + expected_a_level(name));
  }
}

// A wrong value must not take the program down at import, nor pass unseen.
void warn_about_refused_capability() {
  const char* refused = cpu::refused_capability();
  if (refused == nullptr) return;
  const std::string text = std::string("fusedloss: ") + cpu::kCapabilityVariable + ": " + expected_a_level(refused) +
                           "; running " + cpu::capability();
  if (PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), 1) != 0) throw py::error_already_set();
}

}  // namespace
}  // namespace fusedloss

PYBIND11_MODULE(_C, module) {
  using namespace fusedloss;
  module.doc() = "How fusedloss was built, which instruction-set level it runs, whether memory is reused.";
  module.def("build_info", &build_info, "How this binary was built.");
  module.def("cpu_capabilities", &cpu_capabilities, "Levels that this machine can run, lowest first.");
  module.def("get_cpu_capability", &cpu::capability, "The level in use.");
  module.def("set_cpu_capability", &set_cpu_capability, py::arg("name"), "Use this level from now on, in all threads.");
  module.def("memory_reuse_refused", &memory_reuse_refused, "Why memory cannot be reused here, or None.");
  module.def("reuses_memory", &reuse::is_enabled, "Whether memory is reused where it can be.");
  module.def("set_memory_reuse", &reuse::set_enabled, py::arg("enabled"), "From now on, in all threads.");
  module.def("idle_bytes", &reuse::idle_bytes, "Memory that waits for its next use.");
  module.attr("LEAST_REUSED_BYTES") = reuse::kLeastBytes;
  warn_about_refused_capability();
}
