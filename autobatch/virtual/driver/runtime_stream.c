// CUDA runtime: streams, events, capture, graphs. All work is done when it is asked for, so nothing ever waits.
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "card.h"

struct CUstream_st {
  int device, priority;
  unsigned flags;
  unsigned long long id;
  unsigned long long capture;  // the capture it belongs to, also one that has ended by now; 0 for none
};

struct CUevent_st {
  int recorded;
  struct timespec when;
  unsigned long long capture;  // of the stream it was recorded on: a stream that waits for it joins the capture
};

// The captures that are under way, by id. PyTorch has a handful at most.
#define MAX_CAPTURES 64
static struct capture {
  unsigned long long id;
  cudaStream_t origin;
  cudaGraph_t graph;
} captures[MAX_CAPTURES];

// NULL, and the two special handles for the legacy and the per-thread default stream, have no record.
static int ordinary(cudaStream_t stream) { return (uintptr_t)stream > 16; }

static struct capture *capture_of(cudaStream_t stream) {
  if (!ordinary(stream) || !stream->capture) return NULL;
  for (int i = 0; i < MAX_CAPTURES; i++)
    if (captures[i].id == stream->capture) return &captures[i];
  return NULL;
}

ENTRY cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  static unsigned long long last;
  NEED(current_context());
  struct CUstream_st *made = calloc(1, sizeof *made);
  if (!made) return fail(cudaErrorMemoryAllocation);
  made->device = current_device();
  made->flags = flags;
  made->priority = priority > 0 ? 0 : priority < -5 ? -5 : priority;
  made->id = 16 + __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
  *stream = made;
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

ENTRY cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

ENTRY cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (ordinary(stream)) free(stream);
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = ordinary(stream) ? stream->priority : 0;
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
  *flags = ordinary(stream) ? stream->flags : 0;
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long *id) {
  *id = ordinary(stream) ? stream->id : (uintptr_t)stream;
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device) {
  *device = ordinary(stream) ? stream->device : current_device();
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamQuery(cudaStream_t stream) { return fail(context_or_fork()); }
ENTRY cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return fail(context_or_fork()); }

ENTRY cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  if (ordinary(stream) && event && event->capture) stream->capture = event->capture;
  return cudaSuccess;
}

// A host function runs at its place in the stream, which is now; in a capture it is only noted.
ENTRY cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
  NEED(current_context());
  if (!capture_of(stream)) function(argument);
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *argument,
                                        unsigned flags) {
  NEED(current_context());
  callback(stream, cudaSuccess, argument);
  return cudaSuccess;
}

// ---- events

ENTRY cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  NEED(context_or_fork());
  struct CUevent_st *made = calloc(1, sizeof *made);
  if (!made) return fail(cudaErrorMemoryAllocation);
  *event = made;
  return cudaSuccess;
}

ENTRY cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

ENTRY cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}

ENTRY cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  NEED(context_or_fork());
  struct capture *capture = capture_of(stream);
  event->capture = capture ? capture->id : 0;
  event->recorded = 1;
  clock_gettime(CLOCK_MONOTONIC, &event->when);
  return cudaSuccess;
}

ENTRY cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

// What lies between two events is the time this process took on the host, in whole tenths of a millisecond and at least
// one: whoever times what does nothing, as cudnn.benchmark does, then takes the first and not one by chance.
ENTRY cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (!start || !end || !start->recorded || !end->recorded) return fail(cudaErrorInvalidResourceHandle);
  double seconds = (double)(end->when.tv_sec - start->when.tv_sec);
  double nanoseconds = (double)(end->when.tv_nsec - start->when.tv_nsec);
  double tenths = seconds * 1e4 + nanoseconds / 1e5;
  *milliseconds = tenths < 1 ? 0.1f : (float)((double)(int64_t)tenths / 10);
  return cudaSuccess;
}

// ---- capture: PyTorch sends a capturing stream's memory to a private pool, so the status must be kept

ENTRY cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  static unsigned long long last;
  if (!ordinary(stream)) return fail(cudaErrorStreamCaptureUnsupported);
  if (capture_of(stream)) return fail(cudaErrorIllegalState);
  cudaError_t error = cudaErrorUnknown;
  tables_lock();
  for (int i = 0; i < MAX_CAPTURES; i++) {
    if (captures[i].id) continue;
    captures[i] = (struct capture){++last, stream, fresh_handle()};
    stream->capture = last;
    error = cudaSuccess;
    break;
  }
  tables_unlock();
  return fail(error);
}

ENTRY cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                                const cudaGraphNode_t *dependencies, const cudaGraphEdgeData *edges,
                                                size_t count, enum cudaStreamCaptureMode mode) {
  cudaError_t error = cudaStreamBeginCapture(stream, mode);
  if (error == cudaSuccess) capture_of(stream)->graph = graph;
  return error;
}

ENTRY cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  struct capture *capture = capture_of(stream);
  if (!capture || capture->origin != stream) {
    if (graph) *graph = NULL;
    return fail(cudaErrorIllegalState);
  }
  tables_lock();
  *graph = capture->graph;
  *capture = (struct capture){0};
  stream->capture = 0;
  tables_unlock();
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

ENTRY cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                           unsigned long long *id, cudaGraph_t *graph,
                                           const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                                           size_t *count) {
  struct capture *capture = capture_of(stream);
  *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? capture->graph : NULL;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}

// Nothing is ever unsafe to call here, so the mode only has to be given back.
ENTRY cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  static __thread enum cudaStreamCaptureMode own = cudaStreamCaptureModeGlobal;
  enum cudaStreamCaptureMode before = own;
  own = *mode;
  *mode = before;
  return cudaSuccess;
}

// ---- graphs: a handle each; one node, because PyTorch warns of a graph without any

ENTRY cudaError_t cudaGraphCreate(cudaGraph_t *graph, unsigned flags) {
  *graph = fresh_handle();
  return cudaSuccess;
}

ENTRY cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                                unsigned long long flags) {
  *executable = fresh_handle();
  return cudaSuccess;
}

ENTRY cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(executable, graph, flags);
}

ENTRY cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  if (nodes && *count) nodes[0] = fresh_handle();
  *count = 1;
  return cudaSuccess;
}

ENTRY cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies,
                                               cudaGraphEdgeData *edges, size_t *count) {
  *count = 0;
  return cudaSuccess;
}

ENTRY cudaError_t cudaGraphAddNode(cudaGraphNode_t *node, cudaGraph_t graph, const cudaGraphNode_t *dependencies,
                                   const cudaGraphEdgeData *edges, size_t count, struct cudaGraphNodeParams *params) {
  *node = fresh_handle();
  // A conditional node brings the graphs of its branches with it.
  if (params->type == cudaGraphNodeTypeConditional) {
    static cudaGraph_t bodies[2];
    for (int i = 0; i < 2; i++) bodies[i] = fresh_handle();
    params->conditional.phGraph_out = bodies;
  }
  return cudaSuccess;
}

ENTRY cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle *handle, cudaGraph_t graph,
                                                   unsigned initial, unsigned flags) {
  *handle = (cudaGraphConditionalHandle)(uintptr_t)fresh_handle();
  return cudaSuccess;
}

ENTRY cudaError_t cudaDeviceGetGraphMemAttribute(int device, enum cudaGraphMemAttributeType attribute, void *value) {
  *(uint64_t *)value = 0;
  return cudaSuccess;
}

// Its destructor never runs: PyTorch's frees what the graph used, and the process's end does too.
ENTRY cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *pointer, cudaHostFn_t destroy, unsigned count,
                                       unsigned flags) {
  *object = fresh_handle();
  return cudaSuccess;
}
