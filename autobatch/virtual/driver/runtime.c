// CUDA runtime: devices, properties, errors.
#include <stdio.h>
#include <string.h>

#include "card.h"

static __thread cudaError_t last_error;

cudaError_t fail(cudaError_t error) { return error == cudaSuccess ? error : (last_error = error); }

ENTRY cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

ENTRY cudaError_t cudaPeekAtLastError(void) { return last_error; }

// The names and words of the errors this library can give, but for cudaErrorUnknown; PyTorch shows them and callers
// match on them. The driver's errors have the same numbers.
static const struct {
  cudaError_t code;
  const char *name, *words;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorMissingConfiguration, "cudaErrorMissingConfiguration", "__global__ function call is not configured"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorDeviceUninitialized, "cudaErrorDeviceUninitialized", "invalid device context"},
    {cudaErrorAlreadyMapped, "cudaErrorAlreadyMapped", "resource already mapped"},
    {cudaErrorOperatingSystem, "cudaErrorOperatingSystem", "OS call failed or operation not supported on this OS"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {cudaErrorSymbolNotFound, "cudaErrorSymbolNotFound", "named symbol not found"},
    {cudaErrorPeerAccessUnsupported, "cudaErrorPeerAccessUnsupported",
     "peer access is not supported between these two devices"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
};

ENTRY const char *cudaGetErrorName(cudaError_t error) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].code == error) return errors[i].name;
  return "cudaErrorUnknown";
}

ENTRY const char *cudaGetErrorString(cudaError_t error) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].code == error) return errors[i].words;
  return "unknown error";
}

// No card is an error, as in the real runtime, and zero cards.
ENTRY cudaError_t cudaGetDeviceCount(int *count) {
  *count = visible_cards();
  return fail(machine());
}

ENTRY cudaError_t cudaGetDevice(int *device) {
  *device = current_device();
  return forked() ? cudaSuccess : fail(machine());
}

// Since CUDA 12 choosing a device makes its context.
ENTRY cudaError_t cudaSetDevice(int device) {
  if (forked() && device == current_device()) return cudaSuccess;
  NEED(select_device(device));
  return fail(context(device));
}

ENTRY cudaError_t cudaInitDevice(int device, unsigned flags, unsigned device_flags) { return fail(context(device)); }

ENTRY cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  NEED(machine());
  if (!card_of(device)) return fail(cudaErrorInvalidDevice);
  properties_of(device, properties);
  return cudaSuccess;
}

// What is not listed is a feature that this card does not have.
ENTRY cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  NEED(cudaGetDeviceProperties(&p, device));
  switch ((int)attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrTotalConstantMemory: *value = (int)p.totalConstMem; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxPitch: *value = (int)p.memPitch; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrClockRate: *value = chip_of(card_of(device)).clock_khz; break;
    case cudaDevAttrTextureAlignment: *value = (int)p.textureAlignment; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrCanMapHostMemory: *value = p.canMapHostMemory; break;
    case cudaDevAttrConcurrentKernels: *value = p.concurrentKernels; break;
    case cudaDevAttrPciBusId: *value = p.pciBusID; break;
    case cudaDevAttrMemoryClockRate: *value = chip_of(card_of(device)).memory_clock_khz; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrAsyncEngineCount: *value = p.asyncEngineCount; break;
    case cudaDevAttrUnifiedAddressing: *value = p.unifiedAddressing; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrStreamPrioritiesSupported: *value = 1; break;
    case cudaDevAttrGlobalL1CacheSupported: *value = p.globalL1CacheSupported; break;
    case cudaDevAttrLocalL1CacheSupported: *value = p.localL1CacheSupported; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
    case cudaDevAttrManagedMemory: *value = p.managedMemory; break;
    case cudaDevAttrCooperativeLaunch: *value = p.cooperativeLaunch; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: *value = 1; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = (int)p.reservedSharedMemPerBlock; break;
    case cudaDevAttrMemoryPoolsSupported: *value = p.memoryPoolsSupported; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

// PyTorch's wheels are built for 13.x and ask only that this is not older than what they were built with.
ENTRY cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return cudaSuccess;
}

ENTRY cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

ENTRY cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
  NEED(machine());
  if (!card_of(device)) return fail(cudaErrorInvalidDevice);
  snprintf(text, (size_t)length, "0000:%02x:00.0", card_index(device) + 1);
  return cudaSuccess;
}

ENTRY cudaError_t cudaDeviceGetByPCIBusId(int *device, const char *text) {
  char own[16];
  for (int i = 0; i < visible_cards(); i++) {
    cudaDeviceGetPCIBusId(own, sizeof own, i);
    if (strcasecmp(own, text)) continue;
    *device = i;
    return cudaSuccess;
  }
  return fail(cudaErrorInvalidValue);
}

// Several cards of one machine reach each other through the host: nothing that memory depends on.
ENTRY cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 0;
  NEED(machine());
  return card_of(device) && card_of(peer) ? cudaSuccess : fail(cudaErrorInvalidDevice);
}

ENTRY cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return fail(cudaErrorPeerAccessUnsupported); }

ENTRY cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

ENTRY cudaError_t cudaDeviceGetLimit(size_t *value, enum cudaLimit limit) {
  *value = limit == cudaLimitStackSize ? 1024 : limit == cudaLimitMallocHeapSize ? (size_t)8 << 20 : 0;
  return cudaSuccess;
}

ENTRY cudaError_t cudaGetDeviceFlags(unsigned *flags) {
  *flags = 0;
  return cudaSuccess;
}

ENTRY cudaError_t cudaDeviceSynchronize(void) { return fail(current_context()); }

// Sharing memory with another process by a handle would need its bytes to be real.
ENTRY cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *address) { return fail(cudaErrorNotSupported); }
ENTRY cudaError_t cudaIpcOpenMemHandle(void **address, cudaIpcMemHandle_t handle, unsigned flags) {
  return fail(cudaErrorNotSupported);
}
ENTRY cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, cudaEvent_t event) {
  return fail(cudaErrorNotSupported);
}
ENTRY cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t handle) {
  return fail(cudaErrorNotSupported);
}
