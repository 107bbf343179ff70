// NVRTC: run-time compilation (PyTorch's jiterator). Nothing is compiled.
#include <nvrtc.h>
#include <string.h>

#include "card.h"

ENTRY nvrtcResult nvrtcVersion(int *major, int *minor) {
  *major = CUDA_VERSION / 1000;
  *minor = CUDA_VERSION % 1000 / 10;
  return NVRTC_SUCCESS;
}

ENTRY nvrtcResult nvrtcCreateProgram(nvrtcProgram *program, const char *source, const char *name, int headers,
                                     const char *const *header_sources, const char *const *header_names) {
  *program = fresh_handle();
  return NVRTC_SUCCESS;
}

ENTRY nvrtcResult nvrtcDestroyProgram(nvrtcProgram *program) {
  *program = NULL;
  return NVRTC_SUCCESS;
}

// What a compilation gives is an empty text, one byte long with its end.
ENTRY nvrtcResult nvrtcGetPTXSize(nvrtcProgram program, size_t *bytes) { return *bytes = 1, NVRTC_SUCCESS; }
ENTRY nvrtcResult nvrtcGetPTX(nvrtcProgram program, char *text) { return *text = 0, NVRTC_SUCCESS; }
ENTRY nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t *bytes) { return *bytes = 1, NVRTC_SUCCESS; }
ENTRY nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char *text) { return *text = 0, NVRTC_SUCCESS; }
ENTRY nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program, size_t *bytes) { return *bytes = 1, NVRTC_SUCCESS; }
ENTRY nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char *text) { return *text = 0, NVRTC_SUCCESS; }

ENTRY nvrtcResult nvrtcGetLoweredName(nvrtcProgram program, const char *expression, const char **name) {
  *name = "kernel";
  return NVRTC_SUCCESS;
}

ENTRY nvrtcResult nvrtcGetNumSupportedArchs(int *count) { return *count = 0, NVRTC_SUCCESS; }
ENTRY const char *nvrtcGetErrorString(nvrtcResult error) {
  return error == NVRTC_SUCCESS ? "NVRTC_SUCCESS" : "NVRTC_ERROR";
}
