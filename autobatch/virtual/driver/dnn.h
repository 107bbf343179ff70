// The cuDNN descriptors that are read back. The library's own are opaque, so these are ours to lay out.
#ifndef AUTOBATCH_DNN_H
#define AUTOBATCH_DNN_H

#include <cudnn.h>

struct cudnnTensorStruct {
  cudnnDataType_t type;
  int count;
  int sizes[CUDNN_DIM_MAX], strides[CUDNN_DIM_MAX];
};

struct cudnnFilterStruct {
  cudnnDataType_t type;
  cudnnTensorFormat_t format;
  int count;
  int sizes[CUDNN_DIM_MAX];
};

struct cudnnRNNStruct {
  cudnnRNNMode_t cell;
  cudnnRNNBiasMode_t bias;
  cudnnDataType_t type;
  int skip_input;
  int directions;
  int input, hidden, projection, layers;  // sizes
};

struct cudnnRNNDataStruct {
  int steps, batch;
};

#endif
