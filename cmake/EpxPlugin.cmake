# A plug-in is a module that libepx.so opens at run time. libepx.so exports only the public API, so a plug-in carries
# its own copy of the internal objects it needs (the linker takes them from the static library) and exports only its
# entry point, `epx_<name>_plugin` (src/plugin.map). It must have no undefined symbol left.
function(epx_plugin target)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${target} PRIVATE _GNU_SOURCE $<$<BOOL:${EPX_MUTATIONS}>:EPX_MUTATIONS=1>)
  target_link_libraries(${target} PRIVATE epx_internal)
  target_link_options(${target} PRIVATE LINKER:--version-script=${PROJECT_SOURCE_DIR}/src/plugin.map
    LINKER:--exclude-libs,ALL LINKER:--as-needed)
  if(NOT EPX_SANITIZE)
    target_link_options(${target} PRIVATE LINKER:-z,defs)
  endif()
  set_target_properties(${target} PROPERTIES PREFIX "" LINK_DEPENDS ${PROJECT_SOURCE_DIR}/src/plugin.map
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
  set_property(GLOBAL APPEND PROPERTY EPX_PLUGINS ${target})
endfunction()
