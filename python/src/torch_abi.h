/* The C functions of libtorch's stable ABI that strobe uses, as torch 2.9 and every later version export them.
 *
 * Declared here rather than included from torch/csrc/stable so that the library builds without torch: one binary is made
 * in seconds, wherever pip runs, and serves whichever torch >= 2.9 is installed later. A test compiles this file behind
 * torch's own headers, where a declaration that differs is an error.
 *
 * Values cross the ABI as 64-bit words (StableIValue): integers and bools in the low bytes, doubles by their bits, tensors
 * as owned handles, optionals as a null pointer or a pointer to one heap-allocated word that the receiver deletes. */
#ifndef STROBE_TORCH_ABI_H
#define STROBE_TORCH_ABI_H

#include <cstdint>

extern "C" {

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
class TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
using AOTITorchError = int32_t; /* 0: success */
using StableIValue = uint64_t;

AOTITorchError aoti_torch_library_init_def(const char* ns, const char* file, uint32_t line, TorchLibraryHandle* library);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle library, const char* schema);
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle library, const char* name,
                                       void (*kernel)(StableIValue* stack, uint64_t num_args, uint64_t num_results));
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library);

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* device_type);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* device_index);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* tensor);
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle source, int32_t non_blocking);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* another);
AOTITorchError aoti_torch_new_uninitialized_tensor(AtenTensorHandle* tensor);
AOTITorchError aoti_torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack);

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_uint64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bool();

/* Weak: null where this torch has no CUDA, or is older than the function (2.10). */
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));
AOTITorchError torch_get_num_threads(uint32_t* num_threads) __attribute__((weak));

} /* extern "C" */

#endif
