// What the driver's entry points have in common. Its error numbers are the runtime's, so they are passed on.
#ifndef AUTOBATCH_DRIVER_H
#define AUTOBATCH_DRIVER_H

// Leaves an entry point with the error of `call`, if it has one.
#define TRY(call)                               \
  do {                                          \
    cudaError_t try_ = (call);                  \
    if (try_ != cudaSuccess) return (CUresult)try_; \
  } while (0)

// An entry point of this library by its plain name, in the form that the installed headers give it (cuMemAlloc is
// cuMemAlloc_v2); NULL if there is none.
void *entry_point(const char *name);

#endif
