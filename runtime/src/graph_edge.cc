#include "src/graph_edge.h"

#include "src/element_type.h"
#include "src/error.h"

namespace edgelora {
namespace {

constexpr int64_t kAny = Edge::kAny;

// A graph may leave any dimension open; a fixed one must be ours.
bool fits(const Edge& ours, const Edge& found) {
  if (ours.type != found.type || ours.dims.size() != found.dims.size()) return false;
  for (size_t i = 0; i < ours.dims.size(); ++i) {
    if (found.dims[i] != kAny && found.dims[i] != ours.dims[i]) return false;
  }
  return true;
}

std::string text(const Edge& edge) {
  std::string out = std::string(name_of(edge.type)) + " [";
  for (size_t i = 0; i < edge.dims.size(); ++i) {
    out += (i == 0 ? "" : ", ") + (edge.dims[i] == kAny ? "?" : std::to_string(edge.dims[i]));
  }
  return out + "]";
}

std::vector<std::string> cache_names(const std::string& prefix, int32_t layers) {
  std::vector<std::string> names;
  for (int32_t i = 0; i < layers; ++i) {
    names.push_back(prefix + "." + std::to_string(i) + ".key");
    names.push_back(prefix + "." + std::to_string(i) + ".value");
  }
  return names;
}

// Keys and values in turn, as past_names and present_names have them.
void add_cache(const std::vector<std::string>& names, const ManifestModel& model,
               const KvFormat& format, Edges* edges) {
  for (size_t i = 0; i < names.size(); ++i) {
    const int64_t width = i % 2 == 0 ? format.key_width : format.value_width;
    (*edges)[names[i]] = {format.type, {kAny, model.num_key_value_heads, kAny, width}};
  }
}

Edges expected_inputs(const ManifestModel& model, const AdapterEdge& adapter,
                      const KvFormat& format) {
  const auto int64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  Edges edges = {{"input_ids", {int64, {kAny, kAny}}},
                 {"attention_mask", {int64, {kAny, kAny}}},
                 {"logits_to_keep", {int64, {kAny}}}};
  edges.insert(adapter.inputs.begin(), adapter.inputs.end());
  add_cache(past_names(model.num_hidden_layers), model, format, &edges);
  return edges;
}

Edges expected_outputs(const ManifestModel& model, const KvFormat& format) {
  Edges edges = {{"logits", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {kAny, kAny, model.vocab_size}}}};
  add_cache(present_names(model.num_hidden_layers), model, format, &edges);
  return edges;
}

Edge read_type(const OnnxRuntime& ort, OrtTypeInfo* info) {
  const OrtApi& api = ort.api();
  const OrtHandle<OrtTypeInfo> owned(info, api.ReleaseTypeInfo);
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  ort.check(api.CastTypeInfoToTensorInfo(info, &tensor));
  Edge edge{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
  if (tensor == nullptr) return edge;
  size_t rank = 0;
  ort.check(api.GetTensorElementType(tensor, &edge.type));
  ort.check(api.GetDimensionsCount(tensor, &rank));
  edge.dims.resize(rank);
  ort.check(api.GetDimensions(tensor, edge.dims.data(), rank));
  return edge;
}

std::string take_name(const OnnxRuntime& ort, OrtAllocator* allocator, char* name) {
  const std::string copy(name);
  ort.check(ort.api().AllocatorFree(allocator, name));
  return copy;
}

// One side of the session: the three functions differ between inputs and outputs only by name.
struct Side {
  decltype(OrtApi::SessionGetInputCount) count;
  decltype(OrtApi::SessionGetInputName) name;
  decltype(OrtApi::SessionGetInputTypeInfo) type;
};

Side input_side(const OrtApi& api) {
  return {api.SessionGetInputCount, api.SessionGetInputName, api.SessionGetInputTypeInfo};
}

Edges read_edges(const OnnxRuntime& ort, const OrtSession* session, const Side& side) {
  OrtAllocator* allocator = nullptr;
  ort.check(ort.api().GetAllocatorWithDefaultOptions(&allocator));
  size_t count = 0;
  ort.check(side.count(session, &count));
  Edges edges;
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    OrtTypeInfo* info = nullptr;
    ort.check(side.name(session, i, allocator, &name));
    const std::string key = take_name(ort, allocator, name);
    ort.check(side.type(session, i, &info));
    edges[key] = read_type(ort, info);
  }
  return edges;
}

// A list for a message; the first few tell what the matter is.
class Problems {
 public:
  void add(const std::string& problem) {
    if (++count_ <= kShown) text_ += "; " + problem;
  }
  bool empty() const { return count_ == 0; }
  std::string text() const {
    return count_ <= kShown ? text_ : text_ + "; and " + std::to_string(count_ - kShown) + " more";
  }

 private:
  static constexpr size_t kShown = 8;
  size_t count_ = 0;
  std::string text_;
};

void compare(const Edges& expected, const Edges& found, const std::string& kind,
             Problems* problems) {
  const auto add = [&](const std::string& problem) { problems->add(kind + " " + problem); };
  for (const auto& [name, edge] : expected) {
    const auto match = found.find(name);
    if (match == found.end()) {
      add(name + " is missing");
    } else if (!fits(edge, match->second)) {
      add(name + " is " + text(match->second) + ", not " + text(edge));
    }
  }
  for (const auto& [name, edge] : found) {
    if (expected.count(name) == 0) add(name + " is unknown");
  }
}

}  // namespace

std::vector<std::string> past_names(int32_t layers) {
  return cache_names("past_key_values", layers);
}

std::vector<std::string> present_names(int32_t layers) { return cache_names("present", layers); }

KvFormat read_kv_format(const OnnxRuntime& ort, const OrtSession* session,
                        const ManifestModel& model, bool exact) {
  const Edges inputs = read_edges(ort, session, input_side(ort.api()));
  const auto found = inputs.find(past_names(1).front());
  if (found == inputs.end() || found->second.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8) {
    return KvFormat::floats(model);
  }
  const KvFormat float_bytes = KvFormat::bytes(model, true);
  const bool is_float = found->second.dims.size() == 4 &&
                        found->second.dims[3] == float_bytes.key_width;
  return exact || is_float ? float_bytes : KvFormat::bytes(model, false);
}

void check_graph_edge(const OnnxRuntime& ort, const OrtSession* session, const Manifest& manifest,
                      const AdapterEdge& adapter, const KvFormat& kv_format) {
  const OrtApi& api = ort.api();
  const Side inputs = input_side(api);
  const Side outputs{api.SessionGetOutputCount, api.SessionGetOutputName,
                     api.SessionGetOutputTypeInfo};
  const Side defaults{api.SessionGetOverridableInitializerCount,
                      api.SessionGetOverridableInitializerName,
                      api.SessionGetOverridableInitializerTypeInfo};
  Problems problems;
  compare(expected_inputs(manifest.model, adapter, kv_format), read_edges(ort, session, inputs),
          "input", &problems);
  compare(adapter.defaults, read_edges(ort, session, defaults), "input with a default", &problems);
  compare(expected_outputs(manifest.model, kv_format), read_edges(ort, session, outputs), "output",
          &problems);
  if (problems.empty()) return;
  throw Error(EDGELORA_BAD_FILE, manifest.path("model.onnx") + " does not fit the manifest" +
                                     problems.text() + "; export the bundle again");
}

}  // namespace edgelora
