// A loaded bundle: manifest, ONNX session, threads. Immutable and shared by its sessions.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/adapter_store.h"
#include "src/flavor.h"
#include "src/kv_cache.h"
#include "src/manifest.h"
#include "src/onnxruntime_library.h"
#include "src/weight_file.h"

namespace edgelora {

struct ModelOptions {
  std::string onnxruntime_path;  // empty: the system's library by name
  int threads = 0;               // 0: one for each performance core
  bool spinning = true;
  bool exact = false;  // float32 activations
};

class Model {
 public:
  // Reads and checks the bundle; throws Error.
  Model(const std::string& bundle, const ModelOptions& options);

  const Manifest& manifest() const { return manifest_; }
  const OnnxRuntime& onnxruntime() const { return onnxruntime_; }
  const Flavor& flavor() const { return *flavor_; }
  OrtSession* ort_session() const { return session_.get(); }
  int threads() const { return threads_; }
  const ModelOptions& options() const { return options_; }

  // Throws Error in a process forked after loading, where the threads are missing.
  void check_process() const;
  const KvFormat& kv_format() const { return kv_format_; }

  int64_t weight_bytes() const;  // of the external weight file
  const std::vector<const char*>& adapter_names() const { return adapter_names_; }

  // A handle of the bundle's adapter `name`, or of a file outside it; throws Error.
  int64_t load_adapter(const std::string& name) const;
  int64_t load_adapter_file(const std::string& path) const;

  // What the handle stands for, null for the base. Throws Error if it is unknown, unloaded, or of
  // another base or flavor.
  std::shared_ptr<const ActiveAdapter> find_adapter(int64_t handle) const;

 private:
  const int64_t process_;  // that loaded it
  const ModelOptions options_;
  Manifest manifest_;
  std::vector<const char*> adapter_names_;  // keys of manifest_.adapters
  std::unique_ptr<const Flavor> flavor_;
  OnnxRuntime onnxruntime_;
  int threads_;
  std::unique_ptr<const WeightFile> weights_;  // null without a file of weights
  OrtHandle<OrtSession> session_;
  KvFormat kv_format_;
};

}  // namespace edgelora
