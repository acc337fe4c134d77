// Stands in for cuBLASLt's header where that is missing: LibTorch's headers name the handle, and the shim never uses it.
// The real header comes first where there is one.
#pragma once

typedef struct cublasLtContext* cublasLtHandle_t;
