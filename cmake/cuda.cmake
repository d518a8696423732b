# ESSA_CUDA=auto|on|off. auto builds the CUDA kernels where nvcc is found and compiles for our architectures with the
# static runtime, and goes on without them otherwise; on makes that an error.
set(ESSA_CUDA auto CACHE STRING "build the CUDA kernels: auto, on or off")
if(NOT ESSA_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "ESSA_CUDA must be auto, on or off, got '${ESSA_CUDA}'")
endif()

function(find_working_nvcc problem)
  find_program(NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT NVCC)
    set(${problem} "nvcc was not found" PARENT_SCOPE)
    return()
  endif()
  set(probe "${CMAKE_BINARY_DIR}/probe.cu")
  file(WRITE "${probe}" "#include <cuda_runtime.h>\n__global__ void f() {}\n"
    "int g() { int n; f<<<1, 1>>>(); return cudaGetDeviceCount(&n); }\n")
  execute_process(
    COMMAND "${NVCC}" -std=c++17 -cudart static -shared -Xcompiler -fPIC "${probe}" -o "${probe}.so"
      -gencode arch=compute_80,code=sm_80 -gencode "arch=compute_90,code=[compute_90,sm_90]"
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    set(${problem} "${NVCC} cannot compile for sm_80 and sm_90 with the static runtime:\n${output}" PARENT_SCOPE)
  endif()
endfunction()

set(ESSA_CUDA_PROBLEM "")
if(ESSA_CUDA STREQUAL "off")
  set(ESSA_CUDA_PROBLEM "ESSA_CUDA=off")
elseif(NOT CUDA_SOURCES)
  set(ESSA_CUDA_PROBLEM "there are no CUDA sources")
else()
  find_working_nvcc(ESSA_CUDA_PROBLEM)
endif()

if(ESSA_CUDA_PROBLEM)
  if(ESSA_CUDA STREQUAL "on")
    message(FATAL_ERROR "ESSA_CUDA=on, but ${ESSA_CUDA_PROBLEM}")
  endif()
  message(STATUS "Building without CUDA kernels: ${ESSA_CUDA_PROBLEM}")
else()
  set(CMAKE_CUDA_COMPILER "${NVCC}")
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)  # SASS for sm_80 and sm_90, PTX for compute_90
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)    # so that the module imports where there is no driver
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  message(STATUS "Building CUDA kernels with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
