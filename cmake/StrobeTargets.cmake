# Flags that every target of this project shares.

function(strobe_configure_target target)
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra -Wshadow -Wno-missing-field-initializers>)
  # GCC 12 sees overlapping copies in its own std::string's operator+ (bug 105651).
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-restrict>)
  target_link_libraries(${target} PUBLIC Threads::Threads strobe_fmt)
  strobe_sanitize_target(${target})
endfunction()

function(strobe_sanitize_target target)
  if(STROBE_SANITIZE)
    target_compile_options(${target} PUBLIC
      $<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${STROBE_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all>)
    target_link_options(${target} PUBLIC -fsanitize=${STROBE_SANITIZE})
  endif()
endfunction()

# Adds one backend: its namespace under strobe::, and the object library that holds it.
macro(strobe_add_backend namespace target)
  list(APPEND STROBE_BACKENDS ${namespace})
  list(APPEND STROBE_BACKEND_TARGETS ${target})
  if(NOT PROJECT_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR)
    set(STROBE_BACKENDS ${STROBE_BACKENDS} PARENT_SCOPE)
    set(STROBE_BACKEND_TARGETS ${STROBE_BACKEND_TARGETS} PARENT_SCOPE)
  endif()
endmacro()
