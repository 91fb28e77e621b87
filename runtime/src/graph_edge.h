// The names, types and shapes at the graph's edge (ARCHITECTURE.md, "The graph's edge").
#pragma once

#include <string>
#include <vector>

#include "src/manifest.h"
#include "src/onnxruntime_library.h"

namespace edgelora {

// "past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key", … and
// "present.0.key", …
std::vector<std::string> past_names(int32_t layers);
std::vector<std::string> present_names(int32_t layers);

// Throws Error with EDGELORA_BAD_FILE that lists every input and output that is missing, surplus or
// not as the manifest has it.
void check_graph_edge(const OnnxRuntime& ort, const OrtSession* session, const Manifest& manifest);

}  // namespace edgelora
