// The check of an .onnx_adapter file before ONNX Runtime reads it: older versions believe its
// sizes.
#pragma once

#include <string>

#include "src/adapter_store.h"

namespace edgelora {

// Throws Error with EDGELORA_BAD_FILE unless the file is a flatbuffer of format version 1 whose
// parameters are, for some of the targets, the pair <target>.lora_a float32 [K, rank] and
// <target>.lora_b float32 [rank, N] of finite values.
void check_onnx_adapter_file(const std::string& path, const Targets& targets);

}  // namespace edgelora
