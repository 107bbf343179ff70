// Host memory that CUDA knows of.
#ifndef AUTOBATCH_HOST_H
#define AUTOBATCH_HOST_H

#include <stddef.h>

enum host_kind { HOST_UNKNOWN, HOST_PINNED, HOST_MANAGED, HOST_REGISTERED };

// New host memory of this kind, page aligned; NULL if there is none.
void *host_take(size_t bytes, enum host_kind kind);
// Notes memory that the program has itself; false if it is known already.
int host_remember(void *address, size_t bytes, enum host_kind kind);
// Ends what begins at `address`, and frees it unless the program has it itself; false if there is none of this kind.
int host_release(void *address, enum host_kind kind);
// What the memory at `address`, also in the middle of it, is.
enum host_kind host_kind(const void *address);

#endif
