// CUDA driver: memory, among it the virtual-memory calls that expandable segments are made of.
#include <stdlib.h>
#include <string.h>

#include "card.h"
#include "driver.h"
#include "memory.h"

ENTRY CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
  return (CUresult)cudaMalloc((void **)address, bytes);
}
ENTRY CUresult cuMemFree_v2(CUdeviceptr address) { return (CUresult)cudaFree((void *)address); }
ENTRY CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  return (CUresult)cudaMemGetInfo(free_bytes, total);
}
ENTRY CUresult cuMemAllocHost_v2(void **address, size_t bytes) { return (CUresult)cudaMallocHost(address, bytes); }
ENTRY CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
  return (CUresult)cudaHostAlloc(address, bytes, flags);
}
ENTRY CUresult cuMemFreeHost(void *address) { return (CUresult)cudaFreeHost(address); }
ENTRY CUresult cuMemAllocManaged(CUdeviceptr *address, size_t bytes, unsigned flags) {
  return (CUresult)cudaMallocManaged((void **)address, bytes, flags);
}
ENTRY CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
  return (CUresult)cudaMallocAsync((void **)address, bytes, stream);
}
ENTRY CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  return (CUresult)cudaFreeAsync((void *)address, stream);
}
ENTRY CUresult cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
  return (CUresult)cudaHostRegister(address, bytes, flags);
}
ENTRY CUresult cuMemHostUnregister(void *address) { return (CUresult)cudaHostUnregister(address); }
ENTRY CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device_address, void *address, unsigned flags) {
  *device_address = (CUdeviceptr)address;
  return CUDA_SUCCESS;
}

ENTRY CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *bytes, CUdeviceptr address) {
  size_t size;
  void *first = memory_run((void *)address, &size);
  if (!first) return CUDA_ERROR_NOT_FOUND;
  if (start) *start = (CUdeviceptr)first;
  if (bytes) *bytes = size;
  return CUDA_SUCCESS;
}

static CUresult copy(void *to, const void *from, size_t bytes) {
  return (CUresult)cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}
ENTRY CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) { return copy(to, (void *)from, bytes); }
ENTRY CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) { return copy((void *)to, from, bytes); }
ENTRY CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy((void *)to, (void *)from, bytes);
}
ENTRY CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy(to, (void *)from, bytes);
}
ENTRY CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
  return copy((void *)to, from, bytes);
}
ENTRY CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy((void *)to, (void *)from, bytes);
}
ENTRY CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
  return (CUresult)cudaMemset((void *)to, value, bytes);
}
ENTRY CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
  return cuMemsetD8_v2(to, value, bytes);
}

static CUresult set_words(CUdeviceptr to, unsigned value, size_t count) {
  TRY(current_context());
  if (!value || count * sizeof value > SMALL_COPY) memory_set((void *)to, 0, count * sizeof value);
  else
    for (size_t i = 0; i < count; i++) memory_copy((unsigned *)to + i, &value, sizeof value);
  return CUDA_SUCCESS;
}
ENTRY CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) { return set_words(to, value, count); }
ENTRY CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  return set_words(to, value, count);
}

// Only what PyTorch and Triton ask for; anything else would need to know the allocation better than we do.
ENTRY CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  struct cudaPointerAttributes about;
  TRY(cudaPointerGetAttributes(&about, (void *)address));
  if (about.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  switch ((int)attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: return cuDevicePrimaryCtxRetain(value, about.device);
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned *)value = about.type == cudaMemoryTypeHost ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(CUdeviceptr *)value = address; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)value = address; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(int *)value = about.type == cudaMemoryTypeManaged; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = about.device; return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: return cuMemGetAddressRange_v2(value, NULL, address);
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: return cuMemGetAddressRange_v2(NULL, value, address);
    case CU_POINTER_ATTRIBUTE_MAPPED: *(int *)value = 1; return CUDA_SUCCESS;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
}

// ---- virtual memory: physical memory has a handle, addresses are reserved, and the one is mapped into the other

// Memory lives until its handle is released and its last mapping is gone.
struct physical {
  int device;  // -1: host memory, which the card does not pay for
  size_t bytes;
  unsigned references;
};

static struct physical *physical_of(CUmemGenericAllocationHandle handle) {
  return (struct physical *)(uintptr_t)handle;
}

static void drop(struct physical *memory) {
  if (__atomic_sub_fetch(&memory->references, 1, __ATOMIC_ACQ_REL)) return;
  if (memory->device >= 0) refund(memory->device, memory->bytes);
  free(memory);
}

ENTRY CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *properties,
                                             CUmemAllocationGranularity_flags option) {
  *granularity = GRANULE;
  return CUDA_SUCCESS;
}

ENTRY CUresult cuMemAddressReserve(CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr wanted,
                                   unsigned long long flags) {
  TRY(current_context());
  if (!bytes || bytes % GRANULE) return CUDA_ERROR_INVALID_VALUE;
  *address = (CUdeviceptr)memory_place_empty(bytes);
  return *address ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM;
}

ENTRY CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
  return memory_vacate((void *)address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Memory that could be exported to other hosts (fabric handles) is not to be had, as on most machines: PyTorch then
// asks again without.
ENTRY CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *properties,
                           unsigned long long flags) {
  if (!bytes || bytes % GRANULE) return CUDA_ERROR_INVALID_VALUE;
  if (properties->requestedHandleTypes & CU_MEM_HANDLE_TYPE_FABRIC) return CUDA_ERROR_NOT_SUPPORTED;
  int device = properties->location.type == CU_MEM_LOCATION_TYPE_DEVICE ? properties->location.id : -1;
  if (device >= 0) TRY(context(device));
  struct physical *memory = malloc(sizeof *memory);
  if (!memory || (device >= 0 && !charge(device, bytes))) {
    free(memory);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *memory = (struct physical){device, bytes, 1};
  *handle = (CUmemGenericAllocationHandle)(uintptr_t)memory;
  return CUDA_SUCCESS;
}

ENTRY CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  if (!handle) return CUDA_ERROR_INVALID_VALUE;
  drop(physical_of(handle));
  return CUDA_SUCCESS;
}

// The note of a mapping is its handle plus one, which makes it odd: pools keep even ones.
ENTRY CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                        unsigned long long flags) {
  struct physical *memory = physical_of(handle);
  if (!memory || !memory_ours((void *)address) || bytes > memory->bytes) return CUDA_ERROR_INVALID_VALUE;
  if (memory_note((void *)address)) return CUDA_ERROR_ALREADY_MAPPED;
  memory_assign((void *)address, bytes, memory->device < 0 ? current_device() : memory->device);
  memory_set_note((void *)address, (uintptr_t)memory | 1);
  __atomic_add_fetch(&memory->references, 1, __ATOMIC_ACQ_REL);
  return CUDA_SUCCESS;
}

// May cover several mappings at once.
ENTRY CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
  if (!memory_ours((void *)address)) return CUDA_ERROR_INVALID_VALUE;
  for (size_t offset = 0; offset < bytes; offset += GRANULE) {
    uint64_t note = memory_note((void *)(address + offset));
    if (!(note & 1)) continue;
    memory_set_note((void *)(address + offset), 0);
    drop((struct physical *)(uintptr_t)(note & ~1ull));
  }
  memory_assign((void *)address, bytes, -1);
  return CUDA_SUCCESS;
}

ENTRY CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *address) {
  uint64_t note = memory_note(address);
  if (!(note & 1)) return CUDA_ERROR_INVALID_VALUE;
  struct physical *memory = (struct physical *)(uintptr_t)(note & ~1ull);
  __atomic_add_fetch(&memory->references, 1, __ATOMIC_ACQ_REL);
  *handle = (CUmemGenericAllocationHandle)(uintptr_t)memory;
  return CUDA_SUCCESS;
}

// Another process could map the memory but not see what is in it.
ENTRY CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle handle,
                                            CUmemAllocationHandleType type, unsigned long long flags) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
ENTRY CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *shareable,
                                              CUmemAllocationHandleType type) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

// Memory that several cards write at once needs a switch between them.
ENTRY CUresult cuMulticastCreate(CUmemGenericAllocationHandle *handle, const CUmulticastObjectProp *properties) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
