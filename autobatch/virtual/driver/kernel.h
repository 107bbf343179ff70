// What is assumed of kernels, which nobody looks into.
#ifndef AUTOBATCH_KERNEL_H
#define AUTOBATCH_KERNEL_H

#include <driver_types.h>

#define REGISTERS_PER_THREAD 32
#define BLOCKS_PER_MULTIPROCESSOR 2

// The error with which a card would refuse this grid and block.
cudaError_t check_launch(unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                         unsigned block_z);
// What a kernel that does not run leaves behind: zeros at the addresses among its arguments.
void leave_zeros(void **arguments);

#endif
