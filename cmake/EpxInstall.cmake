# cmake --install: headers, libraries, plug-ins, command, pkg-config file, CMake package config.
include(CMakePackageConfigHelpers)
install(TARGETS epx EXPORT EpxTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/epx DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h" PATTERN "*.cuh")
if(TARGET epx_command)
  install(TARGETS epx_command RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
get_property(epx_plugins GLOBAL PROPERTY EPX_PLUGINS)
if(epx_plugins)
  install(TARGETS ${epx_plugins} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
set(EPX_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/Epx)
install(EXPORT EpxTargets NAMESPACE epx:: DESTINATION ${EPX_CMAKE_DIR})
configure_package_config_file(cmake/EpxConfig.cmake.in ${CMAKE_BINARY_DIR}/EpxConfig.cmake
  INSTALL_DESTINATION ${EPX_CMAKE_DIR})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/EpxConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/EpxConfig.cmake ${CMAKE_BINARY_DIR}/EpxConfigVersion.cmake
  DESTINATION ${EPX_CMAKE_DIR})
# The prefix is found from the file's own place, so that an installed tree may be moved.
file(RELATIVE_PATH EPX_PC_TO_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/epx.pc.in ${CMAKE_BINARY_DIR}/epx.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/epx.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
