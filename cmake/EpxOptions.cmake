# Options and compiler settings that every target shares.

# AUTO: built when what it needs is found, else said and skipped. ON: missing is an error. OFF: not looked for.
set(EPX_WITH_CUDA AUTO CACHE STRING "CUDA plug-in libepx_cuda.so: AUTO, ON or OFF")
set(EPX_WITH_OFI AUTO CACHE STRING "libfabric plug-in libepx_ofi.so: AUTO, ON or OFF")
set(EPX_WITH_PYTHON AUTO CACHE STRING "tests of the Python package: AUTO, ON or OFF")
foreach(option EPX_WITH_CUDA EPX_WITH_OFI EPX_WITH_PYTHON)
  set_property(CACHE ${option} PROPERTY STRINGS AUTO ON OFF)
  if(NOT ${option} MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "${option} is '${${option}}'; it must be AUTO, ON or OFF")
  endif()
endforeach()
set(EPX_SANITIZE "" CACHE STRING "sanitizers, as -fsanitize= takes them: address,undefined or thread")
option(EPX_WERROR "warnings are errors" ON)
option(EPX_MUTATIONS "test-only: compile the switches that break the protocol on purpose (src/base/mutate.h)" OFF)
option(EPX_BUILD_TESTS "build the tests" ON)
option(EPX_BUILD_EXAMPLES "build the examples" ON)

# Say that an optional part is missing: an error with ON, a line with AUTO. The caller returns after it.
function(epx_missing option what)
  if(${option} STREQUAL ON)
    message(FATAL_ERROR "${option}=ON, but ${what}")
  endif()
  message(STATUS "${option}=AUTO: skipped, ${what}")
endfunction()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "build type" FORCE)
endif()
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS ON)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_C_VISIBILITY_PRESET hidden)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
set(CMAKE_ARCHIVE_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)

# The sums of combine are defined without fused multiply-add, in every build.
add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-ffp-contract=off>)
set(EPX_WARNINGS -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes)
if(EPX_WERROR)
  # maybe-uninitialized is a guess that changes with gcc's version and level: a warning, no error.
  list(APPEND EPX_WARNINGS -Werror $<$<C_COMPILER_ID:GNU>:-Wno-error=maybe-uninitialized>)
endif()

if(EPX_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${EPX_SANITIZE}>
    $<$<COMPILE_LANGUAGE:C,CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:C,CXX>:-g>)
  add_link_options(-fsanitize=${EPX_SANITIZE})
  if(EPX_SANITIZE MATCHES "undefined")
    # An undefined operation ends the test: a line on stderr alone would pass unseen.
    add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-fno-sanitize-recover=undefined>)
  endif()
  if(EPX_SANITIZE MATCHES "thread" AND CMAKE_C_COMPILER_ID STREQUAL GNU)
    # gcc says that TSan does not model fences. The code that needs them says so where it uses them.
    add_compile_options($<$<COMPILE_LANGUAGE:C>:-Wno-tsan>)
  endif()
endif()
