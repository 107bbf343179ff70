// Stream-ordered memory (cudaMallocAsync): one pool per device.
#ifndef AUTOBATCH_POOL_H
#define AUTOBATCH_POOL_H

#include <driver_types.h>

// Whether `address` came from a pool.
int pool_owns(const void *address);
cudaError_t pool_give(void *address);

#endif
