// cuBLAS and cuBLASLt. Multiplications succeed (generated answers); here is what gives something back.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <string.h>

#include "card.h"

ENTRY cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
  if (current_context() != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
  *handle = fresh_handle();
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasGetVersion_v2(cublasHandle_t handle, int *version) {
  *version = CUBLAS_VERSION;
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t *stream) {
  *stream = NULL;
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  if (current_context() != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
  *handle = fresh_handle();
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *description, cublasComputeType_t compute,
                                              cudaDataType_t scale) {
  *description = fresh_handle();
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
  *preference = fresh_handle();
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                                uint64_t columns, int64_t leading) {
  *layout = fresh_handle();
  return CUBLAS_STATUS_SUCCESS;
}

// One algorithm, without a workspace: PyTorch hands cuBLASLt a workspace of fixed size whatever the algorithm wants.
ENTRY cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t results[], int *found) {
  *found = wanted > 0;
  if (*found) memset(results, 0, sizeof *results);
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasLtMatmulAlgoInit(cublasLtHandle_t handle, cublasComputeType_t compute, cudaDataType_t scale,
                                            cudaDataType_t a, cudaDataType_t b, cudaDataType_t c, cudaDataType_t d,
                                            int id, cublasLtMatmulAlgo_t *algorithm) {
  memset(algorithm, 0, sizeof *algorithm);
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                             cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                             cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                             const cublasLtMatmulAlgo_t *algorithm,
                                             cublasLtMatmulHeuristicResult_t *result) {
  memset(result, 0, sizeof *result);
  return CUBLAS_STATUS_SUCCESS;
}

ENTRY cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algorithm,
                                                          cublasLtMatmulAlgoConfigAttributes_t attribute, void *value,
                                                          size_t bytes, size_t *written) {
  if (value) memset(value, 0, bytes);
  if (written) *written = bytes;
  return CUBLAS_STATUS_SUCCESS;
}
