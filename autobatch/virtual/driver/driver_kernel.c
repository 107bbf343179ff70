// CUDA driver: modules, kernels and their launches, the way Triton and run-time compiled kernels take.
#include <string.h>

#include "card.h"
#include "driver.h"
#include "kernel.h"
#include "memory.h"

// Modules, libraries and kernels are handles that are never looked into.

ENTRY CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  TRY(current_context());
  *module = fresh_handle();
  return CUDA_SUCCESS;
}

ENTRY CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options,
                                  void **values) {
  return cuModuleLoadData(module, image);
}

ENTRY CUresult cuModuleLoad(CUmodule *module, const char *file) { return cuModuleLoadData(module, NULL); }
ENTRY CUresult cuModuleLoadFatBinary(CUmodule *module, const void *image) { return cuModuleLoadData(module, image); }

ENTRY CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = fresh_handle();
  return CUDA_SUCCESS;
}

ENTRY CUresult cuModuleGetGlobal_v2(CUdeviceptr *address, size_t *bytes, CUmodule module, const char *name) {
  void *place = memory_symbol();
  if (address) *address = (CUdeviceptr)place;
  if (bytes) *bytes = GRANULE;
  return place ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM;
}

ENTRY CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jit_options, void **jit_values,
                                 unsigned jit_count, CUlibraryOption *options, void **values, unsigned count) {
  TRY(current_context());
  *library = fresh_handle();
  return CUDA_SUCCESS;
}

ENTRY CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  *kernel = fresh_handle();
  return CUDA_SUCCESS;
}

ENTRY CUresult cuLibraryGetModule(CUmodule *module, CUlibrary library) {
  *module = fresh_handle();
  return CUDA_SUCCESS;
}

ENTRY CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
  *function = (CUfunction)(void *)kernel;
  return CUDA_SUCCESS;
}

ENTRY CUresult cuFuncGetModule(CUmodule *module, CUfunction function) {
  *module = fresh_handle();
  return CUDA_SUCCESS;
}

ENTRY CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? REGISTERS_PER_THREAD
                                                                : 0;
  return CUDA_SUCCESS;
}

ENTRY CUresult cuKernelGetAttribute(int *value, CUfunction_attribute attribute, CUkernel kernel, CUdevice device) {
  return cuFuncGetAttribute(value, attribute, NULL);
}

ENTRY CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int threads,
                                                           size_t shared) {
  *blocks = BLOCKS_PER_MULTIPROCESSOR;
  return CUDA_SUCCESS;
}

ENTRY CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, CUfunction function, int threads,
                                                                    size_t shared, unsigned flags) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

ENTRY CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *configuration) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

ENTRY CUresult cuOccupancyMaxPotentialClusterSize(int *size, CUfunction function, const CUlaunchConfig *configuration) {
  *size = 8;  // the portable limit
  return CUDA_SUCCESS;
}

static CUresult launch(unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, void **arguments) {
  cudaError_t error = check_launch(grid_x, grid_y, grid_z, block_x, block_y, block_z);
  if (error == cudaSuccess) leave_zeros(arguments);
  return (CUresult)error;
}

ENTRY CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                              unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments,
                              void **extra) {
  return launch(grid_x, grid_y, grid_z, block_x, block_y, block_z, arguments);
}

ENTRY CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                         unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                         CUstream stream, void **arguments) {
  return launch(grid_x, grid_y, grid_z, block_x, block_y, block_z, arguments);
}

ENTRY CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
  return launch(c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, arguments);
}

ENTRY CUresult cuLinkCreate_v2(unsigned count, CUjit_option *options, void **values, CUlinkState *state) {
  *state = fresh_handle();
  return CUDA_SUCCESS;
}

ENTRY CUresult cuLinkComplete(CUlinkState state, void **image, size_t *bytes) {
  static char nothing[16];
  *image = nothing;
  *bytes = sizeof nothing;
  return CUDA_SUCCESS;
}

// cuDNN looks these up by their plain names before it offers what it would compile. None is called: callers come by the
// names that the headers give.
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent
#undef cuLinkCreate
#undef cuLinkAddData
ENTRY CUresult cuCtxPushCurrent(CUcontext handle) { return CUDA_ERROR_NOT_SUPPORTED; }
ENTRY CUresult cuCtxPopCurrent(CUcontext *handle) { return CUDA_ERROR_NOT_SUPPORTED; }
ENTRY CUresult cuLinkCreate(unsigned count, CUjit_option *options, void **values, CUlinkState *state) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
ENTRY CUresult cuLinkAddData(CUlinkState state, CUjitInputType type, void *data, size_t bytes, const char *name,
                             unsigned count, CUjit_option *options, void **values) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

// A description of a tensor that only a kernel reads.
ENTRY CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                      const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                      const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                      CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}
