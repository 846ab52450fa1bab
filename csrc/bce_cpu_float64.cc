#include "bce_cpu_loop.h"

namespace jax_bce::BCE_INSTRUCTION_SET {
const CpuLoop kFloat64 = kLoop<double>;
}
