// The cards this process sees, its contexts on them, and what every entry point needs first.
#ifndef AUTOBATCH_CARD_H
#define AUTOBATCH_CARD_H

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "state.h"

// The library hides everything but the entry points.
#define ENTRY __attribute__((visibility("default")))

// How an entry point of the runtime ends: the error is kept for cudaGetLastError, as the real one does.
cudaError_t fail(cudaError_t error);
// Leaves an entry point with the error of `call`, if it has one.
#define NEED(call)                            \
  do {                                        \
    cudaError_t need_ = (call);               \
    if (need_ != cudaSuccess) return fail(need_); \
  } while (0)

// Success once the machine is there and has a visible card; never makes a context.
cudaError_t machine(void);
int visible_cards(void);
// The card behind device ordinal `device`, or NULL.
const struct state_card *card_of(int device);
uint32_t card_index(int device);
struct state *card_state(void);

int current_device(void);
cudaError_t select_device(int device);

// Makes this process's context on `device` if there is none, at the price of the card's `outside_bytes`.
cudaError_t context(int device);
// The same for the current device.
cudaError_t current_context(void);
// Whether this is the child of a process that had a context: it has none, and can have none. Destructors run here
// too, on what was the parent's, and may not fail: what they call succeeds.
int forked(void);
cudaError_t context_or_fork(void);
int has_context(int device);
// Bytes for this process on `device`; false if they do not fit.
int charge(int device, uint64_t bytes);
void refund(int device, uint64_t bytes);

// Held while the process's own tables change, and across a fork so that the child finds them whole.
void tables_lock(void);
void tables_unlock(void);
// A handle that is nothing but different from all others.
void *fresh_handle(void);

struct limits {
  int shared_per_block, shared_per_multiprocessor, threads_per_multiprocessor, blocks_per_multiprocessor;
};
struct limits limits_of(const struct state_card *card);
// What differs between cards of one capability too.
struct chip {
  int l2_mib, bus_bits, clock_khz, memory_clock_khz;
};
struct chip chip_of(const struct state_card *card);
void properties_of(int device, struct cudaDeviceProp *properties);

#endif
