// What csrc/ffi_common.h and ffi_cpu.cc use of pybind11, without Python: the handlers are called
// directly, and nothing is defined for a module.
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
  template <class F>
  void def(const char*, F) {}
  object attr(const char*) { return {}; }
};

template <class... T>
object make_tuple(T...) {
  return {};
}

inline int mod_gil_not_used() { return 0; }

}  // namespace pybind11
