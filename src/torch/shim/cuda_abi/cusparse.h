// Stands in for cuSPARSE's header where that is missing: LibTorch's headers name the handle, and the shim never uses it.
// The real header comes first where there is one.
#pragma once

typedef struct cusparseContext* cusparseHandle_t;
enum cusparseStatus_t : int {};
