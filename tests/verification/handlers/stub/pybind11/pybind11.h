// What csrc/ffi_common.h, ffi_cpu.cc and ffi_cuda.cc use of pybind11, without Python: the handlers
// are called directly, and nothing is defined for a module.
#pragma once

#define PYBIND11_MODULE(name, module, ...) \
  [[maybe_unused]] static void init_##name(pybind11::module_& module)

namespace pybind11 {

struct object {
  template <class T>
  object& operator=(const T&) {
    return *this;
  }
};

struct capsule {
  explicit capsule(void*) {}
};

struct dict {
  object operator[](const char*) { return {}; }
};

struct module_ {
  template <class F, class... More>
  void def(const char*, F, More...) {}
  object attr(const char*) { return {}; }
};

template <class... T>
object make_tuple(T...) {
  return {};
}

inline int mod_gil_not_used() { return 0; }

struct gil_scoped_release {};
template <class T>
struct call_guard {};

}  // namespace pybind11
