# Whether this build has CUDA kernels. AUTO builds them where they can run; a machine without a GPU is ready in minutes.
set(STROBE_HAS_CUDA OFF)
message(STATUS "strobe: building for the CPU only")
