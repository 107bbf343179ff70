// CUDA runtime: stream-ordered memory.
//
// A pool grows in blocks of 32 MiB. With the release threshold that PyTorch sets (none) it keeps what it has until it
// is trimmed; how the real pool fragments inside is not modelled.
#include "pool.h"

#include <stdint.h>

#include "card.h"
#include "memory.h"

#define POOL_BLOCK ((uint64_t)32 << 20)

static struct pool {
  uint64_t used, used_high, reserved, reserved_high, threshold;
} pools[MAX_CARDS];

static uint64_t blocks(uint64_t bytes) { return (bytes + POOL_BLOCK - 1) / POOL_BLOCK * POOL_BLOCK; }

static int device_of(cudaMemPool_t handle) {
  struct pool *pool = (struct pool *)(void *)handle;
  return pool >= pools && pool < pools + MAX_CARDS ? (int)(pool - pools) : -1;
}

// With the tables locked, as everything here that changes a pool.
static void trim(int device, uint64_t keep) {
  struct pool *pool = &pools[device];
  uint64_t wanted = blocks(pool->used) > keep ? blocks(pool->used) : blocks(keep);
  if (wanted >= pool->reserved) return;
  refund(device, pool->reserved - wanted);
  pool->reserved = wanted;
}

static int grow(int device, uint64_t bytes) {
  struct pool *pool = &pools[device];
  uint64_t wanted = blocks(pool->used + bytes);
  if (wanted > pool->reserved) {
    if (!charge(device, wanted - pool->reserved)) return 0;
    pool->reserved = wanted;
  }
  pool->used += bytes;
  if (pool->used > pool->used_high) pool->used_high = pool->used;
  if (pool->reserved > pool->reserved_high) pool->reserved_high = pool->reserved;
  return 1;
}

// The note of a pool's allocation is its bytes, which are even; that of a mapped handle is odd.
int pool_owns(const void *address) {
  uint64_t note = memory_note(address);
  return note && !(note & 1);
}

static cudaError_t take(int device, void **address, size_t bytes) {
  NEED(context(device));
  if (!bytes) {
    *address = NULL;
    return cudaSuccess;
  }
  uint64_t rounded = (bytes + 511) / 512 * 512;
  tables_lock();
  int fits = grow(device, rounded);
  tables_unlock();
  if (!fits) return fail(cudaErrorMemoryAllocation);
  *address = memory_place(device, rounded);
  if (*address) {
    memory_set_note(*address, rounded);
    return cudaSuccess;
  }
  tables_lock();
  pools[device].used -= rounded;
  tables_unlock();
  return fail(cudaErrorOperatingSystem);
}

cudaError_t pool_give(void *address) {
  int device = memory_device(address);
  uint64_t bytes = memory_note(address);
  if (device < 0 || !pool_owns(address)) return cudaErrorInvalidValue;
  memory_vacate(address);
  tables_lock();
  pools[device].used -= bytes;
  if (pools[device].reserved > pools[device].threshold) trim(device, pools[device].threshold);
  tables_unlock();
  return cudaSuccess;
}

ENTRY cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) {
  return take(current_device(), address, bytes);
}

ENTRY cudaError_t cudaMallocFromPoolAsync(void **address, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
  int device = device_of(pool);
  return device < 0 ? fail(cudaErrorInvalidValue) : take(device, address, bytes);
}

ENTRY cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
  NEED(current_context());
  return !address ? cudaSuccess : fail(pool_owns(address) ? pool_give(address) : memory_give(address));
}

ENTRY cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
  NEED(machine());
  if (!card_of(device)) return fail(cudaErrorInvalidDevice);
  *pool = (cudaMemPool_t)(void *)&pools[device];
  return cudaSuccess;
}

ENTRY cudaError_t cudaDeviceGetMemPool(cudaMemPool_t *pool, int device) {
  return cudaDeviceGetDefaultMemPool(pool, device);
}

static uint64_t *attribute_of(cudaMemPool_t handle, enum cudaMemPoolAttr attribute) {
  int device = device_of(handle);
  if (device < 0) return NULL;
  switch ((int)attribute) {
    case cudaMemPoolAttrReleaseThreshold: return &pools[device].threshold;
    case cudaMemPoolAttrReservedMemCurrent: return &pools[device].reserved;
    case cudaMemPoolAttrReservedMemHigh: return &pools[device].reserved_high;
    case cudaMemPoolAttrUsedMemCurrent: return &pools[device].used;
    case cudaMemPoolAttrUsedMemHigh: return &pools[device].used_high;
    default: return NULL;
  }
}

// The reuse switches are ints and always on; everything else is 64 bits wide.
ENTRY cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  uint64_t *field = attribute_of(pool, attribute);
  if (field) *(uint64_t *)value = *field;
  else if (attribute <= cudaMemPoolReuseAllowInternalDependencies) *(int *)value = 1;
  else return fail(cudaErrorInvalidValue);
  return cudaSuccess;
}

// Only high-water marks can be set to something, to zero, and the threshold.
ENTRY cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  int device = device_of(pool);
  if (device < 0) return fail(cudaErrorInvalidValue);
  tables_lock();
  switch ((int)attribute) {
    case cudaMemPoolAttrReleaseThreshold: pools[device].threshold = *(uint64_t *)value; break;
    case cudaMemPoolAttrReservedMemHigh: pools[device].reserved_high = pools[device].reserved; break;
    case cudaMemPoolAttrUsedMemHigh: pools[device].used_high = pools[device].used; break;
    default: break;
  }
  tables_unlock();
  return cudaSuccess;
}

ENTRY cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep) {
  int device = device_of(pool);
  if (device < 0) return fail(cudaErrorInvalidValue);
  tables_lock();
  trim(device, keep);
  tables_unlock();
  return cudaSuccess;
}
