// CUDA runtime: device memory, host memory, pools, copies.
#include <string.h>

#include "card.h"
#include "host.h"
#include "memory.h"
#include "pool.h"

ENTRY cudaError_t cudaMalloc(void **address, size_t bytes) {
  if (!bytes) {
    *address = NULL;
    return fail(current_context());
  }
  return fail(memory_take(current_device(), bytes, address));
}

ENTRY cudaError_t cudaFree(void *address) {
  NEED(current_context());  // freeing nothing is how many programs make it
  if (!address) return cudaSuccess;
  if (host_release(address, HOST_MANAGED)) return cudaSuccess;
  return fail(pool_owns(address) ? pool_give(address) : memory_give(address));
}

// A row's pitch is a multiple of 512 bytes on all cards known.
ENTRY cudaError_t cudaMallocPitch(void **address, size_t *pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return cudaMalloc(address, *pitch * height);
}

ENTRY cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  NEED(current_context());
  int device = current_device();
  size_t used = state_used(card_state(), card_index(device));
  *total_bytes = card_of(device)->total_bytes;
  *free_bytes = used < *total_bytes ? *total_bytes - used : 0;
  return cudaSuccess;
}

// ---- host memory: real, because programs read and write it

ENTRY cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
  NEED(current_context());
  *address = host_take(bytes, HOST_PINNED);
  return *address ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

ENTRY cudaError_t cudaMallocHost(void **address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }

ENTRY cudaError_t cudaFreeHost(void *address) {
  return !address || host_release(address, HOST_PINNED) ? cudaSuccess : fail(cudaErrorInvalidValue);
}

// Managed memory may exceed the card and moves by page faults: it is host memory here and costs the card nothing.
ENTRY cudaError_t cudaMallocManaged(void **address, size_t bytes, unsigned flags) {
  NEED(current_context());
  *address = host_take(bytes, HOST_MANAGED);
  return *address ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

ENTRY cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
  NEED(current_context());
  return host_remember(address, bytes, HOST_REGISTERED) ? cudaSuccess : fail(cudaErrorHostMemoryAlreadyRegistered);
}

ENTRY cudaError_t cudaHostUnregister(void *address) {
  return host_release(address, HOST_REGISTERED) ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered);
}

ENTRY cudaError_t cudaHostGetDevicePointer(void **device_address, void *address, unsigned flags) {
  *device_address = address;
  return cudaSuccess;
}

ENTRY cudaError_t cudaHostGetFlags(unsigned *flags, void *address) {
  *flags = cudaHostAllocMapped;
  return host_kind(address) == HOST_UNKNOWN ? fail(cudaErrorInvalidValue) : cudaSuccess;
}

// PyTorch asks this to tell on which device a pointer is and whether host memory is pinned.
ENTRY cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *about, const void *address) {
  NEED(machine());
  int device = memory_device(address), kind = host_kind(address);
  memset(about, 0, sizeof *about);
  about->device = device >= 0 ? device : kind == HOST_UNKNOWN ? -2 : current_device();
  about->type = device >= 0             ? cudaMemoryTypeDevice
                : kind == HOST_MANAGED  ? cudaMemoryTypeManaged
                : kind == HOST_UNKNOWN  ? cudaMemoryTypeUnregistered
                                        : cudaMemoryTypeHost;
  if (device >= 0 || kind != HOST_UNKNOWN) about->devicePointer = (void *)address;
  if (device < 0) about->hostPointer = (void *)address;
  return cudaSuccess;
}

// ---- copies, all of them done when they return

ENTRY cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  NEED(current_context());
  memory_copy(to, from, bytes);
  return cudaSuccess;
}

ENTRY cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                                  cudaStream_t stream) {
  return cudaMemcpy(to, from, bytes, kind);
}

ENTRY cudaError_t cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}

ENTRY cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                      cudaStream_t stream) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}

ENTRY cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                               size_t height, enum cudaMemcpyKind kind) {
  NEED(current_context());
  memory_copy_2d(to, to_pitch, from, from_pitch, width, height);
  return cudaSuccess;
}

ENTRY cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                    size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}

ENTRY cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  NEED(current_context());
  memory_set(to, value, bytes);
  return cudaSuccess;
}

ENTRY cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset(to, value, bytes);
}

// ---- __device__ variables: no kernel reads them, so all share one place

ENTRY cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  NEED(current_context());
  *address = memory_symbol();
  return *address ? cudaSuccess : fail(cudaErrorOperatingSystem);
}

ENTRY cudaError_t cudaGetSymbolSize(size_t *bytes, const void *symbol) {
  *bytes = GRANULE;
  return cudaSuccess;
}

ENTRY cudaError_t cudaMemcpyFromSymbol(void *to, const void *symbol, size_t bytes, size_t offset,
                                       enum cudaMemcpyKind kind) {
  NEED(current_context());
  memory_set(to, 0, bytes);
  return cudaSuccess;
}

ENTRY cudaError_t cudaMemcpyFromSymbolAsync(void *to, const void *symbol, size_t bytes, size_t offset,
                                            enum cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpyFromSymbol(to, symbol, bytes, offset, kind);
}
