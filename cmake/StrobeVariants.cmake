# Expands src/variants.def: a translation unit per row in the build folder, each with the flags of its architecture, and the table
# through which the planner finds them. Nothing generated is committed.
#
# STROBE_VARIANTS    regular expression on row names (sm90_forward_bf16_128_full_plain_...): builds a subset
# STROBE_SM80_ARCHS  real architectures the sm80 rows are compiled for; the newest also as PTX

set(STROBE_VARIANTS "" CACHE STRING "Regular expression: only kernels whose row name matches are built; empty: all")
set(STROBE_SM80_ARCHS "80;86;89;90" CACHE STRING "Architectures that the sm80 rows are compiled for")

function(strobe_arch_flags arch out)
  set(flags "")
  if(arch STREQUAL "sm90")
    list(APPEND flags "-gencode=arch=compute_90a,code=sm_90a")
  else()
    set(reals ${STROBE_SM80_ARCHS})
    # Rows with options, most of the build's time, leave out what runs binaries of 8.0 as well.
    if("options" IN_LIST ARGN AND "80" IN_LIST reals)
      list(REMOVE_ITEM reals 86 89)
    endif()
    foreach(real IN LISTS reals)
      list(APPEND flags "-gencode=arch=compute_${real},code=sm_${real}")
    endforeach()
    list(GET reals -1 newest)
    list(APPEND flags "-gencode=arch=compute_${newest},code=compute_${newest}")
  endif()
  set(${out} "${flags}" PARENT_SCOPE)
endfunction()

# Creates object libraries strobe_cuda_<arch> and sets <table> to the path of the generated table.
function(strobe_expand_variants table)
  set(dir ${PROJECT_BINARY_DIR}/generated/cuda)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/variants.def)
  file(STRINGS ${PROJECT_SOURCE_DIR}/src/variants.def rows REGEX "^STROBE_VARIANT\\(")
  set(declarations "")
  set(entries "")
  set(archs "")
  set(count 0)
  foreach(row IN LISTS rows)
    string(REGEX REPLACE "^STROBE_VARIANT\\(([^)]*)\\).*$" "\\1" fields "${row}")
    string(REGEX REPLACE "[ \t]*,[ \t]*" ";" fields "${fields}")
    list(LENGTH fields length)
    if(NOT length MATCHES "^1[01]$")
      message(FATAL_ERROR "src/variants.def: a row has ${length} fields, not 10 or 11: ${row}")
    endif()
    list(JOIN fields "_" name)
    if(STROBE_VARIANTS AND NOT name MATCHES "${STROBE_VARIANTS}")
      continue()
    endif()
    set(keys any)
    list(POP_FRONT fields arch direction dtype head_dim mask features block_m block_n stages warps)
    if(fields)
      set(keys ${fields})
    endif()
    set(params "ForwardParams")
    set(slots "launch_${name}, nullptr")
    if(direction STREQUAL "backward")
      set(params "BackwardParams")
      set(slots "nullptr, launch_${name}")
    endif()
    set(variant "Variant{Arch::${arch}, Direction::${direction}, DType::${dtype}, ${head_dim}, MaskClass::${mask}, Features::${features}, ${block_m}, ${block_n}, ${stages}, ${warps}, Keys::${keys}}")
    file(CONFIGURE OUTPUT ${dir}/${name}.cu @ONLY CONTENT
"// Written by CMake from src/variants.def.
#include \"cuda/@arch@/@direction@_launch.cuh\"
namespace strobe::cuda {
cudaError_t launch_@name@(const @params@& p, const LaunchContext& c) { return @arch@::launch<@variant@>(p, c); }
}
")
    set(kind "")
    if(NOT features STREQUAL "plain")
      set(kind options)
    endif()
    strobe_arch_flags(${arch} flags ${kind})
    set_source_files_properties(${dir}/${name}.cu PROPERTIES COMPILE_OPTIONS "${flags}")
    string(APPEND declarations "cudaError_t launch_${name}(const ${params}&, const LaunchContext&);\n")
    string(APPEND entries "    {${variant}, ${slots}},\n")
    list(APPEND archs ${arch})
    list(APPEND sources_${arch} ${dir}/${name}.cu)
    math(EXPR count "${count} + 1")
  endforeach()
  list(REMOVE_DUPLICATES archs)

  file(CONFIGURE OUTPUT ${dir}/variant_table.cpp @ONLY CONTENT
"// Written by CMake from src/variants.def.
#include \"cuda/variant_table.hpp\"

namespace strobe::cuda {

@declarations@
std::span<const VariantRow> variant_rows() {
    static const std::vector<VariantRow> rows = {
@entries@    };
    return rows;
}

}  // namespace strobe::cuda
")
  find_package(Python3 COMPONENTS Interpreter)
  if(NOT Python3_FOUND)
    message(STATUS "strobe: no Python, so the kernels' registers and spills are not checked")
  endif()
  foreach(arch IN LISTS archs)
    add_library(strobe_cuda_${arch} OBJECT ${sources_${arch}})
    target_include_directories(strobe_cuda_${arch} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
    target_compile_options(strobe_cuda_${arch} PRIVATE --expt-relaxed-constexpr -lineinfo
      "SHELL:-Xcompiler -Wall" "SHELL:-Xptxas -v")
    set_target_properties(strobe_cuda_${arch} PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 20)
    if(Python3_FOUND)
      set(launcher ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/kernel_budget.py ${CMAKE_CUDA_COMPILER_LAUNCHER})
      set_target_properties(strobe_cuda_${arch} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
    endif()
  endforeach()
  set(STROBE_CUDA_ROW_ARCHS "${archs}" PARENT_SCOPE)
  set(${table} ${dir}/variant_table.cpp PARENT_SCOPE)
  message(STATUS "strobe: ${count} CUDA kernels for ${archs}")
endfunction()
