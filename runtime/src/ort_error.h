// Our errors as ONNX Runtime's, and back. It hands on what an operator says, among words of its
// own, but not always its code: so ours stands in the message, "… [EDGELORA_BAD_FILE]".
#pragma once

#include <onnxruntime_c_api.h>

#include "src/error.h"

namespace edgelora {

// What an operator without memory says; needs none itself.
inline constexpr const char* kOutOfMemory = "out of memory [EDGELORA_OUT_OF_MEMORY]";

// A status owned by the caller.
OrtStatus* to_ort(const OrtApi& api, const Error& error) noexcept;

// Throws what `status` says and releases it; null passes.
void check_ort(const OrtApi& api, OrtStatus* status);

}  // namespace edgelora
