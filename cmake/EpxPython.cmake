# The Python package compiles nothing. This finds the interpreter that its tests run under: .venv when
# tools/setup_python.sh made one, else the system's.
set(EPX_PYTHON "")
if(EPX_WITH_PYTHON STREQUAL OFF)
  message(STATUS "EPX_WITH_PYTHON=OFF")
elseif(EXISTS ${PROJECT_SOURCE_DIR}/.venv/bin/python)
  set(EPX_PYTHON ${PROJECT_SOURCE_DIR}/.venv/bin/python)
  message(STATUS "EPX_WITH_PYTHON: .venv/bin/python")
else()
  find_package(Python3 3.9 COMPONENTS Interpreter)
  if(Python3_Interpreter_FOUND)
    set(EPX_PYTHON ${Python3_EXECUTABLE})
    message(STATUS "EPX_WITH_PYTHON: ${Python3_EXECUTABLE}")
  else()
    epx_missing(EPX_WITH_PYTHON "no Python 3.9 or newer was found (apt-get install python3)")
  endif()
endif()

# pip install . : the libraries go beside the package's modules, under plain names, since a wheel holds no links.
if(SKBUILD)
  get_property(plugins GLOBAL PROPERTY EPX_PLUGINS)
  list(FILTER plugins EXCLUDE REGEX "^epx_bench_") # of the command epx, which a wheel does not have
  add_custom_target(epx_wheel DEPENDS epx ${plugins})
  set_property(TARGET epx PROPERTY VERSION)
  set_property(TARGET epx PROPERTY SOVERSION)
  install(TARGETS epx ${plugins} LIBRARY DESTINATION epx COMPONENT wheel)
endif()
