// The address range that stands for all device memory of this process.
//
// It is reserved without backing, in granules of 2 MiB, the unit a driver hands memory out in. Only small copies are
// real: the granules they touch are backed, everything else reads as zeros.
#ifndef AUTOBATCH_MEMORY_H
#define AUTOBATCH_MEMORY_H

#include <driver_types.h>
#include <stddef.h>
#include <stdint.h>

#define GRANULE ((size_t)2 << 20)
// The largest copy that is real: a parameter's checksum, a scalar, DDP's shape check.
#define SMALL_COPY ((size_t)1 << 20)

// Reserves the range, once. Called with the tables locked.
cudaError_t memory_reserve(void);
// Whether `address` lies in the range, and if so on which device memory is there: -1 for none.
int memory_ours(const void *address);
int memory_device(const void *address);

// A run of addresses for `bytes` on `device`, without any account kept; NULL if the range has no such run left.
void *memory_place(int device, size_t bytes);
// An address range alone, no memory in it yet (cuMemAddressReserve).
void *memory_place_empty(size_t bytes);
// Says that [address, address + bytes) of an empty run now has memory of `device`, or, with -1, none again.
void memory_assign(void *address, size_t bytes, int device);
// Gives back the run that begins at `address`; its size in bytes, 0 if there is none.
size_t memory_vacate(void *address);
// Where the run that holds `address` begins, and its size; NULL if there is none.
void *memory_run(const void *address, size_t *bytes);

// A number that the owner of a run (or of a mapping inside one) keeps at its first granule; 0 until it is set.
uint64_t memory_note(const void *address);
void memory_set_note(void *address, uint64_t note);

// cudaMalloc and cudaFree: a place and its account, in whole granules.
cudaError_t memory_take(int device, size_t bytes, void **address);
cudaError_t memory_give(void *address);

void memory_copy(void *to, const void *from, size_t bytes);
void memory_copy_2d(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height);
void memory_set(void *to, int value, size_t bytes);
// A kernel was given `address`: what it leaves there reads as zeros, to the end of the 512 bytes that PyTorch's
// allocator hands out at least.
void memory_wipe(const void *address);
// A place for a __device__ variable, which has memory of its own in every process.
void *memory_symbol(void);

#endif
