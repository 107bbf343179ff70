// cuDNN: recurrent networks. Their sizes decide what nn.LSTM and nn.GRU allocate.
#include <stdlib.h>
#include <string.h>

#include "card.h"
#include "dnn.h"

static size_t width_of(cudnnDataType_t type) {
  return type == CUDNN_DATA_DOUBLE ? 8 : type == CUDNN_DATA_FLOAT ? 4 : 2;
}

static int gates_of(const struct cudnnRNNStruct *rnn) {
  return rnn->cell == CUDNN_LSTM ? 4 : rnn->cell == CUDNN_GRU ? 3 : 1;
}

// What a layer gives out, per direction: the hidden state, or its projection.
static int output_of(const struct cudnnRNNStruct *rnn) {
  return rnn->projection ? rnn->projection : rnn->hidden;
}

static int projects(const struct cudnnRNNStruct *rnn) { return rnn->projection && rnn->projection != rnn->hidden; }

// Columns of the input matrices of pseudo-layer `layer` (layer x directions + direction).
static int input_of(const struct cudnnRNNStruct *rnn, int layer) {
  if (layer >= rnn->directions) return output_of(rnn) * rnn->directions;
  return rnn->skip_input ? 0 : rnn->input;
}

// Elements of all matrices of pseudo-layer `layer`: input and recurrent ones per gate, and the projection.
static size_t matrices(const struct cudnnRNNStruct *rnn, int layer) {
  size_t per_gate = (size_t)rnn->hidden * (size_t)(input_of(rnn, layer) + output_of(rnn));
  return (size_t)gates_of(rnn) * per_gate + (projects(rnn) ? (size_t)rnn->hidden * (size_t)rnn->projection : 0);
}

static int bias_sets(const struct cudnnRNNStruct *rnn) {
  return rnn->bias == CUDNN_RNN_NO_BIAS ? 0 : rnn->bias == CUDNN_RNN_DOUBLE_BIAS ? 2 : 1;
}

static size_t biases(const struct cudnnRNNStruct *rnn) {
  return (size_t)(gates_of(rnn) * bias_sets(rnn)) * (size_t)rnn->hidden;
}

ENTRY cudnnStatus_t cudnnCreateRNNDescriptor(cudnnRNNDescriptor_t *rnn) {
  *rnn = calloc(1, sizeof **rnn);
  return *rnn ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_ALLOC_FAILED;
}

ENTRY cudnnStatus_t cudnnDestroyRNNDescriptor(cudnnRNNDescriptor_t rnn) {
  free(rnn);
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnSetRNNDescriptor_v8(cudnnRNNDescriptor_t rnn, cudnnRNNAlgo_t algorithm, cudnnRNNMode_t cell,
                                             cudnnRNNBiasMode_t bias, cudnnDirectionMode_t direction,
                                             cudnnRNNInputMode_t input_mode, cudnnDataType_t type,
                                             cudnnDataType_t precision, cudnnMathType_t math, int32_t input,
                                             int32_t hidden, int32_t projection, int32_t layers,
                                             cudnnDropoutDescriptor_t dropout, uint32_t flags) {
  *rnn = (struct cudnnRNNStruct){.cell = cell,
                                 .bias = bias,
                                 .type = type,
                                 .skip_input = input_mode == CUDNN_SKIP_INPUT,
                                 .directions = direction == CUDNN_BIDIRECTIONAL ? 2 : 1,
                                 .input = input,
                                 .hidden = hidden,
                                 .projection = projection,
                                 .layers = layers};
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnCreateRNNDataDescriptor(cudnnRNNDataDescriptor_t *data) {
  *data = calloc(1, sizeof **data);
  return *data ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_ALLOC_FAILED;
}

ENTRY cudnnStatus_t cudnnDestroyRNNDataDescriptor(cudnnRNNDataDescriptor_t data) {
  free(data);
  return CUDNN_STATUS_SUCCESS;
}

ENTRY cudnnStatus_t cudnnSetRNNDataDescriptor(cudnnRNNDataDescriptor_t data, cudnnDataType_t type,
                                              cudnnRNNDataLayout_t layout, int steps, int batch, int width,
                                              const int lengths[], void *padding) {
  *data = (struct cudnnRNNDataStruct){steps, batch};
  return CUDNN_STATUS_SUCCESS;
}

// All matrices and biases, back to back: what PyTorch's flattened weight takes.
ENTRY cudnnStatus_t cudnnGetRNNWeightSpaceSize(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, size_t *bytes) {
  size_t elements = 0;
  for (int layer = 0; layer < rnn->layers * rnn->directions; layer++) elements += matrices(rnn, layer) + biases(rnn);
  *bytes = elements * width_of(rnn->type);
  return CUDNN_STATUS_SUCCESS;
}

// cuDNN does not document these two. An H200 (cuDNN 9.19) has 153617152 and 185073920 bytes for an LSTM in single
// precision with two layers of 512, a batch of 64 and 128 steps: within 2 % twice one layer's gates and a copy of the
// weights, and within 0.3 % the gates and cell states of both layers and the output between them. Others are taken to be
// alike.
ENTRY cudnnStatus_t cudnnGetRNNTempSpaceSizes(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, cudnnForwardMode_t mode,
                                              cudnnRNNDataDescriptor_t data, size_t *workspace, size_t *reserve) {
  size_t cells = (size_t)data->steps * (size_t)data->batch * (size_t)rnn->directions * (size_t)rnn->hidden;
  size_t layers = (size_t)rnn->layers, kept = (size_t)gates_of(rnn) + 1, weights;
  cudnnGetRNNWeightSpaceSize(handle, rnn, &weights);
  if (workspace) *workspace = 2 * cells * (size_t)gates_of(rnn) * width_of(rnn->type) + weights;
  size_t all = (layers * kept + layers - 1) * cells * width_of(rnn->type);
  if (reserve) *reserve = mode == CUDNN_FWD_MODE_TRAINING ? all : 0;
  return CUDNN_STATUS_SUCCESS;
}

// Callers leave out what they do not ask for.
static void describe(cudnnTensorDescriptor_t tensor, const struct cudnnRNNStruct *rnn, int rows, int columns) {
  if (!tensor) return;
  *tensor = (struct cudnnTensorStruct){.type = rnn->type, .count = rows ? 3 : 0};
  tensor->sizes[0] = 1;
  tensor->sizes[1] = rows;
  tensor->sizes[2] = columns;
  tensor->strides[0] = rows * columns;
  tensor->strides[1] = columns;
  tensor->strides[2] = 1;
}

// Where one gate's matrix and bias lie. `id` counts a layer's input matrices, then its recurrent ones, then the
// projection (8, LSTM only). All matrices of all layers come first, then all biases.
ENTRY cudnnStatus_t cudnnGetRNNWeightParams(cudnnHandle_t handle, cudnnRNNDescriptor_t rnn, int32_t layer,
                                            size_t weight_bytes, const void *weights, int32_t id,
                                            cudnnTensorDescriptor_t matrix, void **matrix_address,
                                            cudnnTensorDescriptor_t bias, void **bias_address) {
  int gates = gates_of(rnn), layers = rnn->layers * rnn->directions, recurrent = id >= gates;
  if (layer < 0 || layer >= layers || id < 0 || id > 2 * gates || (id == 2 * gates && !projects(rnn)))
    return CUDNN_STATUS_BAD_PARAM;
  size_t width = width_of(rnn->type), hidden = (size_t)rnn->hidden, before = 0, all = 0;
  for (int i = 0; i < layers; i++) {
    if (i < layer) before += matrices(rnn, i);
    all += matrices(rnn, i);
  }
  size_t input = hidden * (size_t)input_of(rnn, layer), output = hidden * (size_t)output_of(rnn);
  size_t offset = recurrent ? (size_t)gates * input + (size_t)(id - gates) * output : (size_t)id * input;
  int projection = id == 2 * gates, columns = projection  ? rnn->hidden
                                              : recurrent ? output_of(rnn)
                                                          : input_of(rnn, layer);
  describe(matrix, rnn, projection ? rnn->projection : rnn->hidden, columns);
  if (matrix_address) *matrix_address = columns ? (char *)weights + (before + offset) * width : NULL;
  // With one bias set it belongs to the input matrices, or to the recurrent ones if it is called so.
  int sets = bias_sets(rnn), first = rnn->bias == CUDNN_RNN_SINGLE_REC_BIAS ? gates : 0;
  int place = sets == 2 ? id : id - first;
  int has_bias = sets && place >= 0 && place < gates * sets;
  describe(bias, rnn, has_bias ? rnn->hidden : 0, 1);
  size_t bias_offset = all + (size_t)layer * biases(rnn) + (size_t)place * hidden;
  if (bias_address) *bias_address = has_bias ? (char *)weights + bias_offset * width : NULL;
  return CUDNN_STATUS_SUCCESS;
}
