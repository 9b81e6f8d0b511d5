// The extension module `fusedloss._C`: how this binary was built and which instruction-set level it runs.
// No tensor passes through it; those go through the operators that the other sources of this library register.
// It includes no torch header, because torch carries its own copy of pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

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
  module.doc() = "How fusedloss was built, and which instruction-set level it runs.";
  module.def("build_info", &build_info, "How this binary was built.");
  module.def("cpu_capabilities", &cpu_capabilities, "Levels that this machine can run, lowest first.");
  module.def("get_cpu_capability", &cpu::capability, "The level in use.");
  module.def("set_cpu_capability", &set_cpu_capability, py::arg("name"), "Use this level from now on, in all threads.");
  warn_about_refused_capability();
}
