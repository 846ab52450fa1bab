// libcuda.so.1, as far as it says which devices are in use: DEVICES has a digit for each, 0 or 1.
#include <cstdlib>
#include <cstring>

extern "C" int cuDeviceGetCount(int* count) {
  return *count = static_cast<int>(std::strlen(std::getenv("DEVICES"))), 0;
}
extern "C" int cuDevicePrimaryCtxGetState(int device, unsigned*, int* active) {
  return *active = std::getenv("DEVICES")[device] == '1', 0;
}
