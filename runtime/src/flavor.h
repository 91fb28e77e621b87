// What differs between the flavors of a bundle; chosen once when the model is loaded.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "ops/registration.h"
#include "src/adapter_store.h"
#include "src/graph_edge.h"
#include "src/graph_run.h"
#include "src/manifest.h"
#include "src/onnxruntime_library.h"

namespace edgelora {

// The adapter of a run: handle 0 and null are the base.
struct RunAdapter {
  int64_t handle = 0;
  const ActiveAdapter* active = nullptr;
};

class Flavor {
 public:
  virtual ~Flavor() = default;

  virtual const char* name() const = 0;
  virtual const char* isa() const = 0;  // of the kernels in use

  // Of ONNX Runtime's own pool, of `threads` that compute.
  virtual int ort_threads(int threads) const = 0;

  // Operators and optimizations of a session. Throws Error if the flavor cannot do what `ops` asks.
  virtual void configure(const OnnxRuntime& ort, const OpsOptions& ops,
                         OrtSessionOptions* options) const = 0;

  // Where the graph takes its adapter.
  virtual AdapterEdge adapter_edge(const Manifest& manifest) const = 0;

  // A handle of one of the bundle's adapters, or of a file outside the bundle. Throws Error.
  virtual int64_t load_adapter(const OnnxRuntime& ort, const Manifest& manifest,
                               const ManifestAdapter& adapter) const = 0;
  virtual int64_t load_adapter_file(const OnnxRuntime& ort, const Manifest& manifest,
                                    const std::string& path) const = 0;

  // Whether runs of this flavor in this library can have the adapter.
  virtual bool takes(const OnnxRuntime& ort, const ActiveAdapter& adapter) const = 0;

  // Makes `run` have the adapter; it must stay as it is until the run has ended.
  virtual void activate(const OnnxRuntime& ort, RunAdapter* adapter, GraphRun* run) const = 0;
};

// Of the manifest; throws Error for a flavor that this library does not know.
std::unique_ptr<const Flavor> make_flavor(const Manifest& manifest);

}  // namespace edgelora
