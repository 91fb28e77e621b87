#include "src/flavor.h"

#include "src/error.h"
#include "src/onnx_adapter.h"

namespace edgelora {
namespace {

PrefixShape prefix_shape(const ManifestModel& model) {
  return {model.num_hidden_layers, model.num_key_value_heads, model.head_dim};
}

// Our operators: they find the adapters that the input adapter_ids names in the store.
class OwnFlavor : public Flavor {
 public:
  const char* name() const override { return "edgelora"; }
  const char* isa() const override { return kernels_.isa; }
  int ort_threads(int) const override { return 1; }  // our operators bring their own

  void configure(const OnnxRuntime& ort, const OpsOptions& ops,
                 OrtSessionOptions* options) const override {
    const OrtApi& api = ort.api();
    ort.check(api.SetSessionGraphOptimizationLevel(
        options, ORT_ENABLE_BASIC));  // the export has fused what it wants fused
    OpsOptions chosen = ops;
    chosen.kernels = &kernels_;
    ort.check(register_ops(&api, options, chosen));
  }

  AdapterEdge adapter_edge(const Manifest&) const override {
    return {{{"adapter_ids", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {Edge::kAny}}}}, {}};
  }

  int64_t load_adapter(const OnnxRuntime& ort, const Manifest& manifest,
                       const ManifestAdapter& adapter) const override {
    return load_adapter_file(ort, manifest, manifest.path(adapter.path));
  }

  int64_t load_adapter_file(const OnnxRuntime&, const Manifest& manifest,
                            const std::string& path) const override {
    return AdapterStore::instance().load(path, manifest.base_fingerprint, manifest.targets,
                                         prefix_shape(manifest.model));
  }

  bool takes(const OnnxRuntime&, const ActiveAdapter& adapter) const override {
    return adapter.onnx_adapter == nullptr;
  }

  void activate(const OnnxRuntime& ort, RunAdapter* adapter, GraphRun* run) const override {
    run->set_input("adapter_ids", ort.tensor(&adapter->handle, {1}));
  }

 private:
  const kernels::KernelTable& kernels_ = selected_kernels();
};

// ONNX Runtime's operators: it feeds the active adapter's factors to the inputs that default to
// rank 0.
class StockFlavor : public Flavor {
 public:
  const char* name() const override { return "ort"; }
  const char* isa() const override { return "onnxruntime"; }
  int ort_threads(int threads) const override { return threads; }

  void configure(const OnnxRuntime& ort, const OpsOptions& ops,
                 OrtSessionOptions* options) const override {
    if (ops.exact) {
      throw Error(
          EDGELORA_INVALID_ARGUMENT,
          "flavor ort computes in one accuracy only: for accuracy float export flavor edgelora");
    }
    ort.check(ort.api().SetSessionGraphOptimizationLevel(options, ORT_ENABLE_ALL));
  }

  AdapterEdge adapter_edge(const Manifest& manifest) const override {
    const auto type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    Edges factors;
    for (const auto& [target, features] : manifest.targets) {
      factors[target + ".lora_a"] = {type, {features.first, Edge::kAny}};
      factors[target + ".lora_b"] = {type, {Edge::kAny, features.second}};
    }
    return {{}, factors};
  }

  int64_t load_adapter(const OnnxRuntime& ort, const Manifest& manifest,
                       const ManifestAdapter& adapter) const override {
    if (is_safetensors(adapter.path)) return load_prefix(manifest, manifest.path(adapter.path));
    return AdapterStore::instance().add(std::make_shared<const OnnxAdapter>(
        ort, manifest.path(adapter.path), manifest.base_fingerprint, manifest.targets,
        adapter.invocation));
  }

  int64_t load_adapter_file(const OnnxRuntime&, const Manifest& manifest,
                            const std::string& path) const override {
    if (is_safetensors(path)) return load_prefix(manifest, path);
    throw Error(EDGELORA_INVALID_ARGUMENT,
                path + ": flavor ort takes the adapters of its bundle only, whose files name no " +
                    "base; export the bundle again with the adapter");
  }

  // A prefix is of no onnxruntime: it goes into the kv_cache alone.
  bool takes(const OnnxRuntime& ort, const ActiveAdapter& adapter) const override {
    if (adapter.onnx_adapter == nullptr) return adapter.prefix() != nullptr;
    return adapter.onnx_adapter->is_of(ort);
  }

  void activate(const OnnxRuntime& ort, RunAdapter* adapter, GraphRun* run) const override {
    if (adapter->active == nullptr || adapter->active->onnx_adapter == nullptr) return;
    ort.check(ort.api().RunOptionsAddActiveLoraAdapter(run->options(),
                                                       adapter->active->onnx_adapter->get()));
  }

 private:
  static bool is_safetensors(const std::string& path) {
    const std::string ending = ".safetensors";
    return path.size() >= ending.size() &&
           path.compare(path.size() - ending.size(), ending.size(), ending) == 0;
  }

  static int64_t load_prefix(const Manifest& manifest, const std::string& path) {
    AdapterStore& store = AdapterStore::instance();
    const int64_t handle = store.load(path, manifest.base_fingerprint, manifest.targets,
                                      prefix_shape(manifest.model));
    if (store.find(handle)->prefix() != nullptr) return handle;
    store.unload(handle);
    throw Error(EDGELORA_INVALID_ARGUMENT,
                path +
                    ": flavor ort takes no factors from such a file, only a prefix; export the " +
                    "bundle again with the adapter");
  }
};

}  // namespace

std::unique_ptr<const Flavor> make_flavor(const Manifest& manifest) {
  if (manifest.flavor == "edgelora") return std::make_unique<OwnFlavor>();
  if (manifest.flavor == "ort") return std::make_unique<StockFlavor>();
  throw Error(EDGELORA_BAD_FILE,
              manifest.path("manifest.json") + ": unknown flavor \"" + manifest.flavor + '"');
}

}  // namespace edgelora
