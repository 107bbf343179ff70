// cuDNN's backend interface, which PyTorch uses for convolutions and attention.
//
// The real library beside torch makes plans without a card, for one that is described to it ("deviceless compilation",
// cuDNN 9.8 and newer), so its heuristics and the workspaces of its plans are the real ones. A descriptor here stands
// for one of the library's. Where there is no library, or it does not know such a card, descriptors hold nothing, every
// list of engines has one, and it wants no workspace.
#include <stdlib.h>

#include "card.h"
#include "dnn.h"
#include "dnn_real.h"

struct descriptor {
  cudnnBackendDescriptorType_t type;
  cudnnBackendDescriptor_t real;           // NULL if it holds nothing
  cudnnBackendDescriptor_t configuration;  // of a plan: the library's descriptor of what it is a plan for
  int uncompiled;                          // a plan that is complete but for its kernel
  int64_t workspace;                       // of such a plan
};

static void drop(struct descriptor *d) {
  if (d->real) dnn_real()->destroy(d->real);
  d->real = NULL;
}

ENTRY cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                                 cudnnBackendDescriptor_t *descriptor) {
  struct descriptor *d = calloc(1, sizeof *d);
  *descriptor = d;
  if (!d) return CUDNN_STATUS_ALLOC_FAILED;
  d->type = type;
  if (!dnn_real_card(current_device())) return CUDNN_STATUS_SUCCESS;
  cudnnStatus_t status = dnn_real()->create(type, &d->real);
  if (status == CUDNN_STATUS_SUCCESS) return status;
  free(d);
  *descriptor = NULL;
  return status;
}

// A fork may have left the library locked for ever: what a child takes apart stays with it until it ends.
ENTRY cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  if (descriptor && !forked()) drop(descriptor);
  free(descriptor);
  return CUDNN_STATUS_SUCCESS;
}

// The library's descriptors for `count` of ours, to be freed; NULL if one of them holds nothing.
static cudnnBackendDescriptor_t *real_ones(void *const *ours, int64_t count) {
  cudnnBackendDescriptor_t *real = calloc((size_t)count + 1, sizeof *real);
  if (!real) abort();
  for (int64_t i = 0; i < count; i++) {
    const struct descriptor *d = ours[i];
    real[i] = d ? d->real : NULL;
    if (real[i]) continue;
    free(real);
    return NULL;
  }
  return real;
}

ENTRY cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t attribute,
                                             cudnnBackendAttributeType_t type, int64_t count, const void *elements) {
  struct descriptor *d = descriptor;
  // A handle is ours, and stands for a card that the library is told of in another way.
  if (!d->real || type == CUDNN_TYPE_HANDLE) return CUDNN_STATUS_SUCCESS;
  if (type != CUDNN_TYPE_BACKEND_DESCRIPTOR) return dnn_real()->set(d->real, attribute, type, count, elements);
  cudnnBackendDescriptor_t *real = real_ones(elements, count);
  if (!real) {  // what is made of nothing is nothing
    drop(d);
    return CUDNN_STATUS_SUCCESS;
  }
  if (attribute == CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG && count == 1) d->configuration = *real;
  cudnnStatus_t status = dnn_real()->set(d->real, attribute, type, count, real);
  free(real);
  return status;
}

// Whether what a plan is for is compiled at run time.
static int is_compiled(cudnnBackendDescriptor_t configuration) {
  const struct dnn_real *library = dnn_real();
  cudnnBackendBehaviorNote_t notes[CUDNN_BEHAVIOR_NOTE_TYPE_COUNT];
  cudnnBackendDescriptor_t engine;
  int64_t count = 0;
  int found = 0;
  if (!configuration || library->create(CUDNN_BACKEND_ENGINE_DESCRIPTOR, &engine)) return 0;
  if (!library->get(configuration, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &count, &engine) &&
      !library->get(engine, CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE, CUDNN_TYPE_BEHAVIOR_NOTE, CUDNN_BEHAVIOR_NOTE_TYPE_COUNT,
                    &count, notes))
    for (int64_t i = 0; i < count; i++) found |= notes[i] == CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION;
  library->destroy(engine);
  return found;
}

// Compiling a kernel for attention takes half a second, and nothing would run it: the heuristics have checked that it
// can be had, and the workspace is that of the configuration.
static cudnnStatus_t leave_uncompiled(struct descriptor *plan) {
  int64_t count = 0;
  plan->uncompiled = 1;
  return dnn_real()->get(plan->configuration, CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count,
                         &plan->workspace);
}

ENTRY cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) {
  struct descriptor *d = descriptor;
  if (!d->real) return CUDNN_STATUS_SUCCESS;
  const struct dnn_real *library = dnn_real();
  cudnnBackendDescriptor_t card = dnn_real_card(current_device());
  int is_plan = d->type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR;
  if (is_plan && is_compiled(d->configuration)) return leave_uncompiled(d);
  if (card && is_plan)
    library->set(d->real, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &card);
  if (card && d->type == CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)
    library->set(d->real, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &card);
  return library->finalize(d->real);
}

// Asked for descriptors it says "one"; the frontend has made the place for it already. Numbers (workspace, shared
// memory, counts) are zero.
static cudnnStatus_t answer_of_nothing(cudnnBackendAttributeType_t type, int64_t wanted, int64_t *count,
                                       void *elements) {
  int64_t given = 0;
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {
    given = 1;
    if (elements && wanted > 0) drop(*(struct descriptor **)elements);  // what nothing answers is nothing too
  } else if (elements && wanted > 0 && type == CUDNN_TYPE_INT32) {
    *(int32_t *)elements = 0;
    given = 1;
  } else if (elements && wanted > 0 && type == CUDNN_TYPE_INT64) {
    *(int64_t *)elements = 0;
    given = 1;
  }
  if (count) *count = given;
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t answer_of_uncompiled(const struct descriptor *d, cudnnBackendAttributeName_t attribute,
                                          int64_t wanted, int64_t *count, void *elements) {
  int known = attribute == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE;
  if (known && elements && wanted > 0) *(int64_t *)elements = d->workspace;
  if (count) *count = known;
  return CUDNN_STATUS_SUCCESS;
}

// Descriptors are handed in to be filled.
ENTRY cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const descriptor,
                                             cudnnBackendAttributeName_t attribute, cudnnBackendAttributeType_t type,
                                             int64_t wanted, int64_t *count, void *elements) {
  const struct descriptor *d = descriptor;
  if (!d->real) return answer_of_nothing(type, wanted, count, elements);
  if (d->uncompiled) return answer_of_uncompiled(d, attribute, wanted, count, elements);
  if (type != CUDNN_TYPE_BACKEND_DESCRIPTOR || !elements)
    return dnn_real()->get(d->real, attribute, type, wanted, count, elements);
  cudnnBackendDescriptor_t *real = real_ones(elements, wanted);
  if (!real) return CUDNN_STATUS_BAD_PARAM;
  cudnnStatus_t status = dnn_real()->get(d->real, attribute, type, wanted, count, real);
  free(real);
  return status;
}
