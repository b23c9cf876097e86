# libepx_cuda.so: src/device/cuda and src/algo/*/cuda. Needs nvcc 12.8 or newer to build (sm_100), a driver to run.
# EPX_CUDA_FOUND says whether CUDA programs (tests/gpu) can be built.
set(EPX_CUDA_FOUND OFF)
file(GLOB EPX_CUDA_SOURCES CONFIGURE_DEPENDS src/device/cuda/*.c src/device/cuda/*.cu src/algo/*/cuda/*.c
  src/algo/*/cuda/*.cu)

# sm_80 is compiled, never run by us. The last one leaves PTX for what comes after it. For a quick build name only yours.
set(EPX_CUDA_ARCHITECTURES "80-real;90-real;100" CACHE STRING "GPU architectures to compile for")

function(epx_cuda_target target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:C>:${EPX_WARNINGS}>
    # No fused multiply-add anywhere, so that the GPU's sums are the CPU's.
    "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;-Xcompiler=-Wall,-Wno-unused-function,-fvisibility=hidden>")
  if(EPX_WERROR)
    target_compile_options(${target} PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings;-Xcompiler=-Werror>")
  endif()
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${EPX_CUDA_ARCHITECTURES}" CUDA_STANDARD 17
    CUDA_RUNTIME_LIBRARY Static)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
endfunction()

if(EPX_WITH_CUDA STREQUAL OFF)
  message(STATUS "EPX_WITH_CUDA=OFF")
elseif(NOT EPX_CUDA_SOURCES)
  message(STATUS "EPX_WITH_CUDA=${EPX_WITH_CUDA}: there are no CUDA sources yet")
else()
  set(CMAKE_CUDA_ARCHITECTURES 90) # for the compiler check; targets set their own
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    epx_missing(EPX_WITH_CUDA "nvcc was not found (the CUDA toolkit; set CUDACXX to its nvcc)")
  else()
    enable_language(CUDA)
    find_package(CUDAToolkit)
    if(NOT CUDAToolkit_FOUND OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      epx_missing(EPX_WITH_CUDA "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.8, or its toolkit is incomplete")
    else()
      set(EPX_CUDA_FOUND ON)
      add_library(epx_cuda MODULE ${EPX_CUDA_SOURCES})
      set_target_properties(epx_cuda PROPERTIES OUTPUT_NAME libepx_cuda)
      epx_plugin(epx_cuda)
      epx_cuda_target(epx_cuda)
      # libcuda.so.1 is asked for at run time and nothing else is needed, so that it loads everywhere.
      target_link_options(epx_cuda PRIVATE -static-libstdc++ -static-libgcc)
      # What demo and bench need on GPUs: device memory, times, floors.
      file(GLOB EPX_BENCH_CUDA_SOURCES CONFIGURE_DEPENDS tools/epx/cuda/*.cu)
      if(EPX_BENCH_CUDA_SOURCES)
        add_library(epx_bench_cuda MODULE ${EPX_BENCH_CUDA_SOURCES})
        target_include_directories(epx_bench_cuda PRIVATE include src tools/epx)
        set_target_properties(epx_bench_cuda PROPERTIES PREFIX "" OUTPUT_NAME libepx_bench_cuda
          LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
        epx_cuda_target(epx_bench_cuda)
        set_property(GLOBAL APPEND PROPERTY EPX_PLUGINS epx_bench_cuda)
      endif()
      message(STATUS "EPX_WITH_CUDA: libepx_cuda.so with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
    endif()
  endif()
endif()
