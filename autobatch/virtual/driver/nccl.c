// NCCL: one rank of a stated world. What others would send is taken to be what this rank sent.
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

#include "card.h"
#include "memory.h"

struct ncclComm {
  int ranks, rank, device;
};

static size_t width(ncclDataType_t type) {
  switch ((int)type) {
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    default: return 1;
  }
}

ENTRY ncclResult_t ncclGetVersion(int *version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

// Ranks find each other through the program's own store, so the id need not be one.
ENTRY ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  memset(id, 7, sizeof *id);
  return ncclSuccess;
}

ENTRY const char *ncclGetErrorString(ncclResult_t error) {
  return error == ncclSuccess ? "no error" : "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
}
ENTRY const char *ncclGetLastError(ncclComm_t comm) { return ""; }

static ncclResult_t join(ncclComm_t *comm, int ranks, int rank) {
  if (current_context() != cudaSuccess) return ncclUnhandledCudaError;
  *comm = malloc(sizeof **comm);
  if (!*comm) return ncclSystemError;
  **comm = (struct ncclComm){ranks, rank, current_device()};
  return ncclSuccess;
}

ENTRY ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
  return join(comm, ranks, rank);
}

ENTRY ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank,
                                          ncclConfig_t *config) {
  return join(comm, ranks, rank);
}

ENTRY ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int ranks, int rank, int roots, ncclUniqueId *ids,
                                            ncclConfig_t *config) {
  return join(comm, ranks, rank);
}

ENTRY ncclResult_t ncclCommInitAll(ncclComm_t *comms, int devices, const int *ordinals) {
  int before = current_device();
  ncclResult_t result = ncclSuccess;
  for (int i = 0; i < devices && result == ncclSuccess; i++) {
    if (select_device(ordinals ? ordinals[i] : i) != cudaSuccess) result = ncclInvalidArgument;
    else result = join(&comms[i], devices, i);
  }
  select_device(before);
  return result;
}

// How many ranks chose the same colour is not known here; the whole world is an upper bound.
ENTRY ncclResult_t ncclCommSplit(ncclComm_t comm, int colour, int key, ncclComm_t *part, ncclConfig_t *config) {
  if (colour != NCCL_SPLIT_NOCOLOR) return join(part, comm->ranks, comm->rank);
  *part = NULL;
  return ncclSuccess;
}

ENTRY ncclResult_t ncclCommShrink(ncclComm_t comm, int *excluded, int count, ncclComm_t *part, ncclConfig_t *config,
                                  int flags) {
  return join(part, comm->ranks - count, comm->rank);
}

ENTRY ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  free(comm);
  return ncclSuccess;
}
ENTRY ncclResult_t ncclCommAbort(ncclComm_t comm) { return ncclCommDestroy(comm); }

ENTRY ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
  *error = ncclSuccess;
  return ncclSuccess;
}

ENTRY ncclResult_t ncclCommCount(ncclComm_t comm, int *ranks) {
  *ranks = comm->ranks;
  return ncclSuccess;
}

ENTRY ncclResult_t ncclCommUserRank(ncclComm_t comm, int *rank) {
  *rank = comm->rank;
  return ncclSuccess;
}

ENTRY ncclResult_t ncclCommCuDevice(ncclComm_t comm, int *device) {
  *device = comm->device;
  return ncclSuccess;
}

// ---- collectives

// Part `index` of a buffer of equal parts, as far as the buffer goes: a split communicator may have fewer ranks than
// it says, and what lies behind its buffer is somebody else's.
static void put(void *buffer, size_t index, size_t bytes, const void *from) {
  char *to = (char *)buffer + index * bytes;
  size_t size;
  char *run = memory_run(buffer, &size);
  if (run && to + bytes > run + size) return;
  if (to != from) memory_copy(to, from, bytes);
}

ENTRY ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                                 cudaStream_t stream) {
  for (int rank = 0; rank < comm->ranks; rank++) put(to, (size_t)rank, count * width(type), from);
  return ncclSuccess;
}

ENTRY ncclResult_t ncclGather(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                              cudaStream_t stream) {
  return root == comm->rank ? ncclAllGather(from, to, count, type, comm, stream) : ncclSuccess;
}

ENTRY ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                 ncclComm_t comm, cudaStream_t stream) {
  put(to, 0, count * width(type), from);
  return ncclSuccess;
}

ENTRY ncclResult_t ncclReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                              ncclComm_t comm, cudaStream_t stream) {
  if (root == comm->rank) put(to, 0, count * width(type), from);
  return ncclSuccess;
}

ENTRY ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                     ncclComm_t comm, cudaStream_t stream) {
  size_t bytes = count * width(type);
  put(to, 0, bytes, (const char *)from + (size_t)comm->rank * bytes);
  return ncclSuccess;
}

ENTRY ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root,
                                 ncclComm_t comm, cudaStream_t stream) {
  put(to, 0, count * width(type), from);
  return ncclSuccess;
}

ENTRY ncclResult_t ncclAlltoAll(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm,
                                cudaStream_t stream) {
  size_t bytes = count * width(type);
  for (size_t rank = 0; rank < (size_t)comm->ranks; rank++) put(to, rank, bytes, (const char *)from + rank * bytes);
  return ncclSuccess;
}

ENTRY ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t type,
                                            ncclScalarResidence_t residence, ncclComm_t comm) {
  *op = (ncclRedOp_t)ncclNumOps;
  return ncclSuccess;
}

// ---- memory and windows

ENTRY ncclResult_t ncclMemAlloc(void **address, size_t bytes) {
  return cudaMalloc(address, bytes) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
ENTRY ncclResult_t ncclMemFree(void *address) {
  return cudaFree(address) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ENTRY ncclResult_t ncclCommRegister(const ncclComm_t comm, void *buffer, size_t bytes, void **handle) {
  *handle = fresh_handle();
  return ncclSuccess;
}

ENTRY ncclResult_t ncclCommWindowRegister(ncclComm_t comm, void *buffer, size_t bytes, ncclWindow_t *window,
                                          int flags) {
  *window = fresh_handle();
  return ncclSuccess;
}
