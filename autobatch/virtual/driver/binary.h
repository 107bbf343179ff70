// Which code of a kernel a card would load.
#ifndef AUTOBATCH_BINARY_H
#define AUTOBATCH_BINARY_H

// Takes in a fat binary as the compiler's start-up code hands it over. The handle that goes with its kernels.
void **binary_register(const void *fat_binary);
// Says that the kernel behind the stub `host` is in the binary with this handle.
void binary_register_kernel(void **handle, const void *host);
// The architecture of the code that a card of `capability` (86 for 8.6) would load for this kernel.
int binary_architecture(const void *host, int capability);

#endif
