# cmake --install, find_package(strobe), pkg-config.
include(CMakePackageConfigHelpers)

install(TARGETS strobe EXPORT strobe-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY include/strobe DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT strobe-targets NAMESPACE strobe:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/strobe)

configure_package_config_file(cmake/strobe-config.cmake.in ${PROJECT_BINARY_DIR}/strobe-config.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/strobe)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/strobe-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/strobe-config.cmake ${PROJECT_BINARY_DIR}/strobe-config-version.cmake
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/strobe)

# The prefix is told relative to the .pc file, so that the installed tree can be moved.
file(RELATIVE_PATH STROBE_PC_PREFIX /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
configure_file(cmake/strobe.pc.in ${PROJECT_BINARY_DIR}/strobe.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/strobe.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
