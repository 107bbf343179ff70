// CUDA runtime: registration and launch of kernels. None runs; a launch that a real card would refuse is refused.
#define _GNU_SOURCE
#include "kernel.h"

#include <string.h>

#include "binary.h"
#include "card.h"
#include "memory.h"

// Fat binaries register themselves when a library is loaded, before anybody asks for a device.
ENTRY void **__cudaRegisterFatBinary(void *binary) { return binary_register(binary); }
ENTRY void __cudaRegisterFatBinaryEnd(void **handle) {}
ENTRY void __cudaUnregisterFatBinary(void **handle) {}
ENTRY void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int threads,
                                  uint3 *tid, uint3 *bid, dim3 *block, dim3 *grid, int *warp) {
  binary_register_kernel(handle, host);
}
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

// ---- what kernels leave behind
//
// Small copies are real, and memory is used again: the flag that GradScaler fills with zeros would read as whatever
// was copied there before, and every optimizer step be skipped. So an address that a kernel is given reads as zeros
// afterwards. Neither the number of arguments nor their sizes are known here. But the compiler puts them on the
// caller's stack, which can be read to its end, and what looks like an address of ours there is one. One too many
// costs a value that was real so far, never more.
#define MAX_ARGUMENTS 64
#define MAX_ARGUMENT_BYTES 4096

// The end of this thread's stack, 0 if it is not known.
static uintptr_t stack_end(void) {
  static __thread uintptr_t end = 1;
  if (end != 1) return end;
  pthread_attr_t about;
  void *low;
  size_t size;
  end = 0;
  if (pthread_getattr_np(pthread_self(), &about)) return end;
  if (!pthread_attr_getstack(&about, &low, &size)) end = (uintptr_t)low + size;
  pthread_attr_destroy(&about);
  return end;
}

void leave_zeros(void **arguments) {
  uintptr_t low = (uintptr_t)&arguments, end = stack_end(), places[MAX_ARGUMENTS];
  if (!arguments || low > end) return;
  int count = 0;
  for (void **next = arguments; count < MAX_ARGUMENTS; next++) {
    if ((uintptr_t)next < low || (uintptr_t)next >= end - sizeof *next) break;
    uintptr_t place = (uintptr_t)*next;
    if (place < low || place >= end) break;
    places[count++] = place;
  }
  for (int i = 0; i < count; i++) {
    uintptr_t stop = places[i] + MAX_ARGUMENT_BYTES;  // or where another argument begins
    for (int j = 0; j < count; j++)
      if (places[j] > places[i] && places[j] < stop) stop = places[j];
    if (stop > end) stop = end;
    for (uintptr_t word = (places[i] + 7) & ~(uintptr_t)7; word + 8 <= stop; word += 8) memory_wipe(*(void **)word);
  }
}

static cudaError_t launch(dim3 grid, dim3 block, void **arguments) {
  cudaError_t error = check_launch(grid.x, grid.y, grid.z, block.x, block.y, block.z);
  if (error == cudaSuccess) leave_zeros(arguments);
  return fail(error);
}

ENTRY cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                   cudaStream_t stream) {
  return launch(grid, block, arguments);
}

ENTRY cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                     cudaStream_t stream) {
  return launch(grid, block, arguments);
}

ENTRY cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                              size_t shared, cudaStream_t stream) {
  return launch(grid, block, arguments);
}

ENTRY cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *kernel, void **arguments) {
  return launch(configuration->gridDim, configuration->blockDim, arguments);
}

ENTRY cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)(void *)function;
  return cudaSuccess;
}

ENTRY cudaError_t cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return __cudaGetKernel(kernel, function);
}

// Every kernel is taken to use 32 registers a thread and no shared memory of its own.
ENTRY cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *about, const void *kernel) {
  NEED(current_context());
  const struct state_card *card = card_of(current_device());
  memset(about, 0, sizeof *about);
  about->maxThreadsPerBlock = 1024;
  about->numRegs = REGISTERS_PER_THREAD;
  int capability = card->capability_major * 10 + card->capability_minor;
  about->ptxVersion = about->binaryVersion = binary_architecture(kernel, capability);
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
