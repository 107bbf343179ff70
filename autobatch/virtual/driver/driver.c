// CUDA driver: start, devices, contexts, streams. Error numbers are those of the runtime, so they are passed on.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "answers.h"
#include "card.h"
#include "driver.h"

// cuDNN carries a static copy of the runtime, which would go on to load kernels into this driver. Callers inside
// libcudnn are told that there is no driver.
static int from_cudnn(void *caller) {
  Dl_info about;
  return dladdr(caller, &about) && about.dli_fname && strstr(about.dli_fname, "libcudnn");
}
#define FROM_CUDNN from_cudnn(__builtin_return_address(0))

ENTRY CUresult cuInit(unsigned flags) { return FROM_CUDNN ? CUDA_ERROR_NO_DEVICE : (CUresult)machine(); }

ENTRY CUresult cuDriverGetVersion(int *version) {
  if (FROM_CUDNN) return CUDA_ERROR_NOT_INITIALIZED;
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

void *entry_point(const char *name) {
  static void *self;
  if (!self) {
    Dl_info about;
    if (dladdr((void *)&entry_point, &about)) self = dlopen(about.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }
  return self ? dlsym(self, answer_current_name(name)) : NULL;
}

ENTRY CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                                   CUdriverProcAddressQueryResult *status) {
  *function = FROM_CUDNN ? NULL : entry_point(name);
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

#undef cuGetProcAddress
ENTRY CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags) {
  *function = FROM_CUDNN ? NULL : entry_point(name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

ENTRY cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                   unsigned long long flags,
                                                   enum cudaDriverEntryPointQueryResult *status) {
  *function = entry_point(name);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function || status ? cudaSuccess : fail(cudaErrorSymbolNotFound);
}

#undef cudaGetDriverEntryPoint
ENTRY cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                          enum cudaDriverEntryPointQueryResult *status) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, status);
}

// Undocumented tables for NVIDIA's own libraries.
ENTRY CUresult cuGetExportTable(const void **table, const CUuuid *id) {
  *table = NULL;
  return CUDA_ERROR_NOT_FOUND;
}

ENTRY CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = cudaGetErrorString((cudaError_t)error);
  return CUDA_SUCCESS;
}

ENTRY CUresult cuGetErrorName(CUresult error, const char **text) {
  *text = error == CUDA_SUCCESS               ? "CUDA_SUCCESS"
          : error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == CUDA_ERROR_NO_DEVICE     ? "CUDA_ERROR_NO_DEVICE"
          : error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
                                              : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}

// ---- devices

ENTRY CUresult cuDeviceGetCount(int *count) {
  *count = visible_cards();
  return (CUresult)machine();
}

ENTRY CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  TRY(machine());
  *device = ordinal;
  return card_of(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

ENTRY CUresult cuDeviceGetName(char *text, int length, CUdevice device) {
  struct cudaDeviceProp about;
  TRY(cudaGetDeviceProperties(&about, device));
  snprintf(text, (size_t)length, "%s", about.name);
  return CUDA_SUCCESS;
}

ENTRY CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
  struct cudaDeviceProp about;
  TRY(cudaGetDeviceProperties(&about, device));
  memcpy(uuid, &about.uuid, sizeof *uuid);
  return CUDA_SUCCESS;
}

ENTRY CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
  struct cudaDeviceProp about;
  TRY(cudaGetDeviceProperties(&about, device));
  *bytes = about.totalGlobalMem;
  return CUDA_SUCCESS;
}

// The driver's and the runtime's attributes have the same numbers.
ENTRY CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}

ENTRY CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
  return (CUresult)cudaDeviceCanAccessPeer(can, device, peer);
}

ENTRY CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device) {
  return (CUresult)cudaDeviceGetPCIBusId(text, length, device);
}

// ---- contexts: one per device, the address of its place in this table

static char contexts[MAX_CARDS];

static CUcontext context_handle(int device) { return (CUcontext)(void *)&contexts[device]; }
static int device_of(CUcontext context) {
  char *place = (char *)(void *)context;
  return place >= contexts && place < contexts + MAX_CARDS ? (int)(place - contexts) : -1;
}

ENTRY CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  *active = has_context(device);
  return forked() ? CUDA_SUCCESS : (CUresult)machine();
}

ENTRY CUresult cuDevicePrimaryCtxRetain(CUcontext *handle, CUdevice device) {
  TRY(context(device));
  *handle = context_handle(device);
  return CUDA_SUCCESS;
}

#undef cuCtxCreate
ENTRY CUresult cuCtxCreate_v4(CUcontext *handle, CUctxCreateParams *params, unsigned flags, CUdevice device) {
  TRY(select_device(device));
  return cuDevicePrimaryCtxRetain(handle, device);
}

// The runtime makes the primary context current as soon as it is there; before that there is none.
ENTRY CUresult cuCtxGetCurrent(CUcontext *handle) {
  *handle = has_context(current_device()) ? context_handle(current_device()) : NULL;
  return CUDA_SUCCESS;
}

ENTRY CUresult cuCtxGetDevice(CUdevice *device) {
  *device = current_device();
  return has_context(*device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

ENTRY CUresult cuCtxSetCurrent(CUcontext handle) {
  int device = device_of(handle);
  if (device >= 0) TRY(select_device(device));
  return CUDA_SUCCESS;
}

static __thread int stack[16];
static __thread unsigned stacked;

ENTRY CUresult cuCtxPushCurrent_v2(CUcontext handle) {
  if (stacked == sizeof stack / sizeof *stack) return CUDA_ERROR_INVALID_VALUE;
  stack[stacked++] = current_device();
  return cuCtxSetCurrent(handle);
}

ENTRY CUresult cuCtxPopCurrent_v2(CUcontext *handle) {
  if (!stacked) return CUDA_ERROR_INVALID_CONTEXT;
  if (handle) *handle = context_handle(current_device());
  return (CUresult)select_device(stack[--stacked]);
}

ENTRY CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  return (CUresult)cudaDeviceGetStreamPriorityRange(least, greatest);
}

ENTRY CUresult cuCtxGetApiVersion(CUcontext handle, unsigned *version) {
  *version = 3020;
  return CUDA_SUCCESS;
}

// ---- streams and events are the runtime's

ENTRY CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return (CUresult)cudaStreamIsCapturing(stream, (enum cudaStreamCaptureStatus *)status);
}

ENTRY CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  return (CUresult)cudaStreamCreateWithPriority(stream, flags, 0);
}

ENTRY CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
  return (CUresult)cudaStreamCreateWithPriority(stream, flags, priority);
}

#undef cuStreamDestroy
ENTRY CUresult cuStreamDestroy_v2(CUstream stream) { return (CUresult)cudaStreamDestroy(stream); }
ENTRY CUresult cuStreamGetCtx(CUstream stream, CUcontext *handle) {
  int device;
  cudaStreamGetDevice(stream, &device);
  *handle = context_handle(device);
  return CUDA_SUCCESS;
}

ENTRY CUresult cuEventCreate(CUevent *event, unsigned flags) {
  return (CUresult)cudaEventCreateWithFlags(event, flags);
}
ENTRY CUresult cuEventRecord(CUevent event, CUstream stream) { return (CUresult)cudaEventRecord(event, stream); }
ENTRY CUresult cuEventDestroy_v2(CUevent event) { return (CUresult)cudaEventDestroy(event); }
ENTRY CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
  return (CUresult)cudaEventElapsedTime(milliseconds, start, end);
}
