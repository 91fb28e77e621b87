// The names, types and shapes at the graph's edge (ARCHITECTURE.md, "The graph's edge").
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/kv_cache.h"
#include "src/manifest.h"
#include "src/onnxruntime_library.h"

namespace edgelora {

struct Edge {
  static constexpr int64_t kAny = -1;  // a symbolic dimension, as ORT reports it too

  ONNXTensorElementDataType type;
  std::vector<int64_t> dims;
};

using Edges = std::map<std::string, Edge>;  // by name

// Where a flavor's adapters enter the graph.
struct AdapterEdge {
  Edges inputs;
  Edges defaults;  // inputs that have a value if none is given (ORT's overridable initializers)
};

// "past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key", … and
// "present.0.key", …
std::vector<std::string> past_names(int32_t layers);
std::vector<std::string> present_names(int32_t layers);

// How the graph keeps its kv_cache, by the type of its first tensor; exact: the operators are.
KvFormat read_kv_format(const OnnxRuntime& ort, const OrtSession* session,
                        const ManifestModel& model, bool exact);

// Throws Error with EDGELORA_BAD_FILE that lists inputs and outputs that are missing, surplus or
// not as the manifest has them: the first few, and how many more.
void check_graph_edge(const OnnxRuntime& ort, const OrtSession* session, const Manifest& manifest,
                      const AdapterEdge& adapter, const KvFormat& kv_format);

}  // namespace edgelora
