// A known-answer test: whether the CUDA kernel, on this GPU and with this driver, gives the results
// that it must, before any result of it is used.
#pragma once

#include <string>

namespace jax_bce {

// What fails on a device, which CUDA numbers so in this process; "" if nothing does. Tests a device
// once, within a few dozen milliseconds, and remembers the answer. Safe beside other threads, while
// they capture a CUDA graph or run collectives, too.
std::string known_answer(int device);

// The first failure among the devices that this process uses already, "" without one. Where there
// is no driver, or it is not in use, nothing runs.
std::string known_answer_of_devices_in_use();

}  // namespace jax_bce
