#include "src/model.h"

#include "ops/registration.h"
#include "src/adapter_store.h"
#include "src/cores.h"
#include "src/error.h"
#include "src/graph_edge.h"

namespace edgelora {
namespace {

constexpr int kMostThreads = 1024;

Manifest read_checked_manifest(const std::string& bundle) {
  Manifest manifest = read_manifest(bundle);
  if (manifest.flavor == "edgelora") return manifest;
  if (manifest.flavor == "ort") {
    throw Error(EDGELORA_BAD_FILE, bundle + ": flavor ort needs a plain onnxruntime session");
  }
  throw Error(EDGELORA_BAD_FILE,
              bundle + "/manifest.json: unknown flavor \"" + manifest.flavor + '"');
}

int choose_threads(int asked) {
  if (asked < 0 || asked > kMostThreads) {
    throw Error(EDGELORA_INVALID_ARGUMENT,
                "threads is " + std::to_string(asked) + ", not in 0…1024");
  }
  return asked == 0 ? performance_cores() : asked;
}

OrtHandle<OrtSessionOptions> session_options(const OnnxRuntime& ort, const ModelOptions& options,
                                             int threads) {
  const OrtApi& api = ort.api();
  OrtSessionOptions* raw = nullptr;
  ort.check(api.CreateSessionOptions(&raw));
  OrtHandle<OrtSessionOptions> owned(raw, api.ReleaseSessionOptions);
  ort.check(api.SetIntraOpNumThreads(raw, threads));
  ort.check(api.SetInterOpNumThreads(raw, 1));
  ort.check(api.SetSessionExecutionMode(raw, ORT_SEQUENTIAL));
  ort.check(api.SetSessionGraphOptimizationLevel(
      raw, ORT_ENABLE_BASIC));  // the export has fused what it wants fused
  ort.check(api.DisableMemPattern(
      raw));  // shapes differ at every step: a pattern would be made and never met again
  ort.check(api.AddSessionConfigEntry(raw, "session.intra_op.allow_spinning",
                                      options.spinning ? "1" : "0"));
  ort.check(register_ops(&api, raw, OpsOptions{options.exact, threads}));
  return owned;
}

OrtHandle<OrtSession> create_session(const OnnxRuntime& ort, const std::string& path,
                                     const OrtSessionOptions* options) {
#if defined(_WIN32)
  const std::wstring native_path(path.begin(), path.end());
#else
  const std::string& native_path = path;
#endif
  OrtSession* session = nullptr;
  ort.check(ort.api().CreateSession(ort.env(), native_path.c_str(), options, &session));
  return {session, ort.api().ReleaseSession};
}

std::vector<const char*> name_pointers(const Manifest& manifest) {
  std::vector<const char*> names;
  for (const auto& entry : manifest.adapters) names.push_back(entry.first.c_str());
  return names;
}

std::string known_names(const Manifest& manifest) {
  std::string names;
  for (const auto& [name, path] : manifest.adapters) names += (names.empty() ? "" : ", ") + name;
  return names.empty() ? "it has none" : "it has " + names;
}

}  // namespace

Model::Model(const std::string& bundle, const ModelOptions& options)
    : manifest_(read_checked_manifest(bundle)),
      adapter_names_(name_pointers(manifest_)),
      onnxruntime_(options.onnxruntime_path),
      threads_(choose_threads(options.threads)),
      session_(create_session(onnxruntime_, manifest_.path("model.onnx"),
                              session_options(onnxruntime_, options, threads_).get())) {
  check_graph_edge(onnxruntime_, session_.get(), manifest_);
}

int64_t Model::weight_bytes() const {
  const auto found = manifest_.files.find("model.onnx.data");
  return found == manifest_.files.end() ? 0 : found->second;
}

int64_t Model::load_adapter(const std::string& name) const {
  const auto found = manifest_.adapters.find(name);
  if (found == manifest_.adapters.end()) {
    throw Error(EDGELORA_NOT_FOUND,
                manifest_.folder + ": no adapter \"" + name + "\"; " + known_names(manifest_));
  }
  return load_adapter_file(manifest_.path(found->second));
}

int64_t Model::load_adapter_file(const std::string& path) const {
  return AdapterStore::instance().load(path, manifest_.base_fingerprint, manifest_.targets);
}

}  // namespace edgelora
