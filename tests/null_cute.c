/* CuTe's runtime on the null GPU (null_gpu.c), in the place of libcute_dsl_runtime.so.

   What the compiled code of a kernel calls on the host: it checks its tensors, then loads its binary
   and launches it, by functions that have a CUDA of their own inside and need a real driver. */

#include <cuda.h>
#include <cuda_runtime.h>

int cuda_dialect_init_library_once(void) { return 0; }
int cuda_dialect_unload_library_once(void) { return 0; }
void CuteDSLRT_TVMFFISetRaisedCudaError(void) {}
CUresult _cuKernelGetAttribute(int *value) { return *value = 0, CUDA_SUCCESS; }
cudaError_t _cudaGetDevice(int *device) { return cudaGetDevice(device); }
cudaError_t _cudaGetDeviceCount(int *count) { return cudaGetDeviceCount(count); }
cudaError_t _cudaSetDevice(int device) { return cudaSetDevice(device); }
cudaError_t _cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}
cudaError_t _cudaLibraryLoadData(void **library) { return cudaEventCreate((cudaEvent_t *)library); }
cudaError_t _cudaLibraryGetKernel(void **kernel) { return cudaEventCreate((cudaEvent_t *)kernel); }
cudaError_t _cudaKernelSetAttributeForDevice(void) { return cudaSuccess; }
cudaError_t _cudaFuncSetAttribute(void) { return cudaSuccess; }
cudaError_t _cudaLaunchKernelEx(const cudaLaunchConfig_t *config, const void *f, void **values) {
  return cudaLaunchKernelExC(config, f, values);
}
