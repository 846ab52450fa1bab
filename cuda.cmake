# The CUDA kernel. JAX_BCE_CUDA=AUTO builds it if nvcc is installed, for the GPUs that are present. ON
# builds it for every GPU; PYPI does the same with the compiler from the packages that pyproject.toml
# then adds to the build's requirements; OFF leaves it out. CUDAARCHS names other GPUs to build it for.
set(JAX_BCE_CUDA AUTO CACHE STRING "AUTO, ON, OFF or PYPI")
if(NOT JAX_BCE_CUDA MATCHES "^(AUTO|ON|OFF|PYPI)$")
  message(FATAL_ERROR "JAX_BCE_CUDA is AUTO, ON, OFF or PYPI, not '${JAX_BCE_CUDA}'")
endif()
if(JAX_BCE_CUDA STREQUAL "OFF")
  message(STATUS "jax_bce: no CUDA kernel, as JAX_BCE_CUDA=OFF asks")
  return()
endif()

set(ARCHITECTURES $ENV{CUDAARCHS})
if(JAX_BCE_CUDA STREQUAL "AUTO" AND NOT ARCHITECTURES)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE PRESENT ERROR_QUIET RESULT_VARIABLE FAILED)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" ARCHITECTURES "${PRESENT}")
  list(TRANSFORM ARCHITECTURES REPLACE "\\." "")
  if(FAILED OR NOT ARCHITECTURES)
    message(STATUS "jax_bce: no CUDA kernel, as this machine has no NVIDIA GPU. For other machines, \
JAX_BCE_CUDA=ON builds one for every GPU, and CUDAARCHS=90 one for compute capability 9.0")
    return()
  endif()
  message(STATUS "jax_bce: the CUDA kernel is for the GPUs of this machine. JAX_BCE_CUDA=ON builds it \
for every GPU")
endif()

# A build folder that is used again must not remember another mode's compiler.
unset(NVCC CACHE)
unset(CUDART_STATIC CACHE)
if(JAX_BCE_CUDA STREQUAL "PYPI")
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(\
u.find_spec('nvidia').submodule_search_locations[0] + '/cu13/bin')"
    OUTPUT_VARIABLE PYPI_BIN OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_program(NVCC nvcc PATHS ${PYPI_BIN} NO_DEFAULT_PATH)
else()
  find_program(NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin PATHS /usr/local/cuda/bin)
endif()
if(NOT NVCC)
  set(REMEDY "install a CUDA toolkit, 12 or newer, with nvcc on the PATH or in $CUDA_HOME/bin, or \
let pip fetch the compiler: JAX_BCE_CUDA=PYPI pip install .")
  if(JAX_BCE_CUDA STREQUAL "AUTO")
    message(STATUS "jax_bce: no CUDA kernel, as there is no nvcc. For one, ${REMEDY}")
    return()
  endif()
  message(FATAL_ERROR "JAX_BCE_CUDA=${JAX_BCE_CUDA}, but there is no nvcc: ${REMEDY}")
endif()

# Machine code for those GPUs, or for every generation that this compiler knows. PTX for the oldest, for
# GPUs between the generations, and for the newest, for GPUs to come.
execute_process(COMMAND ${NVCC} --list-gpu-arch OUTPUT_VARIABLE KNOWN COMMAND_ERROR_IS_FATAL ANY)
if(NOT ARCHITECTURES)
  foreach(architecture 75 80 86 89 90 100 120)
    if(KNOWN MATCHES "compute_${architecture}\n")
      list(APPEND ARCHITECTURES ${architecture})
    endif()
  endforeach()
endif()
list(SORT ARCHITECTURES COMPARE NATURAL)
list(REMOVE_DUPLICATES ARCHITECTURES)
foreach(architecture IN LISTS ARCHITECTURES)
  if(NOT KNOWN MATCHES "compute_${architecture}\n")
    message(FATAL_ERROR "${NVCC} does not know compute capability ${architecture}: with CUDAARCHS, name \
some that `nvcc --list-gpu-arch` lists, as in CUDAARCHS='80;90'")
  endif()
  list(APPEND CODE -gencode arch=compute_${architecture},code=sm_${architecture})
endforeach()
list(GET ARCHITECTURES 0 -1 PTX)
list(REMOVE_DUPLICATES PTX)
foreach(architecture IN LISTS PTX)
  list(APPEND CODE -gencode arch=compute_${architecture},code=compute_${architecture})
endforeach()

# nvcc may be a script elsewhere: its own words say where its libraries are. (Debian's names no TOP.)
execute_process(COMMAND ${NVCC} --dryrun -x cu -c /dev/null -o /dev/null ERROR_VARIABLE DRYRUN)
string(REGEX MATCHALL "-L[^\" \n]+" FOLDERS "${DRYRUN}")
list(TRANSFORM FOLDERS REPLACE "^-L" "")
if(DRYRUN MATCHES "TOP=([^\n]*)")
  list(PREPEND FOLDERS ${CMAKE_MATCH_1})
endif()
find_library(CUDART_STATIC cudart_static NO_DEFAULT_PATH PATHS ${FOLDERS}
  PATH_SUFFIXES lib64 lib targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib targets/sbsa-linux/lib)
if(NOT CUDART_STATIC)
  message(FATAL_ERROR "${NVCC} comes without libcudart_static.a (looked in ${FOLDERS}): "
    "install the toolkit's runtime, nvidia-cuda-runtime, or set JAX_BCE_CUDA=OFF")
endif()
list(JOIN ARCHITECTURES ", " ARCHITECTURES)
list(JOIN PTX ", " PTX)
message(STATUS "jax_bce: CUDA kernel for ${ARCHITECTURES}, PTX of ${PTX}, by ${NVCC}")

# -fmad=false: as in the CPU kernels, no product is rounded where the source does not say so.
set(OBJECT ${CMAKE_CURRENT_BINARY_DIR}/bce_cuda.o)
add_custom_command(
  OUTPUT ${OBJECT}
  DEPENDS ${CMAKE_SOURCE_DIR}/csrc/bce_cuda.cu ${CMAKE_SOURCE_DIR}/csrc/bce_cuda.h
          ${CMAKE_SOURCE_DIR}/csrc/bce_cuda_loop.cuh ${CMAKE_SOURCE_DIR}/csrc/bce_cuda_rows.cuh
          ${CMAKE_SOURCE_DIR}/csrc/bce_cuda_numbers.cuh
          ${CMAKE_SOURCE_DIR}/csrc/bce_problem.h ${CMAKE_SOURCE_DIR}/csrc/bce_math.h
  COMMAND ${NVCC} -std=c++17 -O3 -fmad=false --threads 0
          $<$<BOOL:${JAX_BCE_WERROR}>:-Werror=all-warnings> -Xptxas -v ${CODE}
          -ccbin ${CMAKE_CXX_COMPILER}
          -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas,-fPIC,-fvisibility=hidden
          -c ${CMAKE_SOURCE_DIR}/csrc/bce_cuda.cu -o ${OBJECT}
  VERBATIM COMMAND_EXPAND_LISTS)
pybind11_add_module(_cuda NO_EXTRAS csrc/ffi_cuda.cc ${OBJECT})
target_compile_options(_cuda PRIVATE -O1)
target_link_options(_cuda PRIVATE -s)
target_include_directories(_cuda SYSTEM PRIVATE ${XLA_INCLUDE})
target_compile_definitions(
  _cuda PRIVATE "BCE_CUDA_MACHINE_CODE=${ARCHITECTURES}" "BCE_CUDA_PTX=${PTX}")
target_link_libraries(_cuda PRIVATE ${CUDART_STATIC} ${CMAKE_DL_LIBS} pthread rt)
install(TARGETS _cuda LIBRARY DESTINATION jax_bce)
