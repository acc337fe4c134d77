// Stands in for cuSOLVER's header where that is missing: LibTorch's headers name the handle, and the shim never uses it.
// The real header comes first where there is one.
#pragma once

typedef struct cusolverDnContext* cusolverDnHandle_t;
