// The real cuDNN that is installed beside torch, which can plan for a card that is not there.
#ifndef AUTOBATCH_DNN_REAL_H
#define AUTOBATCH_DNN_REAL_H

#include <cudnn.h>

// Its backend interface.
struct dnn_real {
  __typeof__(&cudnnBackendCreateDescriptor) create;
  __typeof__(&cudnnBackendDestroyDescriptor) destroy;
  __typeof__(&cudnnBackendSetAttribute) set;
  __typeof__(&cudnnBackendGetAttribute) get;
  __typeof__(&cudnnBackendFinalize) finalize;
};
// NULL if this process has not loaded cuDNN.
const struct dnn_real *dnn_real(void);
// The library's description of a card, made at its first use; NULL if there is no library or it does not take it.
cudnnBackendDescriptor_t dnn_real_card(int device);

#endif
