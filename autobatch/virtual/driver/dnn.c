// cuDNN: handles and descriptors, what has a size to tell, and convolutions the older way. Recurrent networks are in
// rnn.c, convolutions as PyTorch does them in dnn_backend.c.
#include "dnn.h"

#include <stdlib.h>
#include <string.h>

#include "card.h"

// What batch normalisation, the CTC loss and convolutions of the older interface want.
#define NO_WORKSPACE 0

static cudnnStatus_t give(void **descriptor, size_t bytes) {
  *descriptor = calloc(1, bytes);
  return *descriptor ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_ALLOC_FAILED;
}

ENTRY cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
  if (current_context() != cudaSuccess) return CUDNN_STATUS_NOT_INITIALIZED;
  *handle = fresh_handle();
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
  *stream = NULL;
  return CUDNN_STATUS_SUCCESS;
}

// ---- tensors and filters: their dimensions are read back

ENTRY cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t *tensor) {
  return give((void **)tensor, sizeof(struct cudnnTensorStruct));
}

ENTRY cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t tensor) {
  free(tensor);
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnSetTensorNdDescriptor(cudnnTensorDescriptor_t tensor, cudnnDataType_t type, int count,
                                               const int sizes[], const int strides[]) {
  if (count < 0 || count > CUDNN_DIM_MAX) return CUDNN_STATUS_NOT_SUPPORTED;
  tensor->type = type;
  tensor->count = count;
  memcpy(tensor->sizes, sizes, (size_t)count * sizeof *sizes);
  memcpy(tensor->strides, strides, (size_t)count * sizeof *strides);
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetTensorNdDescriptor(const cudnnTensorDescriptor_t tensor, int wanted, cudnnDataType_t *type,
                                               int *count, int sizes[], int strides[]) {
  int given = wanted < tensor->count ? wanted : tensor->count;
  *type = tensor->type;
  *count = tensor->count;
  memcpy(sizes, tensor->sizes, (size_t)given * sizeof *sizes);
  memcpy(strides, tensor->strides, (size_t)given * sizeof *strides);
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t *filter) {
  return give((void **)filter, sizeof(struct cudnnFilterStruct));
}

ENTRY cudnnStatus_t cudnnDestroyFilterDescriptor(cudnnFilterDescriptor_t filter) {
  free(filter);
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnSetFilterNdDescriptor(cudnnFilterDescriptor_t filter, cudnnDataType_t type,
                                               cudnnTensorFormat_t format, int count, const int sizes[]) {
  if (count < 0 || count > CUDNN_DIM_MAX) return CUDNN_STATUS_NOT_SUPPORTED;
  filter->type = type;
  filter->format = format;
  filter->count = count;
  memcpy(filter->sizes, sizes, (size_t)count * sizeof *sizes);
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetFilterNdDescriptor(const cudnnFilterDescriptor_t filter, int wanted, cudnnDataType_t *type,
                                               cudnnTensorFormat_t *format, int *count, int sizes[]) {
  *type = filter->type;
  *format = filter->format;
  *count = filter->count;
  memcpy(sizes, filter->sizes, (size_t)(wanted < filter->count ? wanted : filter->count) * sizeof *sizes);
  return CUDNN_STATUS_SUCCESS;
}

// ---- dropout: the generator's states live in memory of the program

#define STATE_BYTES 24  // of a thread: an H200, of 132 multiprocessors with 2048 threads, says 6488064 bytes

ENTRY cudnnStatus_t cudnnDropoutGetStatesSize(cudnnHandle_t handle, size_t *bytes) {
  struct cudaDeviceProp about;
  if (current_context() != cudaSuccess) return CUDNN_STATUS_NOT_INITIALIZED;
  properties_of(current_device(), &about);
  *bytes = (size_t)about.multiProcessorCount * (size_t)about.maxThreadsPerMultiProcessor * STATE_BYTES;
  return CUDNN_STATUS_SUCCESS;
}

// ---- sizes

ENTRY cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const cudnnTensorDescriptor_t x,
    const cudnnTensorDescriptor_t z, const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t scale,
    const cudnnActivationDescriptor_t activation, size_t *bytes) {
  *bytes = NO_WORKSPACE;
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops, const cudnnTensorDescriptor_t x,
    const cudnnTensorDescriptor_t y, const cudnnTensorDescriptor_t dy, const cudnnTensorDescriptor_t dz,
    const cudnnTensorDescriptor_t dx, const cudnnTensorDescriptor_t scale,
    const cudnnActivationDescriptor_t activation, size_t *bytes) {
  *bytes = NO_WORKSPACE;
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t handle, cudnnBatchNormMode_t mode, cudnnBatchNormOps_t ops,
    const cudnnActivationDescriptor_t activation, const cudnnTensorDescriptor_t x, size_t *bytes) {
  *bytes = NO_WORKSPACE;
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetCTCLossWorkspaceSize(cudnnHandle_t handle, const cudnnTensorDescriptor_t probabilities,
                                                 const cudnnTensorDescriptor_t gradients, const int *labels,
                                                 const int *label_lengths, const int *input_lengths,
                                                 cudnnCTCLossAlgo_t algorithm, cudnnCTCLossDescriptor_t loss,
                                                 size_t *bytes) {
  *bytes = NO_WORKSPACE;
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetCTCLossWorkspaceSize_v8(cudnnHandle_t handle, cudnnCTCLossAlgo_t algorithm,
                                                    cudnnCTCLossDescriptor_t loss,
                                                    const cudnnTensorDescriptor_t probabilities,
                                                    const cudnnTensorDescriptor_t gradients, size_t *bytes) {
  *bytes = NO_WORKSPACE;
  return CUDNN_STATUS_SUCCESS;
}

// ---- convolutions by the older interface: the first algorithm, as the only one

#define ONE_ALGORITHM(wanted, count, results)     \
  *count = wanted > 0;                            \
  if (*count) memset(results, 0, sizeof *results); \
  return CUDNN_STATUS_SUCCESS

ENTRY cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnFilterDescriptor_t w,
    const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t y, const int wanted, int *count,
    cudnnConvolutionFwdAlgoPerf_t *results) {
  ONE_ALGORITHM(wanted, count, results);
}

ENTRY cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnTensorDescriptor_t dx, const int wanted, int *count,
    cudnnConvolutionBwdDataAlgoPerf_t *results) {
  ONE_ALGORITHM(wanted, count, results);
}

ENTRY cudnnStatus_t cudnnGetConvolutionBackwardFilterAlgorithm_v7(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t dy,
    const cudnnConvolutionDescriptor_t convolution, const cudnnFilterDescriptor_t dw, const int wanted, int *count,
    cudnnConvolutionBwdFilterAlgoPerf_t *results) {
  ONE_ALGORITHM(wanted, count, results);
}

ENTRY cudnnStatus_t cudnnFindConvolutionForwardAlgorithmEx(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x_description, const void *x,
    const cudnnFilterDescriptor_t w_description, const void *w, const cudnnConvolutionDescriptor_t convolution,
    const cudnnTensorDescriptor_t y_description, void *y, const int wanted, int *count,
    cudnnConvolutionFwdAlgoPerf_t *results, void *workspace, size_t workspace_bytes) {
  ONE_ALGORITHM(wanted, count, results);
}

ENTRY cudnnStatus_t cudnnFindConvolutionBackwardDataAlgorithmEx(
    cudnnHandle_t handle, const cudnnFilterDescriptor_t w_description, const void *w,
    const cudnnTensorDescriptor_t dy_description, const void *dy, const cudnnConvolutionDescriptor_t convolution,
    const cudnnTensorDescriptor_t dx_description, void *dx, const int wanted, int *count,
    cudnnConvolutionBwdDataAlgoPerf_t *results, void *workspace, size_t workspace_bytes) {
  ONE_ALGORITHM(wanted, count, results);
}

ENTRY cudnnStatus_t cudnnFindConvolutionBackwardFilterAlgorithmEx(
    cudnnHandle_t handle, const cudnnTensorDescriptor_t x_description, const void *x,
    const cudnnTensorDescriptor_t dy_description, const void *dy, const cudnnConvolutionDescriptor_t convolution,
    const cudnnFilterDescriptor_t dw_description, void *dw, const int wanted, int *count,
    cudnnConvolutionBwdFilterAlgoPerf_t *results, void *workspace, size_t workspace_bytes) {
  ONE_ALGORITHM(wanted, count, results);
}

ENTRY cudnnStatus_t cudnnGetConvolutionForwardWorkspaceSize(cudnnHandle_t handle, const cudnnTensorDescriptor_t x,
                                                            const cudnnFilterDescriptor_t w,
                                                            const cudnnConvolutionDescriptor_t convolution,
                                                            const cudnnTensorDescriptor_t y,
                                                            cudnnConvolutionFwdAlgo_t algorithm, size_t *bytes) {
  *bytes = NO_WORKSPACE;
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetConvolutionBackwardDataWorkspaceSize(cudnnHandle_t handle,
                                                                 const cudnnFilterDescriptor_t w,
                                                                 const cudnnTensorDescriptor_t dy,
                                                                 const cudnnConvolutionDescriptor_t convolution,
                                                                 const cudnnTensorDescriptor_t dx,
                                                                 cudnnConvolutionBwdDataAlgo_t algorithm,
                                                                 size_t *bytes) {
  *bytes = NO_WORKSPACE;
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnGetConvolutionBackwardFilterWorkspaceSize(cudnnHandle_t handle,
                                                                   const cudnnTensorDescriptor_t x,
                                                                   const cudnnTensorDescriptor_t dy,
                                                                   const cudnnConvolutionDescriptor_t convolution,
                                                                   const cudnnFilterDescriptor_t dw,
                                                                   cudnnConvolutionBwdFilterAlgo_t algorithm,
                                                                   size_t *bytes) {
  *bytes = NO_WORKSPACE;
  return CUDNN_STATUS_SUCCESS;
}
