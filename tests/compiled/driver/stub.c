/* A libcuda.so.1 for a machine without a GPU: what Triton's driver module and its launcher need of one.

   Nothing runs. Every call succeeds, and a launch is handed to the function that stub_on_launch was given, which reads
   the arguments before it returns. Device numbers say what GPU it is: 10 * capability + index, so 903 is index 3 of
   the GPUs of compute capability 9.0. To everybody else in the process there is no device: cuInit fails. */

#include <cuda.h>

typedef void (*Listener)(const CUlaunchConfig *config, CUfunction function, void **arguments);

static Listener listener;
static size_t modules;

/* For device.py. */

void stub_on_launch(Listener function) { listener = function; }

/* Devices and contexts. There is one context, and it is always current. */

CUresult cuInit(unsigned flags) { return CUDA_ERROR_NO_DEVICE; }

/* So new that no runtime warns of an old driver. */
CUresult cuDriverGetVersion(int *version) {
  *version = 99000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}

/* KiB of shared memory of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute
   Capability". One program may have all but one. */
static int shared_kib(int capability) {
  switch (capability) {
  case 80:
  case 87:
    return 164;
  case 90:
  case 100:
  case 103:
    return 228;
  default:
    return 100;
  }
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  int capability = device / 10;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = capability / 10;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = capability % 10;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = (shared_kib(capability) - 1) * 1024;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = shared_kib(capability) * 1024;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  default:
    *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "of the stub";
  return CUDA_SUCCESS;
}

/* Modules and functions: numbers that are never used again. */

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)++modules;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module; /* Triton asks for one function of a module */
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

/* Launches. Memory of the host passes for memory of the device. */

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  listener(config, function, arguments);
  return CUDA_SUCCESS;
}
