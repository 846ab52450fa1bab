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

# Numbers alone: "native" and "all" leave the choice to JAX_BCE_CUDA.
string(REGEX MATCHALL "[0-9]+" ARCHITECTURES "$ENV{CUDAARCHS}")
if(JAX_BCE_CUDA STREQUAL "AUTO" AND NOT ARCHITECTURES)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE LISTED ERROR_QUIET RESULT_VARIABLE FAILED)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" PRESENT "${LISTED}")
  list(TRANSFORM PRESENT REPLACE "\\." "")
  if(FAILED OR NOT PRESENT)
    message(STATUS "jax_bce: no CUDA kernel, as nvidia-smi lists no GPU on this machine. For other \
machines, JAX_BCE_CUDA=ON builds one for every GPU, and CUDAARCHS=90 one for compute capability 9.0")
    return()
  endif()
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
set(WHAT "there is no nvcc")
if(NVCC)
  execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE RELEASE)
  if(RELEASE MATCHES "release ([0-9]+)" AND CMAKE_MATCH_1 LESS 12)
    set(WHAT "${NVCC} is of CUDA ${CMAKE_MATCH_1}")
    unset(NVCC CACHE)
    set(NVCC)
  endif()
endif()
if(NOT NVCC)
  set(REMEDY "install a CUDA toolkit, 12 or newer, with nvcc on the PATH or in $CUDA_HOME/bin, or \
let pip download the compiler: JAX_BCE_CUDA=PYPI pip install .")
  if(JAX_BCE_CUDA STREQUAL "PYPI")
    set(REMEDY "pip install . downloads it; without build isolation, install the packages that \
pyproject.toml lists for JAX_BCE_CUDA=PYPI first")
  endif()
  if(JAX_BCE_CUDA STREQUAL "AUTO")
    message(STATUS "jax_bce: no CUDA kernel, as ${WHAT}. To build one, ${REMEDY}")
    return()
  endif()
  message(FATAL_ERROR "JAX_BCE_CUDA=${JAX_BCE_CUDA}, but ${WHAT}: ${REMEDY}")
endif()

# Machine code for those GPUs, or for every generation that this compiler knows. It is assembled from few
# versions of PTX, each of which takes a run of the compiler: those that brought instructions which the
# kernels use. The oldest and the newest are kept, for GPUs between the generations and GPUs to come.
execute_process(COMMAND ${NVCC} --list-gpu-arch OUTPUT_VARIABLE KNOWN COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9]+" KNOWN "${KNOWN}")
list(SORT KNOWN COMPARE NATURAL)
if(PRESENT)
  foreach(gpu IN LISTS PRESENT)  # a GPU that this compiler does not know runs the newest PTX before it
    set(newest)
    foreach(architecture IN LISTS KNOWN)
      if(architecture GREATER_EQUAL 75 AND architecture LESS_EQUAL gpu)
        set(newest ${architecture})
      endif()
    endforeach()
    list(APPEND ARCHITECTURES ${newest})
  endforeach()
  if(NOT ARCHITECTURES)
    string(REPLACE "\n" " " LISTED "${LISTED}")
    message(STATUS "jax_bce: no CUDA kernel, as it needs compute capability 7.5 or newer. The GPUs of \
this machine: ${LISTED}")
    return()
  endif()
  set(WHY " (the GPUs of this machine; JAX_BCE_CUDA=ON builds it for every GPU)")
elseif(NOT ARCHITECTURES)
  foreach(architecture 75 80 90 100 120)  # 8.6 and 8.9 run the code for 8.0
    if(architecture IN_LIST KNOWN)
      list(APPEND ARCHITECTURES ${architecture})
    endif()
  endforeach()
endif()
list(SORT ARCHITECTURES COMPARE NATURAL)
list(REMOVE_DUPLICATES ARCHITECTURES)
foreach(architecture IN LISTS ARCHITECTURES)
  if(NOT architecture IN_LIST KNOWN)
    message(FATAL_ERROR "${NVCC} does not know compute capability ${architecture}: with CUDAARCHS, name \
some that `nvcc --list-gpu-arch` lists, as in CUDAARCHS='80;90'")
  endif()
  set(version ${architecture})
  foreach(with_new_instructions 75 80 90)
    if(with_new_instructions IN_LIST KNOWN AND with_new_instructions LESS_EQUAL architecture)
      set(version ${with_new_instructions})
    endif()
  endforeach()
  list(APPEND PTX ${version})
  list(APPEND CODE -gencode arch=compute_${version},code=sm_${architecture})
endforeach()
list(GET PTX 0 -1 PTX)
list(REMOVE_DUPLICATES PTX)
foreach(version IN LISTS PTX)
  list(APPEND CODE -gencode arch=compute_${version},code=compute_${version})
endforeach()

# nvcc on the PATH may be a wrapper script, so ask nvcc itself where its libraries are. (Debian's nvcc
# prints no TOP.)
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
message(STATUS "jax_bce: CUDA kernel for ${ARCHITECTURES}${WHY}, PTX of ${PTX}, by ${NVCC}")

# What only the host runs is compiled by the host's compiler, which nvcc calls. -fmad=false: as in the
# CPU kernels, no product is rounded where the source does not say so.
execute_process(COMMAND ${NVCC} --help OUTPUT_VARIABLE HELP)
if(HELP MATCHES "--compress-mode")
  list(APPEND CODE --compress-mode=size)
endif()
file(GLOB HEADERS CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/*.h ${CMAKE_SOURCE_DIR}/csrc/*.cuh)
foreach(source bce_cuda.cu known_answer.cc)
  set(OPTIONS -O1)
  if(source STREQUAL bce_cuda.cu)
    set(OPTIONS -O3 -fmad=false --threads 0 -Xptxas -v ${CODE})
  endif()
  string(REGEX REPLACE "[.].*" ".o" OBJECT ${CMAKE_CURRENT_BINARY_DIR}/${source})
  list(APPEND OBJECTS ${OBJECT})
  add_custom_command(
    OUTPUT ${OBJECT}
    DEPENDS ${CMAKE_SOURCE_DIR}/csrc/${source} ${HEADERS}
    COMMAND ${NVCC} -std=c++17 $<$<BOOL:${JAX_BCE_WERROR}>:-Werror=all-warnings>
            ${OPTIONS} -ccbin ${CMAKE_CXX_COMPILER}
            -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas,-fPIC,-fvisibility=hidden
            -c ${CMAKE_SOURCE_DIR}/csrc/${source} -o ${OBJECT}
    VERBATIM COMMAND_EXPAND_LISTS)
endforeach()
pybind11_add_module(_cuda NO_EXTRAS csrc/ffi_cuda.cc ${OBJECTS})
target_compile_options(_cuda PRIVATE -Og)
target_link_options(_cuda PRIVATE -s)
target_include_directories(_cuda SYSTEM PRIVATE ${XLA_INCLUDE})
target_compile_definitions(
  _cuda PRIVATE "BCE_CUDA_MACHINE_CODE=${ARCHITECTURES}" "BCE_CUDA_PTX=${PTX}")
target_link_libraries(_cuda PRIVATE ${CUDART_STATIC} ${CMAKE_DL_LIBS} pthread rt)
install(TARGETS _cuda LIBRARY DESTINATION jax_bce)

# Of sbom.cdx.json.in.
string(REGEX MATCH "V([0-9.]+)" NVCC_VERSION "${RELEASE}")
set(CUDA_REFERENCE ", \"cudart\"")
set(CUDA_COMPONENT ",
    {
      \"type\": \"library\",
      \"bom-ref\": \"cudart\",
      \"name\": \"cudart_static\",
      \"version\": \"${CMAKE_MATCH_1}\",
      \"description\": \"NVIDIA's CUDA runtime, with the version of nvcc\",
      \"licenses\": [{ \"license\": { \"name\": \"NVIDIA CUDA Toolkit EULA\" } }]
    }")
