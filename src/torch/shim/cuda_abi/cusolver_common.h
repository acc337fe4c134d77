// Stands in for cuSOLVER's header where that is missing: LibTorch's headers name the type, and the shim never uses it.
// The real header comes first where there is one.
#pragma once

enum cusolverStatus_t : int {};
