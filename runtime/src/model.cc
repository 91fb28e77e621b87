#include "src/model.h"

#include <unistd.h>

#include <algorithm>

#include "src/cores.h"
#include "src/error.h"
#include "src/graph_edge.h"

namespace edgelora {
namespace {

constexpr const char* kWeights = "model.onnx.data";

// More than this only stand in each other's way, until the machine stands still.
int most_threads(int cpus) { return std::max(64, 4 * cpus); }

int choose_threads(int asked) {
  const int cpus = available_cpus();
  if (asked < 0 || asked > most_threads(cpus)) {
    throw Error(EDGELORA_INVALID_ARGUMENT, "threads is " + std::to_string(asked) + ", not in 0…" +
                                               std::to_string(most_threads(cpus)) +
                                               " (this machine gives " + std::to_string(cpus) +
                                               " CPUs; 0 chooses)");
  }
  return asked == 0 ? performance_cores() : asked;
}

// A worker that spins without a CPU of its own takes it from one that works.
bool choose_spinning(const ModelOptions& options, int threads) {
  return options.spinning && threads <= available_cpus();
}

OrtHandle<OrtSessionOptions> session_options(const OnnxRuntime& ort, const Flavor& flavor,
                                             const ModelOptions& options, int threads,
                                             const WeightFile* weights) {
  const OrtApi& api = ort.api();
  OrtSessionOptions* raw = nullptr;
  ort.check(api.CreateSessionOptions(&raw));
  OrtHandle<OrtSessionOptions> owned(raw, api.ReleaseSessionOptions);
  ort.check(api.SetIntraOpNumThreads(raw, flavor.ort_threads(threads)));
  ort.check(api.SetInterOpNumThreads(raw, 1));
  ort.check(api.SetSessionExecutionMode(raw, ORT_SEQUENTIAL));
  ort.check(api.DisableMemPattern(
      raw));  // shapes differ at every step: a pattern would be made and never met again
  const bool spinning = choose_spinning(options, threads);
  ort.check(
      api.AddSessionConfigEntry(raw, "session.intra_op.allow_spinning", spinning ? "1" : "0"));
  flavor.configure(ort, OpsOptions{options.exact, threads, spinning}, raw);
  if (weights != nullptr) weights->share(ort, raw);
  return owned;
}

// What `read` returns; says of which file it is what goes wrong there.
template <typename Read>
auto naming(const std::string& path, const Read& read) {
  try {
    return read();
  } catch (const Error& error) {
    const bool bad_file = error.status() == EDGELORA_BAD_FILE;
    throw Error(error.status(), path + ": " + error.what() +
                                    (bad_file ? "; copy or export the bundle again" : ""));
  }
}

std::unique_ptr<const WeightFile> map_weights(const OnnxRuntime& ort, const Manifest& manifest) {
  if (manifest.files.count(kWeights) == 0) return nullptr;
  const std::string model = manifest.path("model.onnx");
  return naming(model, [&] {
    return std::make_unique<const WeightFile>(ort, model, manifest.path(kWeights));
  });
}

OrtHandle<OrtSession> create_session(const OnnxRuntime& ort, const std::string& path,
                                     const OrtSessionOptions* options) {
  OrtSession* session = nullptr;
  naming(path, [&] {
    ort.check(ort.api().CreateSession(ort.env(), path.c_str(), options, &session));
  });
  return {session, ort.api().ReleaseSession};
}

std::vector<const char*> name_pointers(const Manifest& manifest) {
  std::vector<const char*> names;
  for (const auto& entry : manifest.adapters) names.push_back(entry.first.c_str());
  return names;
}

std::string known_names(const Manifest& manifest) {
  std::string names;
  for (const auto& [name, adapter] : manifest.adapters) names += (names.empty() ? "" : ", ") + name;
  return names.empty() ? "it has none" : "it has " + names;
}

}  // namespace

Model::Model(const std::string& bundle, const ModelOptions& options)
    : process_(getpid()),
      options_(options),
      manifest_(read_manifest(bundle)),
      adapter_names_(name_pointers(manifest_)),
      flavor_(make_flavor(manifest_)),
      onnxruntime_(options.onnxruntime_path),
      threads_(choose_threads(options.threads)),
      weights_(map_weights(onnxruntime_, manifest_)),
      session_(create_session(
          onnxruntime_, manifest_.path("model.onnx"),
          session_options(onnxruntime_, *flavor_, options, threads_, weights_.get()).get())),
      kv_format_(read_kv_format(onnxruntime_, session_.get(), manifest_.model, options.exact)) {
  check_graph_edge(onnxruntime_, session_.get(), manifest_, flavor_->adapter_edge(manifest_),
                   kv_format_);
}

void Model::check_process() const {
  if (getpid() == process_) return;
  throw Error(EDGELORA_INVALID_ARGUMENT,
              manifest_.folder + ": loaded before this process was forked, which has none of the " +
                  "threads: load the model after the fork");
}

int64_t Model::weight_bytes() const {
  const auto found = manifest_.files.find(kWeights);
  return found == manifest_.files.end() ? 0 : found->second.size;
}

int64_t Model::load_adapter(const std::string& name) const {
  const auto found = manifest_.adapters.find(name);
  if (found == manifest_.adapters.end()) {
    throw Error(EDGELORA_NOT_FOUND,
                manifest_.folder + ": no adapter \"" + name + "\"; " + known_names(manifest_));
  }
  check_content(manifest_, found->second.path);
  return flavor_->load_adapter(onnxruntime_, manifest_, found->second);
}

int64_t Model::load_adapter_file(const std::string& path) const {
  return flavor_->load_adapter_file(onnxruntime_, manifest_, path);
}

std::shared_ptr<const ActiveAdapter> Model::find_adapter(int64_t handle) const {
  if (handle == 0) return nullptr;
  std::shared_ptr<const ActiveAdapter> adapter = AdapterStore::instance().find(handle);
  const std::string name = "adapter handle " + std::to_string(handle);
  if (adapter == nullptr) {
    throw Error(EDGELORA_NOT_FOUND, name + " is unknown or unloaded; set another");
  }
  if (!flavor_->takes(onnxruntime_, *adapter)) {
    throw Error(EDGELORA_INVALID_ARGUMENT,
                name + " was loaded for another flavor or onnxruntime than this model's, " +
                    flavor_->name() + "; load it from this model");
  }
  if (adapter->base_fingerprint() != manifest_.base_fingerprint) {
    throw Error(EDGELORA_INVALID_ARGUMENT,
                name + " was made for the base " + shortened(adapter->base_fingerprint()) +
                    ", this model's is " + shortened(manifest_.base_fingerprint));
  }
  return adapter;
}

}  // namespace edgelora
