// CUDA runtime: registration and launch of kernels. None runs; a launch that a real card would refuse is refused.
#include "kernel.h"

#include <string.h>

#include "card.h"

// Fat binaries register themselves when a library is loaded, before anybody asks for a device.
ENTRY void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[4];
  return handle;
}
ENTRY void __cudaRegisterFatBinaryEnd(void **handle) {}
ENTRY void __cudaUnregisterFatBinary(void **handle) {}
ENTRY void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int threads,
                                  uint3 *tid, uint3 *bid, dim3 *block, dim3 *grid, int *warp) {}
ENTRY void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size,
                             int constant, int global) {}
ENTRY char __cudaInitModule(void **handle) { return 1; }

// `kernel<<<grid, block, shared, stream>>>` pushes its configuration and the kernel's stub pops it again.
struct configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
#define MAX_DEPTH 64
static __thread struct configuration pushed[MAX_DEPTH];
static __thread unsigned depth;

ENTRY unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  if (depth == MAX_DEPTH) return 1;  // the caller then does not launch
  pushed[depth++] = (struct configuration){grid, block, shared, stream};
  return 0;
}

ENTRY cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  if (!depth) return fail(cudaErrorMissingConfiguration);
  struct configuration *top = &pushed[--depth];
  *grid = top->grid;
  *block = top->block;
  *shared = top->shared;
  *(cudaStream_t *)stream = top->stream;
  return cudaSuccess;
}

// A grid or block of no or too many threads is what large batches really fail with ("invalid configuration
// argument"), and it is no lack of memory.
cudaError_t check_launch(unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                         unsigned block_z) {
  cudaError_t error = current_context();
  if (error != cudaSuccess) return error;
  unsigned long long threads = (unsigned long long)block_x * block_y * block_z;
  int fits = grid_x && grid_y && grid_z && threads && grid_x <= 2147483647u && grid_y <= 65535 && grid_z <= 65535 &&
             threads <= 1024 && block_z <= 64;
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

static cudaError_t launch(dim3 grid, dim3 block) {
  return fail(check_launch(grid.x, grid.y, grid.z, block.x, block.y, block.z));
}

ENTRY cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                   cudaStream_t stream) {
  return launch(grid, block);
}

ENTRY cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                     cudaStream_t stream) {
  return launch(grid, block);
}

ENTRY cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                              size_t shared, cudaStream_t stream) {
  return launch(grid, block);
}

ENTRY cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *kernel, void **arguments) {
  return launch(configuration->gridDim, configuration->blockDim);
}

ENTRY cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)(void *)function;
  return cudaSuccess;
}

ENTRY cudaError_t cudaGetKernel(cudaKernel_t *kernel, const void *function) { return __cudaGetKernel(kernel, function); }

// Every kernel is taken to use 32 registers a thread and no shared memory of its own.
ENTRY cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *about, const void *kernel) {
  NEED(current_context());
  const struct state_card *card = card_of(current_device());
  memset(about, 0, sizeof *about);
  about->maxThreadsPerBlock = 1024;
  about->numRegs = REGISTERS_PER_THREAD;
  about->ptxVersion = about->binaryVersion = card->capability_major * 10 + card->capability_minor;
  about->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}

ENTRY cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel,
                                                                         int block_threads, size_t shared,
                                                                         unsigned flags) {
  *blocks = BLOCKS_PER_MULTIPROCESSOR;
  return fail(current_context());
}

ENTRY cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int block_threads,
                                                                size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, block_threads, shared, 0);
}

ENTRY cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, const void *kernel,
                                                 const cudaLaunchConfig_t *configuration) {
  *clusters = 1;
  return fail(current_context());
}

// ---- libraries of kernels, loaded at run time

ENTRY cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *jit_options,
                                      void **jit_values, unsigned jit_count, enum cudaLibraryOption *options,
                                      void **values, unsigned count) {
  NEED(current_context());
  *library = fresh_handle();
  return cudaSuccess;
}

ENTRY cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
  *kernel = fresh_handle();
  return cudaSuccess;
}
