// Included by LibTorch's ProcessGroupGloo.hpp; nothing of it is used there.
#pragma once
